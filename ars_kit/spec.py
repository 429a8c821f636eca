"""All that a plugin author imports: the hooks, the protocols, the values they exchange.

A plugin is a module that an ``ars_kit`` entry point names and that implements any of the hooks
below with :data:`hookimpl`. Hooks take no arguments and return offers; nothing of a plugin runs
until a user chooses one of its offers by name.

This module imports the standard library and pluggy; torch and transformers appear in types only, so
that ``arskit --help`` stays quick. Values handed to a plugin are frozen dataclasses: a new field
breaks no plugin. Those about damping are written in :mod:`ars_kit.gates`, those about text in
:mod:`ars_kit.documents`, those about inheritance in :mod:`ars_kit.heredity`, those about serving in
:mod:`ars_kit.deployment`; whoever writes a plugin imports them from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import pluggy

from ars_kit.deployment import Engine, Exporter, Service
from ars_kit.documents import DataSource, Document, Passage
from ars_kit.gates import Damping, DampingGate, GateStack, StepSignal
from ars_kit.heredity import (
    Birth,
    Blend,
    Block,
    Descent,
    Finishing,
    Hint,
    InheritanceStrategy,
    LazyWeights,
    Lesson,
    Loss,
    OnStep,
    Ordering,
    Parent,
    Phase,
    Picks,
    Preserves,
    Seed,
    Span,
    like,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "API_VERSION",
    "PROJECT",
    "Assessment",
    "Birth",
    "Blend",
    "Block",
    "Damping",
    "DampingGate",
    "DataSource",
    "Descent",
    "Document",
    "Engine",
    "Evaluand",
    "Evaluator",
    "Exporter",
    "Finishing",
    "GateStack",
    "Hint",
    "Hooks",
    "InheritanceStrategy",
    "LazyWeights",
    "Lesson",
    "Loss",
    "Offer",
    "OnStep",
    "Ordering",
    "Parent",
    "Passage",
    "Phase",
    "Picks",
    "Preserves",
    "Seed",
    "Service",
    "Span",
    "StepSignal",
    "TrackedRun",
    "Tracker",
    "hookimpl",
    "hookspec",
    "like",
]

API_VERSION = 1
"""Version of this interface. A plugin may declare ``ARSKIT_API = 1``; another one is refused."""

PROJECT = "ars_kit"
"""The pluggy project name and the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Offer(Generic[T_co]):
    """One thing a plugin offers by name.

    Attributes:
        name: what the user types; lower case, digits and dashes.
        summary: one line for ``arskit plugins list``.
        make: called with the chosen settings once the offer is chosen. **Its keyword-only
            parameters are its settings**: their names, annotations and defaults are the schema
            that ``name:key=value`` and ``run.toml`` are checked against, and an ``Args:``
            section in its docstring documents them.
    """

    name: str
    summary: str
    make: Callable[..., T_co]


# --- Evaluation -------------------------------------------------------------------------------


def _tell_nobody(share: float) -> None:
    """Take a share of the work done, and do nothing."""


@dataclass(frozen=True, slots=True)
class Evaluand:
    """A trained member under judgement.

    Attributes:
        name: such as ``"d12"``.
        model: in eval mode, on its device.
        tokenizer: the family's.
        heldout: held-out token windows, each a 1-d int64 array of at most ``context`` + 1 tokens
            (inputs and shifted targets overlap by all but one). Together they are the first tokens
            of the stream, as many as the run judges (``data.heldout_tokens``).
        context: tokens of context the member was trained with.
        bytes_per_token: of the held-out text, to compare across tokenizers.
        batch_size: windows that fit the device at once.
        stream: all held-out tokens, a 1-d array of uint16 or uint32; documents in order.
        passages: where documents begin and end in it.
        progress: call with the share of the work done, 0 to 1, as often as you like.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heldout: Iterable[Any]
    context: int
    bytes_per_token: float
    batch_size: int
    stream: Any
    passages: Sequence[Passage]
    progress: Callable[[float], None] = _tell_nobody


@dataclass(frozen=True, slots=True)
class Assessment:
    """What an evaluator found, where that is more than figures.

    Attributes:
        figures: by name, for ``metrics.json``; None for what could not be measured.
        files: text by file name, kept in the member's directory under ``quality/``.
        notes: by name, how something was measured, for ``notes`` in ``metrics.json``; one called
            ``EVALUATOR:TASK`` is of the figures that begin with ``TASK_``.
    """

    figures: Mapping[str, float | None]
    files: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


class Evaluator(Protocol):
    """Measures a member's quality."""

    def __call__(self, member: Evaluand) -> Mapping[str, float | None] | Assessment:
        """Return figures by name, JSON-ready; None for what could not be measured."""
        ...


