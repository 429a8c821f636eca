"""A birth: the parent is opened, the strategy asked, its promise checked, its cost kept.

The result depends on the committed parent and the run's seed alone, so a member that was
interrupted is born the same again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ars_kit.errors import ArsKitError, IntegrityError, PluginError
from ars_kit.factors import dequantised
from ars_kit.inherit import broken_term, derive_opt_state, inherited_share
from ars_kit.ledger import counting
from ars_kit.lora import WHOLE
from ars_kit.models import (
    build,
    load_base,
    load_member,
    logits_difference,
    set_weights,
    weights_of,
)
from ars_kit.outcome import read_metrics
from ars_kit.spec import Birth, InheritanceStrategy, Parent, Seed
from ars_kit.stored import stored_weights
from ars_kit.tokens import Batches, heldout_windows
from ars_kit.trainee import branch_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ars_kit.data import Corpus
    from ars_kit.host import Host
    from ars_kit.members import MemberPlan
    from ars_kit.plan import RunPlan
    from ars_kit.store import RunFolder

EXACT = 1e-4
"""Largest change of a logit, against the largest logit, that still counts as exact in float32."""


@dataclass(slots=True)
class Newborn:
    """A member at its birth.

    Attributes:
        facts: what is known of the birth, JSON-ready; ``birth`` in metrics.json.
        seed: what the strategy gave; nothing for a member from fresh weights.
        opt_state: its first moments by parameter name; None: fresh ones.
        parent: the parent's model, for a teacher; None where there is no parent.
        flops: what its parent's weights had cost up to this point.
        tokens: likewise, that they were trained on.
    """

    model: PreTrainedModel
    facts: dict[str, Any]
    seed: Seed = field(default_factory=lambda: Seed({}))
    opt_state: Mapping[str, Any] | None = None
    parent: PreTrainedModel | None = None
    flops: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Cradle:
    """What a birth needs of the run.

    Attributes:
        corpus: the run's text, which every member is judged on.
        texts: each text that a member trains on, by its source as it was written.
    """

    plan: RunPlan
    host: Host
    folder: RunFolder
    corpus: Corpus
    texts: Mapping[str, Corpus]
    strategy: InheritanceStrategy
    device: torch.device

    @property
    def strategy_name(self) -> str:
        """As the user chose it."""
        return self.plan.settings.family.strategy.name

    @property
    def who(self) -> str:
        """The strategy and the plugin that offers it, for complaints."""
        plugin = self.host.listing("strategies", self.strategy_name).plugin
        return f"inheritance strategy {self.strategy_name!r} of plugin {plugin}"

    def relative(self, member: MemberPlan) -> str | None:
        """Return the parent's name where it is a member, not a pretrained base."""
        names = {m.name for m in self.plan.members}
        return member.parent if member.parent in names else None


def bear(cradle: Cradle, member: MemberPlan) -> Newborn:
    """Return a member as its strategy makes it.

    Raises:
        PluginError: the strategy failed, or made weights that do not fit, or broke its promise.
    """
    number = member_seed(cradle.plan.settings.family.seed, member.name)
    model = build(member.config, seed=number)
    facts: dict[str, Any] = {"parent": member.parent, "inherited_share": 0.0, "setup_flops": 0.0}
    if member.parent is None:
        return Newborn(model, facts)
    parent, parent_model = _parent(cradle, member)
    fresh = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    birth = Birth(
        name=member.name,
        config=member.config,
        fresh=fresh,
        rng=torch.Generator().manual_seed(number),
        steps=member.steps,
        flops=member.flops,
        heirs=sum(m.parent == member.name for m in cradle.plan.members),
        windows=lambda n: _windows(cradle, member, n),
    )
    with counting() as account:
        seed = ask(cradle.host, cradle.strategy_name, cradle.strategy, parent, birth)
        plant(model, seed.weights, cradle.who, member.name)
    shapes = {name: tensor.shape for name, tensor in fresh.items()}
    opt_state = None
    # Moments are of whole weights, and with adapters those do not move.
    whole = cradle.plan.settings.train.trainable == WHOLE
    said = f"in what its seed says of {member.name}"
    with cradle.host.blaming("strategies", cradle.strategy_name, said):
        _check_terms(cradle, member, seed, fresh)
        share = inherited_share(seed.provenance, shapes)
        if whole and seed.opt_state == "derive" and parent.opt_state:
            opt_state = derive_opt_state(parent.opt_state, seed.provenance, shapes)
    change = _check_promise(cradle, member, seed, parent_model, model)
    facts |= {
        "preserves": seed.preserves,
        "birth_logits_difference": change,
        "inherited_share": share,
        "optimizer_state": "carried" if opt_state else "fresh",
        "phase": parent.phase,
        "replay": seed.replay if member.before else 0.0,
        "note": seed.note,
        "setup_flops": account.flops,
    }
    return Newborn(model, facts, seed, opt_state, parent_model, parent.flops, parent.tokens)


