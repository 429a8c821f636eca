"""What engines and exporters are handed and what they promise; part of :mod:`ars_kit.spec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Service:
    """One checkpoint that is to be served.

    Attributes:
        name: what clients call it.
        path: its directory: verified, with safetensors weights and no code of its own.
        digest: sha256 of all that is in it, to keep derived files under.
        cache: the folder for such files; it may not exist yet.
        context: tokens that prompt and answer may have together, at most; None for as many as the
            model was made for.
        slots: sequences to work on at once.
        say: tells the user, in a line, what takes long.
        environment: variables of the process, as the command line found them; an engine that is
            another process is started with them.
    """

    name: str
    path: Path
    digest: str
    cache: Path
    context: int | None
    slots: int
    say: Callable[[str], None]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


class Engine(Protocol):
    """Computes logits for several sequences at once; what is made of them is the server's affair.

    Its methods are called from one thread, in this order: ``prefill`` for a slot that is free,
    ``decode`` for all slots that are taken, together, any number of times, ``release``.

    Attributes:
        context: tokens that a sequence may have.
        slots: sequences it can work on at once, numbered from 0.
    """

    context: int
    slots: int

    def prefill(self, slot: int, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Begin a sequence; returns the logits that follow its last token, shape (vocabulary,)."""
        ...

    def decode(self, tokens: Mapping[int, int]) -> npt.NDArray[np.float32]:
        """Append one token to every sequence, given by slot.

        Returns:
            The logits that follow, shape (sequences, vocabulary), in the order of ``tokens``.
        """
        ...

    def release(self, slot: int) -> None:
        """Forget a sequence; its slot is free."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class Exporter(Protocol):
    """Writes a model in another format. What it wrote is compared with the model, or thrown away.

    Attributes:
        tolerance: how far a logit may be off, against the largest logit or 1; greedy text must then
            be the same. None for a format that rounds more than that: it is judged by its loss on
            held-out text and by the tokens it finds most likely.
    """

    tolerance: float | None

    def export(self, source: Path, target: Path) -> None:
        """Write the model of ``source``, a Hugging Face directory, into the empty ``target``.

        Tokenizer and configurations are copied by the host.

        Raises:
            ConfigError: it cannot be exported, and why.
        """
        ...

    def open(self, target: Path, *, context: int, slots: int) -> Engine:
        """Return an engine that runs what was exported."""
        ...