# --- Trackers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of a run before its first step.

    Attributes:
        name: the run folder's; a control's stands behind it.
        folder: an empty or earlier directory in the run folder, for files of the tracker's own.
        settings: every setting by ``section.key``: numbers, text, true or false.
        first_step: of the family, from which on steps will be told; more than 0 where a run goes
            on, and then steps from there on may have been told before.
    """

    name: str
    folder: Path
    settings: Mapping[str, bool | int | float | str]
    first_step: int


class Tracker(Protocol):
    """Is told what a run records, in the main process, when the losses are read anyway.

    It gets numbers that are on the host already, every ``run.log_every`` steps, so it makes no step
    wait. One that fails at its start stops the run before it trains; one that fails later is put
    aside, named, and the run goes on.
    """

    def start(self, run: TrackedRun) -> None:
        """Begin, or go on."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take figures by name, all finite, of a step counted over the whole family."""
        ...

    def finish(self) -> None:
        """End; called however the run ended, once it was begun."""
        ...


# --- Hooks -------------------------------------------------------------------------------------


class Hooks:
    """The hook specifications; each is also a heading in ``docs/plugins.md``, held by a test."""

    @hookspec
    def arskit_optimizers(self) -> Sequence[Offer[Optimizer]]:  # type: ignore[empty-body]
        """Base optimizers: ``make(params, *, lr, ...)`` takes torch parameter groups.

        Each group carries ``params``, ``names``, ``role`` (``matrix``, ``embedding`` or
        ``vector``), its own ``lr`` and ``weight_decay``.
        """

    @hookspec
    def arskit_wrappers(self) -> Sequence[Offer[GateStack]]:  # type: ignore[empty-body]
        """Optimizer wrappers such as ``ars``: the named gates they put around a base optimizer."""

    @hookspec
    def arskit_gates(self) -> Sequence[Offer[DampingGate]]:  # type: ignore[empty-body]
        """Damping gates, added with ``--gate NAME:key=value``."""

    @hookspec
    def arskit_strategies(self) -> Sequence[Offer[InheritanceStrategy]]:  # type: ignore[empty-body]
        """Inheritance strategies, chosen with ``--strategy NAME:key=value``."""

    @hookspec
    def arskit_evaluators(self) -> Sequence[Offer[Evaluator]]:  # type: ignore[empty-body]
        """Evaluators, chosen with ``--eval NAME:key=value``."""

    @hookspec
    def arskit_data_sources(self) -> Sequence[Offer[DataSource]]:  # type: ignore[empty-body]
        """Data sources, chosen with ``--data NAME:key=value`` or ``--data PATH``."""

    @hookspec
    def arskit_servers(self) -> Sequence[Offer[Engine]]:  # type: ignore[empty-body]
        """Serving engines, chosen with ``--engine NAME:key=value``: ``make(service, ...)``.

        ``service`` is a :class:`Service`. One that the engine cannot serve is a ``ConfigError``
        that says why; ``--engine auto`` then asks the next engine.
        """

    @hookspec
    def arskit_exporters(self) -> Sequence[Offer[Exporter]]:  # type: ignore[empty-body]
        """Export formats, chosen with ``--format NAME:key=value``."""

    @hookspec
    def arskit_trackers(self) -> Sequence[Offer[Tracker]]:  # type: ignore[empty-body]
        """Trackers, chosen with ``--tracker NAME:key=value``."""
