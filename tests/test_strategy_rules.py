"""The conformance kit for strategies: the built-ins pass, and each rule is broken once."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import installed

from ars_kit.errors import ConfigError
from ars_kit.schema import parse_choice
from ars_kit.shapes import ARCHITECTURES
from ars_kit.spec import Blend, Block, Descent, Hint, LazyWeights, Picks
from ars_kit.testing import ConformanceError, cases, check_strategy

QUICK = {"ewc": "ewc:sequences=2"}
OWN = ("duplicate", "progressive", "prune")
"""Those that make weights in a way of their own; the others bear what one of these bears, and what
they add (who descends from whom, a loss, a blend) knows no architecture."""
INSTALLED = sorted(installed().shelves["strategies"])
TURNS = {name: list(ARCHITECTURES)[i % len(ARCHITECTURES)] for i, name in enumerate(INSTALLED)}
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def made(text: str) -> Any:
    return installed().make("strategies", parse_choice(text))


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the kit ask about models of one architecture alone: a third of the births."""
    return lambda architecture: monkeypatch.setattr(cases, "ARCHITECTURES", (architecture,))


@pytest.mark.parametrize("name", INSTALLED)
def test_the_built_in_strategies_keep_the_rules(name: str, only: Callable[[str], None]) -> None:
    """Those that make weights of their own with each architecture, the others with one in turn."""
    if name not in OWN:
        only(TURNS[name])
    check_strategy(lambda: made(QUICK.get(name, name)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", INSTALLED)
def test_they_keep_them_for_every_change_to_every_parent(name: str) -> None:
    check_strategy(lambda: made(QUICK.get(name, name)), thorough=True)


class Good:
    """Progressive, of which each test breaks one thing."""

    inherits: Any = True

    def __init__(self) -> None:
        self.inner: Any = made("progressive")

    def supports(self, parent: Any, child: Any) -> Any:
        return self.inner.supports(parent, child)

    def inherit(self, parent: Any, birth: Any) -> Any:
        seed = self.inner.inherit(parent, birth)
        return replace(seed, weights={n: seed.weights[n] for n in seed.weights})


class Everything(Good):
    """Offers each optional part, and breaks no rule."""

    def descents(self, configs: Any) -> Any:
        return [Descent(i, i - 1 if i else None, taught=True) for i in range(len(configs))]

    def inherit(self, parent: Any, birth: Any) -> Any:
        seed = super().inherit(parent, birth)
        hints = {NORM: Hint(lr=0.5, frozen_until=3)}
        return replace(seed, loss=self.loss, on_step=self.on_step, hints=hints, start_lr=0.5)

    @staticmethod
    def loss(lesson: Any) -> Any:
        return lesson.loss + (lesson.logits - lesson.teacher).square().mean()

    @staticmethod
    def on_step(step: int, weights: Any) -> None:
        weights[NORM].clamp_(min=0.1 / step)

    def finish(self, members: Any) -> Any:
        last = members[-1]
        return [Blend("again", last.config, dict(last.weights), (last.name,))]


def test_a_strategy_may_offer_everything_and_break_nothing(only: Callable[[str], None]) -> None:
    only("qwen3")
    check_strategy(Everything)


class Twice(Good):
    """New MLP units are copies of old ones; each pair shares what it writes to the stream."""

    share = 0.5

    def supports(self, parent: Any, child: Any) -> Any:
        wider = {**parent.to_dict(), "intermediate_size": child.intermediate_size}
        return None if wider == child.to_dict() else "only the MLP may change"

    def inherit(self, parent: Any, birth: Any) -> Any:
        seed = super().inherit(parent, birth)
        old, new = parent.config.intermediate_size, birth.config.intermediate_size
        provenance = dict(seed.provenance)
        for name, tensor in seed.weights.items():
            if new == old or "mlp" not in name:
                continue
            down = "down_proj" in name
            dim, other = (1, tensor.shape[0]) if down else (0, tensor.shape[1])
            shares = (self.share, 1 - self.share) if down else (1.0, 1.0)
            pieces = (
                (0, new - old, 0, shares[0]), (new - old, old, new - old, 1.0),
                (old, new, 0, shares[1]),
            )  # fmt: skip
            blocks = []
            for start, stop, source, share in pieces:
                width, whole = stop - start, (0, other, 1)
                here, there = (start, stop, 1), (source, source + width, 1)
                from_parent = parent.weights[name].narrow(dim, source, width)
                tensor.narrow(dim, start, width).copy_(share * from_parent)
                to = (whole, here) if down else (here, whole)
                blocks.append(Block(name, to, (whole, there) if down else (there, whole), share))
            provenance[name] = blocks
        return replace(seed, provenance=provenance)


class TwiceUnevenly(Twice):
    share = 1 / 3


def test_copies_that_part_pass(only: Callable[[str], None]) -> None:
    only("llama")
    check_strategy(TwiceUnevenly)


Bear = Callable[[Any, Any, Any], Any]


def bearing(bear: Bear) -> type[Good]:
    """Return a strategy whose seed is what ``bear(seed, parent, birth)`` makes of a good one."""

    class Broken(Good):
        def inherit(self, parent: Any, birth: Any) -> Any:
            return bear(super().inherit(parent, birth), parent, birth)

    return Broken


def saying(**terms: Any) -> type[Good]:
    return bearing(lambda seed, *_: replace(seed, **terms))


def answering(answer: Any) -> type[Good]:
    class Answers(Good):
        def supports(self, parent: Any, child: Any) -> Any:
            return answer(parent, child)

    return Answers


def telling(block: Block) -> type[Good]:
    return bearing(lambda seed, *_: replace(seed, provenance={**seed.provenance, NORM: [block]}))


def finishing(blend: Callable[[Any], Any]) -> type[Good]:
    class Finishes(Good):
        def finish(self, members: Any) -> Any:
            return [blend(members[-1])]

    return Finishes


def ordering(descents: Callable[[Any], Any]) -> type[Good]:
    class Orders(Good):
        def descents(self, configs: Any) -> Any:
            return descents(configs)

    return Orders


def raises(error: Exception) -> Any:
    def call(*_: Any) -> Any:
        raise error

    return call


def changed(change: Callable[[Any, Any, Any], Any]) -> type[Good]:
    """Return a strategy that changes something in place."""

    def bear(seed: Any, parent: Any, birth: Any) -> Any:
        change(seed, parent, birth)
        return seed

    return bearing(bear)


class SaysNothing(Good):
    inherits = None


class Remembers(Good):
    count = 0

    def inherit(self, parent: Any, birth: Any) -> Any:
        Remembers.count += 1
        seed = super().inherit(parent, birth)
        return replace(seed, rewarm_steps=None, weights={**seed.weights, **self.moved(seed)})

    def moved(self, seed: Any) -> Any:
        return {n: seed.weights[n] + self.count for n, b in seed.provenance.items() if not b}


class Drifts:
    """A loss with a memory."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, lesson: Any) -> Any:
        self.calls += 1
        return lesson.loss * self.calls


def meddles(lesson: Any) -> Any:
    with torch.no_grad():
        lesson.weights[NORM].add_(1)
    return lesson.loss


def shares(seed: Any, parent: Any, birth: Any) -> None:
    if seed.weights[UP].shape == parent.weights[UP].shape:
        seed.weights[UP] = parent.weights[UP]


def ties(seed: Any, parent: Any, birth: Any) -> None:
    seed.weights["model.layers.0.input_layernorm.weight"] = seed.weights[NORM]


def dead(seed: Any, parent: Any, birth: Any) -> None:
    """Zero both sides of what is new in an MLP."""
    seed.weights[UP][parent.config.intermediate_size :] = 0


def hides(seed: Any, parent: Any, birth: Any) -> Any:
    told = {n: () if n == NORM else blocks for n, blocks in seed.provenance.items()}
    return replace(seed, provenance=told)


def rounded(seed: Any, parent: Any, birth: Any) -> Any:
    """Go through float32 on the way to the child, and say nothing of it."""
    return replace(
        seed,
        weights={n: t.float().to(t) for n, t in seed.weights.items()},
        provenance=dict.fromkeys(seed.weights, ()),
    )


def otherwise_stored(seed: Any, parent: Any, birth: Any) -> Any:
    if isinstance(parent.weights, LazyWeights):
        seed.weights[NORM].mul_(1.001)
    return seed


def crashes_stored(seed: Any, parent: Any, birth: Any) -> Any:
    return replace(seed, note=str(birth.windows(1).shape))


WHOLE = ((0, 32, 1),)
ALL: dict[str, tuple[Any, str]] = {
    "says nothing": (SaysNothing, "bool 'inherits'"),
    "supports nothing": (answering(lambda *_: "no"), "supports none of the pairs"),
    "mumbles": (
        answering(lambda *_: False),
        r"one line of words; of a tied qwen2 \(2 layers of 32, 4x1 heads of 8\), .* returned False",
    ),
    "does not answer": (answering(raises(KeyError("x"))), r"supports must answer, .*KeyError"),
    "boasts": (
        answering(lambda *_: None),
        "supports has nothing against; .* less of everything, it raised ConfigError.*shrinks",
    ),
    "no seed": (bearing(lambda seed, *_: seed.weights), "inherit must return a Seed; .*returned {"),
    "a tensor short": (
        changed(lambda seed, *_: seed.weights.pop(NORM)),
        "match the child's configuration exactly; .*model.norm.weight is missing",
    ),
    "a tensor more": (
        changed(lambda seed, *_: seed.weights.update(x=torch.ones(1))),
        "match the child's configuration exactly; .* the child has no x",
    ),
    "another shape": (
        changed(lambda seed, *_: seed.weights.update({NORM: torch.ones(3)})),
        r"exactly; .*model.norm.weight is \(3,\), not \(32,\)",
    ),
    "another precision": (
        changed(lambda seed, *_: seed.weights.update({NORM: seed.weights[NORM].half()})),
        "precision of birth.fresh; .*model.norm.weight is torch.float16, not torch.float32",
    ),
    "infinite": (
        changed(lambda seed, *_: seed.weights[NORM].fill_(torch.inf)),
        "weights must be finite; .*model.norm.weight is not",
    ),
    "writes to its parent": (
        changed(lambda _, parent, __: parent.weights[NORM].add_(1)),
        "only reads; .*the parent's weights changed: model.norm.weight",
    ),
    "writes to moments": (
        changed(lambda _, parent, __: parent.opt_state[NORM]["exp_avg"].add_(1)),
        "only reads; .*the parent's moments changed",
    ),
    "writes to birth.fresh": (
        changed(lambda _, __, birth: birth.fresh[NORM].add_(1)),
        "only reads; .*birth.fresh changed",
    ),
    "writes to a configuration": (
        changed(lambda _, __, birth: birth.config.update({"rms_norm_eps": 1.0})),
        "only reads; .*the child's config changed",
    ),
    "shares memory": (changed(shares), f"memory of their own; .*{UP} shares its memory with the p"),
    "shares its own": (changed(ties), "shares its memory with model"),
    "draws globally": (changed(lambda *_: torch.randn(1)), "it used a global generator"),
    "draws in Python": (changed(lambda *_: random.random()), "it used a global generator"),
    "remembers": (Remembers, "must bear the same child; .* differs the second time"),
    "not exact": (
        changed(lambda seed, *_: seed.weights[NORM].mul_(1.1)),
        r"leave every logit as it was; .*, one changes by \S+ in float32 \(allowed: \S+\)",
    ),
    "not exact in float64": (bearing(rounded), r"one changes by \S+e-\S+ in float64 \(allowed"),
    "tells too little": (
        bearing(lambda seed, *_: replace(seed, provenance={NORM: seed.provenance[NORM]})),
        "provenance must name every tensor.*lm_head.weight is missing|embed_tokens.* is missing",
    ),
    "tells of a stranger": (
        changed(lambda seed, *_: seed.provenance.update(nobody=())),
        "the child has no nobody",
    ),
    "hides": (bearing(hides), "tell of all that was inherited; .*32 entries of model.norm.weight"),
    "lies": (telling(Block(NORM, WHOLE, WHOLE, 2.0)), "model.norm.weight is not 2 times model.n"),
    "tells of no parent": (telling(Block("nowhere", WHOLE, WHOLE)), "a block must fit .*nowhere"),
    "tells of too many": (
        telling(Block(NORM, WHOLE, (Picks((0, 1)),))),
        r"a block must fit both tensors; .* it is \(32,\), of model.norm.weight \(2,\)",
    ),
    "tells of places beyond": (
        telling(Block(NORM, WHOLE, (Picks((99,)),))), "a block must fit both tensors; .*IndexError"
    ),
    "tells twice": (
        bearing(
            lambda seed, *_: replace(
                seed, provenance={n: [*bs, *bs] for n, bs in seed.provenance.items()}
            )
        ),
        "one origin at most; .*blocks of model.embed_tokens.weight overlap",
    ),
    "bears dead parts": (
        changed(dead), r"within two steps; .*of everything, \d+ of \S+gate_proj.weight have none"
    ),
    "bears twins": (Twice, r"must part within two steps; .*a wider MLP, \d+ pairs do not"),
    "promises vaguely": (saying(preserves="mostly"), "preserves must be exact, approx or none"),
    "warms up backwards": (saying(rewarm_steps=-1), "rewarm_steps must be .*, it is -1"),
    "starts too high": (saying(start_lr=2.0), r"start_lr must be in \[0, 1\]; .*, it is 2.0"),
    "decays backwards": (saying(decay_fraction=-0.1), "decay_fraction must be .*, it is -0.1"),
    "replays all": (saying(replay=1.0), r"replay must be in \[0, 1\); .*, it is 1.0"),
    "keeps half": (saying(opt_state="half"), "opt_state must be derive or reset"),
    "writes a novel": (saying(note="a\nb"), "note must be one line of text"),
    "hints at nothing": (saying(hints={"nowhere": Hint()}), "it has no 'nowhere'"),
    "hints below zero": (saying(hints={NORM: Hint(lr=-1)}), "a Hint of numbers >= 0; .*lr=-1"),
    "a loss of many": (saying(loss=lambda x: x.logits), "a loss must be a 0-d tensor; .*shape is"),
    "a loss of none": (saying(loss=lambda _: 1.0), "a loss must be a 0-d tensor; .*, 1.0"),
    "a loss that is none": (saying(loss=lambda x: x.loss * torch.nan), "finite; .*, it is nan"),
    "a loss that waits": (
        saying(loss=lambda x: x.loss * float(x.inputs[0, 0])), "a loss must not wait .* _local_sca"
    ),
    "a loss that reads": (
        saying(loss=lambda x: x.loss * x.inputs.tolist()[0][0]), "a loss must not wait .* tolist"
    ),
    "a loss without a graph": (saying(loss=lambda x: x.loss.detach()), "must have a gradient"),
    "a loss that fails": (saying(loss=raises(KeyError("y"))), "a loss must not fail; .*KeyError"),
    "a loss that meddles": (saying(loss=meddles), "leave the weights alone; .*model.norm.weight"),
    "a loss that drifts": (
        bearing(lambda seed, *_: replace(seed, loss=Drifts())), "depend on its lesson alone"
    ),
    "a step by chance": (
        saying(on_step=lambda _, w: w[NORM].mul_(torch.rand(()))), "on the step and the weights al"
    ),
    "a step to infinity": (saying(on_step=lambda _, w: w[NORM].fill_(torch.inf)), "weights finite"),
    "a step that waits": (saying(on_step=lambda _, w: w[NORM].sum().item()), "on_step must not w"),
    "a step that fails": (saying(on_step=raises(KeyError("z"))), "on_step must not fail; .*'z'"),
    "stored otherwise": (bearing(otherwise_stored), "what the same one in memory does; .*norm"),
    "needs text": (bearing(crashes_stored), "or a ConfigError say why it cannot; .*TypeError"),
    "leaves one out": (
        ordering(lambda configs: [Descent(i, None) for i in range(len(configs) - 1)]),
        r"bear everyone once, parents first; of 3 members of \[2, 3, 4\] layers",
    ),
    "refuses everyone": (ordering(raises(ConfigError("not today"))), "every one .*: not today"),
    "fails to order": (ordering(raises(KeyError("w"))), "by a ConfigError alone; .*KeyError"),
    "usurps a name": (
        finishing(lambda last: Blend(last.name, last.config, last.weights, (last.name,))),
        "a name of its own; 'm2' is a member's",
    ),
    "blends of strangers": (
        finishing(lambda last: Blend("mix", last.config, last.weights, ("x",))), "'mix' names"
    ),
    "blends nothing": (
        finishing(lambda last: Blend("mix", last.config, {}, (last.name,))),
        "of 'mix', weights do not fit",
    ),
    "stirs its members": (
        finishing(
            lambda last: Blend(
                "mix", last.config, {n: t.add_(1) for n, t in last.weights.items()}, (last.name,)
            )
        ),
        "finish must only read its members; it changed m2",
    ),
    "makes no blend": (finishing(lambda _: "x"), "finish must make Blends; it made 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("how", ALL)
def test_a_broken_rule_is_named(how: str, only: Callable[[str], None]) -> None:
    only("qwen2")
    strategy, message = ALL[how]
    with pytest.raises(ConformanceError, match=message):
        check_strategy(strategy)
