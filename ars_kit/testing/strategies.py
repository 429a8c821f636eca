"""Does an inheritance strategy keep the promises that a run relies on?

It is asked about small Qwen2, Llama and Qwen3 models, tied and untied, of odd sizes, with one and
with several query heads a KV head: children of the same shape, deeper, wider in each way and in
all, and smaller. Pairs that it says it does not support are left out; of those it supports every
birth is held to every rule.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ars_kit.errors import ArsKitError, ConfigError
from ars_kit.inherit import descents
from ars_kit.models import set_weights, weights_of
from ars_kit.spec import Birth, Blend, Finishing, InheritanceStrategy, LazyWeights, Parent
from ars_kit.stored import save_weights, stored_weights
from ars_kit.testing.cases import EMBEDDED, Case, cases, fresh_of, model_of
from ars_kit.testing.learning import check_alive, check_exact
from ars_kit.testing.lessons import check_loss, check_on_step
from ars_kit.testing.newborns import Make, born, check_repeated, check_terms, may_not_fail
from ars_kit.testing.provenance import origins
from ars_kit.testing.rules import ConformanceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_strategy(make: Make, *, seed: int = 0, thorough: bool = False) -> None:
    """Check that a strategy keeps every rule of :class:`ars_kit.spec.InheritanceStrategy`.

    Args:
        make: returns a new strategy; called several times.
        seed: of weights, text and draws.
        thorough: every change of shape to every parent, not a choice of them: three times as long.

    Raises:
        ConformanceError: the first rule broken, of these: it says whether it inherits; refuses in
            words; bears weights that match the child, are finite and lie in memory of their own;
            only reads what it is shown; draws from ``birth.rng`` alone, the same each time; its
            provenance is true and hides nothing; it is exact where it says so, in float64 (1e-12)
            and float32 (1e-4); what is new has a gradient within two steps, and copies part; hints
            name tensors; a loss and an ``on_step`` are pure, finite and wait for no device; a
            stored parent bears the same as one in memory; descents bear everyone once, parents
            first; blends fit.
    """
    strategy = make()
    if not isinstance(getattr(strategy, "inherits", None), bool):
        raise ConformanceError("a strategy must say by a bool 'inherits' whether members inherit")
    supported = [case for case in cases(thorough=thorough) if _supports(strategy, case)]
    if not supported:
        raise ConformanceError("it supports none of the pairs of shapes that it was asked about")
    taught = _check_families(make, seed)
    stored: set[str] = set()
    for case in supported:
        _check_birth(make, case, seed, taught=taught)
        kind = case.parent.model_type
        if kind not in stored and case.parent.to_dict() != case.child.to_dict():
            stored.add(kind)
            _check_stored(make, case, seed)


def _supports(strategy: InheritanceStrategy, case: Case) -> bool:
    with may_not_fail(case, "supports must answer, whatever it is asked about"):
        reason: Any = strategy.supports(case.parent, case.child)
    if reason is None:
        return True
    if not isinstance(reason, str) or not reason.strip() or "\n" in reason:
        raise case.broken(
            "supports must return None, or the reason in one line of words",
            f"it returned {reason!r}",
        )
    return False


def _check_birth(make: Make, case: Case, seed: int, *, taught: bool) -> None:
    newborn, again = born(make, case, seed), born(make, case, seed)
    check_terms(newborn)
    check_repeated(newborn, again)
    child = newborn.grown()
    check_exact(newborn, child)
    check_loss(newborn, child, taught=taught)
    check_on_step(newborn)
    # The rest in float64, where equal numbers are no chance and rounding hides nothing.
    newborn = born(make, case, seed, torch.float64)
    child, found = newborn.grown(), origins(newborn)
    check_exact(newborn, child)
    check_alive(newborn, child, found)


def _check_stored(make: Make, case: Case, seed: int) -> None:
    """Save a parent, load it, let it bear a child, save that: as ``arskit grow`` does, no text."""
    parent, fresh = model_of(case.parent, seed), weights_of(fresh_of(case.child, seed + 1))
    lazy = LazyWeights(fresh, lambda name: fresh[name].clone())
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "parent"), Path(folder, "child")
        before.mkdir()
        after.mkdir()
        save_weights(weights_of(parent), before)
        birth = Birth("child", case.child, lazy, torch.Generator().manual_seed(seed))
        heir = Parent("parent", case.parent, stored_weights(before, case.parent))
        rule = "a stored parent must bear a child, or a ConfigError say why it cannot"
        with may_not_fail(case, rule):
            try:
                answer = make().inherit(heir, birth)
            except ConfigError:
                return
            save_weights(answer.weights, after)
            loaded = stored_weights(after, case.child)
        usual = born(make, case, seed).weights
        differ = [n for n in usual if not torch.equal(loaded[n], usual[n])]
    if differ:
        raise case.broken(
            "a stored parent must bear what the same one in memory does",
            f"{differ[0]} differs once parent and child were saved and loaded",
        )


def _check_families(make: Make, seed: int) -> bool:
    """Check who is born when, and what is made of them; returns whether anyone is taught."""
    growing = [_deep(layers) for layers in (2, 3, 4)]
    refused, taught = [], False
    families = (growing, [growing[0]] * 3, growing[:1])
    for configs in families:
        strategy = make()
        what = f"of {len(configs)} members of {[c.num_hidden_layers for c in configs]} layers"
        try:
            found = descents(strategy, configs)
        except ConfigError as error:
            refused.append(error)
            continue
        except ArsKitError as error:
            raise ConformanceError(
                f"descents must bear everyone once, parents first; {what}, {error}"
            ) from error
        except Exception as error:
            raise ConformanceError(
                f"descents may refuse a family by a ConfigError alone; {what}, it raised {error!r}"
            ) from error
        taught |= any(descent.taught for descent in found)
        if isinstance(strategy, Finishing):
            _check_blends(strategy, configs, seed)
    if len(refused) == len(families):
        raise ConformanceError(
            f"descents must allow some family; every one was refused: {refused[0]}"
        )
    return taught


def _deep(layers: int) -> PretrainedConfig:
    config = EMBEDDED.config("qwen2")
    tree = {**config.to_dict(), "num_hidden_layers": layers}
    tree.pop("layer_types", None)
    return type(config).from_dict(tree)


def _check_blends(strategy: Finishing, configs: Sequence[PretrainedConfig], seed: int) -> None:
    models = [model_of(config, seed + i) for i, config in enumerate(configs)]
    names = [f"m{i}" for i in range(len(models))]
    family = [
        Parent(name, model.config, {n: t.clone() for n, t in weights_of(model).items()})
        for name, model in zip(names, models, strict=True)
    ]
    try:
        blends: list[Any] = [*strategy.finish(family)]
    except Exception as error:
        raise ConformanceError(
            f"finish must not fail; of {len(names)} members it raised {error!r}"
        ) from error
    for made in blends:
        if not isinstance(made, Blend):
            raise ConformanceError(f"finish must make Blends; it made {made!r}")
        if made.name in names:
            raise ConformanceError(
                f"a blend must have a name of its own; {made.name!r} is a member's"
            )
        if not made.sources or not {*made.sources} <= {*names}:
            raise ConformanceError(
                f"a blend must name the members it is made of; {made.name!r} names {made.sources}"
            )
        try:
            set_weights(copy.deepcopy(fresh_of(made.config, seed)), made.weights)
        except ValueError as error:
            raise ConformanceError(
                f"a blend's weights must match its configuration; of {made.name!r}, {error}"
            ) from error
    for parent, model in zip(family, models, strict=True):
        if not all(torch.equal(t, parent.weights[n]) for n, t in weights_of(model).items()):
            raise ConformanceError(f"finish must only read its members; it changed {parent.name}")