def ask(host: Host, name: str, strategy: InheritanceStrategy, parent: Parent, birth: Birth) -> Seed:
    """Return the seed that a strategy makes.

    Raises:
        ArsKitError: the strategy says why it cannot.
        PluginError: it failed, or returned something else.
    """
    with host.blaming("strategies", name, f"at the birth of {birth.name}"):
        seed: Any = strategy.inherit(parent, birth)
    if not isinstance(seed, Seed):
        raise PluginError(f"inheritance strategy {name!r} bore a {type(seed).__name__}, no Seed")
    return seed


def plant(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], who: str, child: str
) -> None:
    """Copy a strategy's weights into a model.

    Args:
        model: the child.
        weights: by Hugging Face name.
        who: made them, for complaints.
        child: the child's name.

    Raises:
        PluginError: they do not fit, or could not be made.
    """
    try:
        set_weights(model, weights)
    except ArsKitError:
        raise
    except Exception as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise PluginError(f"{who} bore a bad {child}: {reason}") from error


def exactness(who: str, child: str, parent: str, change: float, bound: float) -> PluginError:
    """Return the complaint about a promise that was not kept, with both numbers."""
    return PluginError(
        f"{who} promised that {child} computes what {parent} does, but a logit differs by "
        f"{change:.3g} (allowed: {bound:.3g})"
    )


