"""One run, and many: each result is appended to a file under its settings and never run again."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ars_kit.models import parameter_groups
from stability.methods import WEIGHT_DECAY, Method, Stepper, installed_methods
from stability.provocations import PROVOCATIONS, Moment, Provocation
from stability.task import (
    Size,
    Text,
    drawn_batch,
    heldout_loss,
    learning_rate,
    loss_of,
    make_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROTOCOL = 1
"""Raise it with any change to what a run computes: older results then count no more."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Key:
    """All that a run's result depends on.

    Attributes:
        model: name of its size; ``steps`` may differ from the size's own.
        code: of the method.
        text: digest of the text.
        lr: base learning rate, before the provocation's factor.
        device: the kind that trains; results of older benchmarks name none, and are of a CPU.
    """

    model: str
    steps: int
    method: str
    code: str
    provocation: str
    seed: int
    lr: float
    text: str
    torch: str
    protocol: int = PROTOCOL
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run.

    Attributes:
        score: what it is judged by, in nats per byte (held-out loss, but for the full batch);
            None where it is dead.
        died: step at which weights or loss ceased to be finite; None where it lived.
        peak: greatest training loss after warm-up.
        seconds: wall-clock time.
    """

    score: float | None
    died: int | None
    peak: float
    seconds: float


def run_one(key: Key, size: Size, text: Text, method: Method) -> Outcome:
    """Train and judge one model."""
    provocation = PROVOCATIONS[key.provocation]
    model = make_model(size, key.seed).to(torch.device(key.device))
    groups = parameter_groups(
        model, lr=key.lr, weight_decay=WEIGHT_DECAY, lr_width=None, lr_vectors=key.lr
    )
    stepper = method.make(groups)
    params = list(model.parameters())
    begun = time.perf_counter()
    losses: list[float] = []
    died = None
    for step in range(size.steps):
        losses.append(_step(model, stepper, size, text, key, step))
        if not math.isfinite(losses[-1]) and not _finite(params):
            died = step
            break
    score = None
    if died is None:
        score = _judge(model, size, text, provocation, losses)
        if not math.isfinite(score):
            score, died = None, size.steps
    peak = max((x for x in losses[size.warmup :] if math.isfinite(x)), default=math.nan)
    return Outcome(score, died, peak, time.perf_counter() - begun)


def _step(
    model: PreTrainedModel,
    stepper: Stepper,
    size: Size,
    text: Text,
    key: Key,
    step: int,
) -> float:
    provocation = PROVOCATIONS[key.provocation]
    moment = Moment(key.seed, step, size.steps, size.calm)
    batch = drawn_batch(size, text, key.seed, 0 if provocation.full_batch else step)
    if provocation.alter is not None:
        batch = provocation.alter(moment, batch)
    loss = loss_of(model, batch)
    loss.backward()
    if provocation.strike is not None:
        with torch.no_grad():
            provocation.strike(moment, [p.grad for p in model.parameters() if p.grad is not None])
    if stepper.told is not None:
        stepper.told.ruined = provocation.ruins is not None and provocation.ruins(moment)
    lr = learning_rate(size, key.lr * provocation.lr, step, constant=provocation.full_batch)
    stepper.step(loss.detach(), lr)
    for p in model.parameters():
        p.grad = None
    return loss.item()


def _finite(params: Iterable[torch.Tensor]) -> bool:
    return all(bool(p.isfinite().all()) for p in params)


def _judge(
    model: PreTrainedModel,
    size: Size,
    text: Text,
    provocation: Provocation,
    losses: Sequence[float],
) -> float:
    if provocation.full_batch:
        return statistics.fmean(losses[-max(1, size.steps // 6) :])
    return heldout_loss(model, size, text, reverse=provocation.reverse)


class Book:
    """Results in a JSONL file, by their settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[Key, Outcome] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.outcomes[Key(**row["key"])] = Outcome(**row["outcome"])

    def code_of(self, method: str, code: str, model: str, steps: int, device: str = "cpu") -> str:
        """Return the code that most of a method's results have; ``code`` where there are none."""
        kind = (method, model, steps, PROTOCOL, device)
        found = Counter(
            k.code
            for k in self.outcomes
            if (k.method, k.model, k.steps, k.protocol, k.device) == kind
        )
        return max(found, key=lambda c: (found[c], c == code)) if found else code

    def compared(self, method: str, old: str, new: str) -> tuple[int, int]:
        """Return how many runs have the same score under two codes, and how many have both."""
        pairs = [
            (outcome.score, self.outcomes[replace(key, code=new)].score)
            for key, outcome in self.outcomes.items()
            if (key.method, key.code) == (method, old) and replace(key, code=new) in self.outcomes
        ]
        return sum(a == b for a, b in pairs), len(pairs)

    def add(self, key: Key, outcome: Outcome) -> None:
        """Append a result."""
        self.outcomes[key] = outcome
        row = {"key": asdict(key), "outcome": asdict(outcome)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def run_all(
    keys: Sequence[Key], size: Size, text: Text, book: Book, tell: Tell, *, jobs: int = 1
) -> None:
    """Run what the book does not hold yet, in the order given.

    Args:
        keys: the runs; all of one size and one text.
        size: theirs.
        text: theirs.
        book: where results are kept.
        tell: is told of each result in one line.
        jobs: processes, of one thread each.
    """
    todo = [key for key in keys if key not in book.outcomes]
    if len(todo) < len(keys):
        tell(f"{len(keys) - len(todo)} of {len(keys)} runs are done already")
    for i, (key, outcome) in enumerate(_results(todo, size, text, jobs), start=1):
        book.add(key, outcome)
        score = f"dead at {outcome.died}" if outcome.score is None else f"{outcome.score:.4f}"
        name = f"{key.provocation} {key.method} seed {key.seed} lr {key.lr:g}"
        tell(f"{i}/{len(todo)} {name}: {score} ({outcome.seconds:.1f} s)")


def _results(
    todo: Sequence[Key], size: Size, text: Text, jobs: int
) -> Iterator[tuple[Key, Outcome]]:
    if jobs == 1:
        _begin(size, text)
        yield from map(_work, todo)
        return
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(size, text)
    ) as pool:
        yield from pool.map(_work, todo)


_SHARED: dict[str, Any] = {}
"""What every run of a process shares, so that the text travels to it once."""


def _begin(size: Size, text: Text) -> None:
    torch.set_num_threads(1)
    methods: Mapping[str, Method] = installed_methods()[0]
    _SHARED.update(size=size, text=text, methods=methods)


def _work(key: Key) -> tuple[Key, Outcome]:
    method: Method = _SHARED["methods"][key.method]
    return key, run_one(key, _SHARED["size"], _SHARED["text"], method)
