"""What a member takes from another, as values: what strategies and the host hand each other.

Plugin authors import all of it from :mod:`ars_kit.spec`; docs/strategies.md tells the story.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

Preserves = Literal["exact", "approx", "none"]
Phase = Literal["cooled", "stable"]
"""Of a member's training: its end, or the last step before ``wsd`` let the learning rate fall."""

Span = tuple[int, int, int]
"""``(start, stop, step)`` along one dimension."""


@dataclass(frozen=True, slots=True)
class Picks:
    """Places along one dimension, one by one, where no :data:`Span` names them."""

    at: tuple[int, ...]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.at)


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of a child tensor that is ``coefficient`` times a rectangle of a parent tensor.

    Attributes:
        parent: name of the parent's tensor.
        child_index: where it lands, one ``(start, stop, step)`` a dimension.
        parent_index: where it comes from, same extents: ``(start, stop, step)``, or ``Picks``.
        coefficient: what it was multiplied by.
    """

    parent: str
    child_index: tuple[Span, ...]
    parent_index: tuple[Span | Picks, ...]
    coefficient: float = 1.0

    @property
    def target(self) -> tuple[slice, ...]:
        """What to index the child's tensor with."""
        return tuple(slice(*span) for span in self.child_index)

    def source(self, tensor: Tensor) -> Tensor:
        """Return the parent's rectangle as it is there, a view wherever that is possible."""
        spans = tuple(
            slice(None) if isinstance(index, Picks) else slice(*index)
            for index in self.parent_index
        )
        found = tensor[spans]
        for dimension, index in enumerate(self.parent_index):
            if isinstance(index, Picks):
                before: list[Any] = [slice(None)] * dimension
                found = found[(*before, list(index.at))]
        return found


class LazyWeights(Mapping[str, "Tensor"]):
    """Weights that are read or made one at a time, whenever they are asked for.

    Args:
        like: tensors, of the meta device as a rule, that say each one's shape and precision.
        read: returns one by name; the caller may change what it gets.
    """

    def __init__(self, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.like = like
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        """Read or make one tensor."""
        if name not in self.like:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self.like

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.like)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self.like)