def member_seed(seed: int, name: str) -> int:
    """Return the seed of one member's draws, so that no two members' fresh weights are alike."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits without a sign


def _check_terms(cradle: Cradle, member: MemberPlan, seed: Seed, fresh: Mapping[str, Any]) -> None:
    unknown = sorted(seed.hints.keys() - fresh.keys())
    if unknown:
        raise _broke(cradle, f"gave a hint about {unknown[0]}, which {member.name} has not")
    if broken := broken_term(seed):
        raise _broke(cradle, f"bore {member.name} against the rules: {'; '.join(broken)}")
    if seed.decay_fraction is not None and member.branch is not None:
        raise _broke(
            cradle, f"moved the decay of {member.name}, before which an heir is planned to leave it"
        )


def _check_promise(
    cradle: Cradle,
    member: MemberPlan,
    seed: Seed,
    parent: PreTrainedModel,
    child: PreTrainedModel,
) -> float:
    """Return the largest change of a logit, if the strategy may make one of that size."""
    length = min(64, cradle.plan.settings.data.sequence_length)
    window = next(heldout_windows(cradle.corpus.heldout, length))
    probe = torch.from_numpy(window[:length])[None]
    change = logits_difference(parent, child, probe)
    with torch.no_grad():
        scale = float(parent(input_ids=probe).logits.abs().max())
    bound = EXACT * max(1.0, scale)
    if seed.preserves == "exact" and not change <= bound:
        assert member.parent is not None  # noqa: S101 -- the caller has looked
        raise exactness(cradle.who, member.name, member.parent, change, bound)
    return change


def _windows(cradle: Cradle, member: MemberPlan, n: int) -> torch.Tensor:
    settings = cradle.plan.settings
    data, end = member.data, member.start
    parent = next((m for m in cradle.plan.members if m.name == member.parent), None)
    if parent is not None and parent.data != data:
        data, end = parent.data, dict(member.before)[parent.data]
    read = Batches(
        cradle.texts[data].train,
        sequence_length=settings.data.sequence_length,
        batch_size=n,
        seed=settings.family.seed,
        start=max(0, end - n),
    )
    return torch.from_numpy(read.batch(0))


def _parent(cradle: Cradle, member: MemberPlan) -> tuple[Parent, PreTrainedModel]:
    assert member.parent is not None  # noqa: S101 -- the caller has looked
    if cradle.relative(member) is None:
        model = load_base(member.parent)
        weights = weights_of(model)
        runnable = _runnable(cradle, model)
        return Parent(member.parent, model.config, weights, model=runnable), model
    folder, name = cradle.folder, member.parent
    model = load_member(folder.open_member(name))
    metrics = read_metrics(folder, name)
    stable = member.phase == "stable"
    state = folder.states(branch_of(name) if stable else name).load()
    tokens, flops = metrics["lineage_tokens"], metrics["lineage_flops"]
    if stable:
        if state is None:
            raise IntegrityError(
                f"the state of {name} from before its learning rate fell is gone; start anew with "
                "--restart"
            )
        _, tree = state
        set_weights(model, tree["weights"])
        # By tokens, not steps: what was undone before the branch has been paid for as well.
        tokens -= metrics["tokens"] - tree["meter"]["tokens"]
        flops -= metrics["flops"] * (1 - tree["meter"]["tokens"] / metrics["tokens"])
        flops -= metrics["loss_flops"] - tree["meter"]["loss_flops"]
    parent = Parent(
        name=name,
        config=model.config,
        weights=weights_of(model),
        opt_state=_by_name(state[1]["optimizer"]) if state else None,
        heldout_loss=metrics.get("heldout_loss"),
        phase=member.phase,
        tokens=tokens,
        flops=flops,
        lineage=_lineage(folder, name),
        model=_runnable(cradle, model),
    )
    return parent, model


def finished(cradle: Cradle, member: MemberPlan) -> Parent:
    """Return a committed member as a parent whose weights are read one at a time."""
    path = cradle.folder.open_member(member.name)
    metrics = read_metrics(cradle.folder, member.name)
    return Parent(
        name=member.name,
        config=member.config,
        weights=stored_weights(path, member.config),
        heldout_loss=metrics.get("heldout_loss"),
        tokens=metrics["lineage_tokens"],
        flops=metrics["lineage_flops"],
        lineage=_lineage(cradle.folder, member.name),
    )


def _lineage(folder: RunFolder, name: str | None) -> tuple[str, ...]:
    entries = {e.member: e for e in folder.lineage()}
    hashes = []
    while name in entries:
        hashes.append(entries[name].manifest)
        name = entries[name].parent
    return tuple(hashes)


def _runnable(cradle: Cradle, model: PreTrainedModel) -> Callable[[], PreTrainedModel]:
    def copy() -> PreTrainedModel:
        twin = build(model.config, seed=0)
        set_weights(twin, weights_of(model))
        twin.to(cradle.device)  # type: ignore[arg-type]
        twin.eval()
        return twin

    return copy


def _by_name(optimizer: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Return a saved optimizer's tensors by parameter name, those of few bits in float32."""
    found = {}
    for group in optimizer["param_groups"]:
        for name, index in zip(group["names"], group["params"], strict=True):
            entry = optimizer["state"].get(index, {})
            tensors = {k: v for k, v in entry.items() if isinstance(v, torch.Tensor)}
            found[name] = {k: dequantised(v) for k, v in tensors.items()}
    return found


def _broke(cradle: Cradle, how: str) -> PluginError:
    return PluginError(f"{cradle.who} {how}")
