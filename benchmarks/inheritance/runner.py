"""One run, and many: ``arskit run`` on a layout, judged on both halves of the held-out text."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from ars_kit.curve import heldout_nats
from ars_kit.data import Corpus
from ars_kit.history import read_history
from ars_kit.host import Host
from ars_kit.models import load_member
from ars_kit.plan import pick_device, plan_run
from ars_kit.resolving import resolve
from ars_kit.runs import execute
from ars_kit.settings import Settings
from ars_kit.store import RunFolder
from ars_kit.texts import open_corpus
from ars_kit.tokens import heldout_windows
from inheritance.arms import ARMS
from inheritance.scale import SCALES, Scale
from inheritance.text import HELD_OUT, Text

PROTOCOL = 1
"""Raise it with any change to what a run computes: older results then count no more."""
DECAY = 0.3
"""Share of a member's steps in which its learning rate falls, where nothing else is said."""
CURVE = 60
"""Points of a member's training curve that are kept."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Key:
    """All that a run's result depends on.

    Attributes:
        kappa: the family's budget, in multiples of the largest member's scratch cost.
        members: from which of the arm's members to which; None is all. Tuning takes fewer.
        text: digest of the documents.
        decay: share of every member's steps in which its learning rate falls to zero.
    """

    scale: str
    arm: str
    kappa: float
    seed: int
    lr: float
    init: float
    optimizer: str
    text: str
    members: tuple[int, int] | None = None
    torch: str = torch.__version__
    protocol: int = PROTOCOL
    decay: float = DECAY


@dataclass(frozen=True, slots=True)
class Born:
    """What became of a member.

    Attributes:
        size: its place in the family, 0 for the smallest.
        choosing: held-out loss on the half that choices are made on, nats per token.
        reported: on the other half.
        flops: that it added to the bill.
        lineage_flops: that its weights cost, ancestors included.
        seconds: of training.
        curve: (FLOPs of its own training so far, training loss) at some steps.
    """

    size: int
    choosing: float
    reported: float
    flops: float
    lineage_flops: float
    seconds: float
    curve: tuple[tuple[float, float], ...]


Family = tuple[Born, ...]


class Book:
    """Results in a JSONL file, by their settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.families: dict[Key, Family] = {}
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                row = json.loads(line)
                members = row["key"].pop("members")
                key = Key(**row["key"], members=members and tuple(members))
                self.families[key] = tuple(
                    Born(**{**b, "curve": tuple(map(tuple, b["curve"]))}) for b in row["family"]
                )

    def add(self, key: Key, family: Family) -> None:
        """Append a result."""
        self.families[key] = family
        row = {"key": asdict(key), "family": [asdict(b) for b in family]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Quiet:
    """Looks on and says nothing."""

    def steps(self, member: str, done: int, rows: list[dict[str, Any]], meter: object) -> None:
        """Hear of steps."""

    def went_back(self, member: str, event: Mapping[str, Any]) -> None:
        """Hear that steps were undone."""

    def judged(self, member: str, point: Mapping[str, Any]) -> None:
        """Hear of a point of a curve."""

    def aside(self, line: str) -> None:
        """Hear of something that is done otherwise."""

    def born(self, member: str, facts: Mapping[str, Any]) -> None:
        """Hear of a birth."""

    def finished(self, metrics: Mapping[str, Any]) -> None:
        """Hear of a member."""


def settings_of(key: Key, scale: Scale, text: Text, device: str) -> Settings:
    """Return what ``arskit run`` is given."""
    arm = ARMS[key.arm]
    roster = arm.layout(scale, key.kappa)[slice(*(key.members or (None,)))]
    return resolve(
        {
            "family.members": "; ".join(map(str, roster)),
            "family.strategy": arm.strategy,
            "family.seed": key.seed,
            "family.vocab_size": scale.vocabulary,
            "family.head_dim": scale.head_dim,
            "family.init": key.init,
            "data.source": str(text.path),
            "data.heldout_fraction": HELD_OUT,
            "data.heldout_tokens": 4096,  # both halves are judged whole, afterwards
            "data.sequence_length": scale.context,
            "train.batch_size": scale.batch,
            "train.lr": key.lr,
            "train.lr_vectors": key.lr,
            "train.decay_fraction": key.decay,
            "train.device": device,
            "optimizer.name": key.optimizer,
            "run.save_every": 10_000,
        },
        {},
    )


def run_one(key: Key, text: Text, work: Path, device: str) -> Family:
    """Train and judge one arm's family; nothing of it stays on disk."""
    scale, host = SCALES[key.scale], Host.installed()
    settings = settings_of(key, scale, text, device)
    out = work / f"run-{abs(hash(key)):x}"
    shutil.rmtree(out, ignore_errors=True)
    plan = plan_run(settings, host)
    try:
        metrics, _ = execute(plan, host, out, work / "cache", watcher=Quiet())
        corpus = open_corpus(settings, host, work / "cache")
        sizes = {m.name: i for i, m in enumerate(scale.members)}
        return tuple(
            _born(m, sizes[m["model_id"]], RunFolder(out), corpus, scale, device) for m in metrics
        )
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _born(
    metrics: Mapping[str, Any],
    size: int,
    folder: RunFolder,
    corpus: Corpus,
    scale: Scale,
    device: str,
) -> Born:
    name = metrics["model_id"]
    model = load_member(folder.path / name).to(pick_device(device))  # type: ignore[arg-type]
    losses = halves(model, corpus, scale)
    rows = read_history(folder.path / name / "history.jsonl")
    each = metrics["total_flops"] / max(1, len(rows))
    stride = max(1, len(rows) // CURVE)
    curve = tuple(
        (each * (i + 1), sum(r["loss"] for r in rows[i - stride + 1 : i + 1]) / stride)
        for i in range(stride - 1, len(rows), stride)
    )
    return Born(
        size=size,
        choosing=losses[0],
        reported=losses[1],
        flops=metrics["total_flops"],
        lineage_flops=metrics["lineage_flops"],
        seconds=metrics["training_time"],
        curve=curve,
    )


def halves(model: Any, corpus: Corpus, scale: Scale) -> tuple[float, float]:
    """Return the mean loss over the first and the second half of the held-out text."""
    windows = np.stack(
        [w for w in heldout_windows(corpus.heldout, scale.context) if len(w) > scale.context]
    )
    middle = len(windows) // 2
    first, second = (
        heldout_nats(model, part, 32, model.device) / part[:, 1:].size
        for part in (windows[:middle], windows[middle:])
    )
    return first, second


def run_all(
    keys: Sequence[Key],
    text: Text,
    book: Book,
    work: Path,
    tell: Tell,
    *,
    jobs: int = 1,
    device: str = "cpu",
) -> None:
    """Run what the book does not hold yet, in the order given.

    Args:
        keys: the runs, all on one text.
        text: theirs.
        book: where results are kept.
        work: a folder for runs under way and prepared text.
        tell: is told of each result in one line.
        jobs: processes, of one thread each.
        device: as ``--device`` takes it.
    """
    todo = [key for key in keys if key not in book.families]
    if len(todo) < len(keys):
        tell(f"{len(keys) - len(todo)} of {len(keys)} runs are done already")
    begun = time.perf_counter()
    for i, (key, family) in enumerate(_results(todo, text, work, device, jobs), start=1):
        book.add(key, family)
        last = family[-1]
        name = f"{key.arm} kappa {key.kappa:g} seed {key.seed} lr {key.lr:g} init {key.init:g}"
        tell(
            f"{i}/{len(todo)} {name}: {last.reported:.4f} "
            f"({sum(b.seconds for b in family):.0f} s, {time.perf_counter() - begun:.0f} in all)"
        )


def _results(
    todo: Sequence[Key], text: Text, work: Path, device: str, jobs: int
) -> Iterator[tuple[Key, Family]]:
    if jobs == 1:
        _begin(text, work, device)
        yield from map(_work, todo)
        return
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(text, work, device)
    ) as pool:
        yield from pool.map(_work, todo)


_SHARED: dict[str, Any] = {}


def _begin(text: Text, work: Path, device: str) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    _SHARED.update(text=text, work=work, device=device)


def _work(key: Key) -> tuple[Key, Family]:
    return key, run_one(key, _SHARED["text"], _SHARED["work"], _SHARED["device"])