def like(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor of the shape and precision of ``weights[name]``, reading none if it can."""
    return weights.like[name] if isinstance(weights, LazyWeights) else weights[name]


@dataclass(frozen=True, slots=True)
class Parent:
    """A trained member as its heir sees it. Read-only.

    Attributes:
        name: such as ``"d10"``, or the base's id.
        config: its transformers configuration.
        weights: its tensors by Hugging Face name; a tied head appears once, as the embedding.
        opt_state: the base optimizer's state by parameter name, e.g.
            ``{"model.norm.weight": {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}}``; or None.
        heldout_loss: nats per token of the finished member, where it was measured.
        phase: ``cooled``, its finished weights; ``stable``, those it had before the learning rate
            fell.
        tokens: that these weights and their ancestors were trained on.
        flops: that these weights and their ancestors cost.
        lineage: sha256 of its manifest and of each ancestor's, back to the root.
        model: returns a new, runnable copy of it in eval mode, on the run's device. What is
            computed with it while a member is born is counted in that member's ``setup_flops``.
    """

    name: str
    config: PretrainedConfig
    weights: Mapping[str, Tensor]
    opt_state: Mapping[str, Mapping[str, Tensor]] | None = None
    heldout_loss: float | None = None
    phase: Phase = "cooled"
    tokens: int = 0
    flops: float = 0.0
    lineage: tuple[str, ...] = ()
    model: Callable[[], PreTrainedModel] | None = None


@dataclass(frozen=True, slots=True)
class Birth:
    """What a strategy is told about the child it should seed.

    Attributes:
        name: such as ``"d11"``.
        config: the child's configuration; its shape is fixed by the plan.
        fresh: the child's weights as a fresh, seeded initialisation would have them; the source
            of every new parameter, so that initialisation stays the host's affair.
        rng: the only randomness a strategy may use; seeded by the run.
        steps: optimizer steps that the child will train for.
        flops: that those steps will cost.
        heirs: members that are to be born from the child; 0 for the last of a chain.
        windows: returns that many windows of training text, the last that the lineage has read:
            int64, shape (n, sequence_length + 1), inputs and shifted targets overlapping. None
            where there is no text, as in ``arskit grow``.
    """

    name: str
    config: PretrainedConfig
    fresh: Mapping[str, Tensor]
    rng: torch.Generator
    steps: int = 0
    flops: float = 0.0
    heirs: int = 0
    windows: Callable[[int], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Hint:
    """How one tensor of a newborn wants to be trained otherwise than the rest.

    Attributes:
        lr: multiplies its learning rate.
        weight_decay: multiplies its weight decay.
        decay_from: optimizer steps before its weight decay begins.
        frozen_until: optimizer steps before it is changed at all.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    decay_from: int = 0
    frozen_until: int = 0


@dataclass(frozen=True, slots=True)
class Lesson:
    """One micro-batch as a strategy's loss sees it. Every tensor lies on the training device.

    Attributes:
        step: optimizer steps done before this one.
        inputs: token ids, int64, shape (sequences, length).
        targets: the tokens to be predicted, same shape.
        logits: of the member in training, shape (sequences, length, vocabulary), with their graph.
        loss: 0-d; mean cross-entropy of this micro-batch in nats per token, with its graph.
        weights: the member's live parameters by Hugging Face name; beside adapters what they would
            be merged to, made when asked for.
        teacher: where the descent says ``taught``: the parent's logits for ``inputs``, without a
            graph. Run and counted by the host.
    """

    step: int
    inputs: Tensor
    targets: Tensor
    logits: Tensor
    loss: Tensor
    weights: Mapping[str, Tensor]
    teacher: Tensor | None = None


Loss = Callable[[Lesson], "Tensor"]
"""Returns the 0-d objective to minimise instead of the lesson's ``loss``. It must depend on the
lesson alone, so that a run that was interrupted goes on exactly, and must not wait for the device.
Its matrix products are counted three times, as forward and backward."""

OnStep = Callable[[int, Mapping[str, "Tensor"]], None]
"""Told the optimizer steps done and the live parameters after each step; may change them in place,
without a graph and without waiting for the device."""


@dataclass(frozen=True, slots=True)
class Seed:
    """What a strategy hands a newborn member.

    Attributes:
        weights: match the child's configuration exactly; a tied head appears once. They may be
            ``LazyWeights``.
        provenance: for each child tensor the blocks that were inherited, none where all of it is
            new; what no block covers is new. The host derives optimizer state from it and counts
            what was inherited.
        preserves: what the strategy promises about the child's logits against the parent's;
            ``exact`` is checked by the host at birth.
        opt_state: ``derive`` carries the parent's moments along the provenance, ``reset`` starts
            them at zero.
        rewarm_steps: optimizer steps over which the learning rate climbs back at birth; None for
            the run's warm-up.
        start_lr: where that climb begins, as a share of the peak.
        decay_fraction: share of the steps in which ``wsd`` decays; None for the run's.
        hints: by child tensor; those not named train as the run says.
        loss: takes the place of the cross-entropy; see ``Lesson``.
        on_step: called after each optimizer step.
        replay: share of the child's sequences, in [0, 1), that are read again from the texts that
            its lineage was trained on and it is not. Nothing where there are none.
        note: what became of the parent, in a few words for the report.
    """

    weights: Mapping[str, Tensor]
    provenance: Mapping[str, Sequence[Block]] = field(default_factory=dict)
    preserves: Preserves = "none"
    opt_state: Literal["derive", "reset"] = "reset"
    rewarm_steps: int | None = None
    start_lr: float = 0.0
    decay_fraction: float | None = None
    hints: Mapping[str, Hint] = field(default_factory=dict)
    loss: Loss | None = None
    on_step: OnStep | None = None
    replay: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Descent:
    """Where one member comes from.

    Attributes:
        member: its place among the family's configurations, from 0.
        parent: the place of the member it is born from; None: the base, or fresh weights.
        phase: of the parent's training that it continues.
        taught: the parent's weights stay in memory as a teacher, see ``Lesson``.
    """

    member: int
    parent: int | None
    phase: Phase = "cooled"
    taught: bool = False


@dataclass(frozen=True, slots=True)
class Blend:
    """One more member, made of finished ones without training.

    Attributes:
        name: what it will be called.
        config: its configuration.
        weights: match it exactly; they may be ``LazyWeights``.
        sources: names of the members it is made of.
        note: how it was made, in a few words for the report.
    """

    name: str
    config: PretrainedConfig
    weights: Mapping[str, Tensor]
    sources: tuple[str, ...]
    note: str = ""


class InheritanceStrategy(Protocol):
    """Decides what a member takes from its predecessor.

    It may be an :class:`Ordering` and a :class:`Finishing` too.
    ``ars_kit.testing.check_strategy`` holds it to every rule.
    """

    inherits: bool
    """False: members are independent of each other (the control); ``inherit`` is not called
    unless a pretrained base was named."""

    def supports(self, parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
        """Return why this pair cannot be inherited, in words, or None if it can."""
        ...

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the child's first weights."""
        ...


@runtime_checkable
class Ordering(Protocol):
    """A strategy that says itself who is born when, and from whom."""

    def descents(self, configs: Sequence[PretrainedConfig]) -> Sequence[Descent]:
        """Return every member's descent in order of birth, a parent before its heirs.

        Asked while the run is planned; without it, each member is born from the one before.

        Raises:
            ConfigError: such a family cannot be had under this strategy, and why.
        """
        ...


@runtime_checkable
class Finishing(Protocol):
    """A strategy that makes more members of the finished ones.

    One that knows beforehand what it will call them has an attribute ``makes``, a tuple of these
    names: then a family with a member of such a name is refused before it is trained.
    """

    def finish(self, members: Sequence[Parent]) -> Iterable[Blend]:
        """Return further members, made of the family's cooled ones, in order of birth."""
        ...
