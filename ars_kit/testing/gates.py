"""Does a damping gate keep the promises that the training loop relies on?"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ars_kit.spec import Damping, DampingGate, StepSignal
from ars_kit.state import pack, unpack
from ars_kit.testing.rules import ConformanceError, watching

TENSORS = 3
BLOCK = 1000
SMALL = 4096
"""Numbers of state below which a gate may still be filling its windows."""


def check_gate(
    make: Callable[[], DampingGate],
    *,
    steps: int = 10_000,
    seed: int = 0,
    thorough: bool = False,
) -> None:
    """Check that a damping gate keeps every rule of :class:`ars_kit.spec.DampingGate`.

    The gate sees drawn sequences of losses: calm, falling, periodic, constant, zero, huge, with
    steps, spikes, NaN and infinities, fresh every thousand steps or so and some of them skipped.

    Args:
        make: returns a new gate; called several times.
        steps: losses in total.
        seed: of the sequences.
        thorough: a million losses instead; minutes, depending on the gate.

    Raises:
        ConformanceError: the first rule broken: declares where it acts, 0-d factors in [0, 1],
            bounded state, exact resume (also through the checkpoint format and
            ``torch.load(weights_only=True)``), determinism, no waiting for the device, and
            explanations that are 0-d tensors under the same names each time.
    """
    steps = 1_000_000 if thorough else steps
    _check_declaration(make())
    _check_answers(make(), steps, seed)
    _check_resume(make, seed)
    _check_determinism(make, seed)
    _check_no_wait(make(), seed)
    _check_explanations(make(), seed)
    if torch.cuda.is_available():
        _check_no_sync(make(), seed)


def loss_sequences(steps: int, seed: int, *, device: str = "cpu") -> Iterator[StepSignal]:
    """Yield ``steps`` signals as hostile as training gets, a pure function of the seed."""
    rng = torch.Generator().manual_seed(seed)
    turning = torch.Generator().manual_seed(seed + 1)
    one = torch.ones((), device=device)
    for first in range(0, steps, BLOCK):
        count = min(BLOCK, steps - first)
        losses = _block(first // BLOCK, count, rng)
        norms = torch.randn(count, TENSORS, generator=rng).exp()
        norms[torch.rand(count, generator=rng) < 0.01] = 0.0
        bad = ~losses.isfinite()
        norms[bad & (torch.rand(count, generator=rng) < 0.5)] = math.nan
        # As in a run with the guard in front: what is not finite is mostly skipped.
        skips = (bad & (torch.rand(count, generator=rng) < 0.7)).to(device)
        turns = torch.rand(count, generator=turning) * 2 - 1
        turns = torch.where(losses.isfinite(), turns, torch.nan)
        drawn = zip(losses.to(device), norms.to(device), turns.to(device), skips, strict=True)
        for i, (loss, row, turn, skip) in enumerate(drawn):
            late = partial(_same, row), partial(_same, turn)
            yield StepSignal(first + i, loss, 0.1, skip, one, one, one, *late)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _block(index: int, n: int, rng: torch.Generator) -> Tensor:
    """Draw one sequence of ``n`` losses; kinds take turns."""
    t, noise = torch.arange(n), torch.randn(n, generator=rng)
    level = torch.rand((), generator=rng) * 10
    wild = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e38, -1e38, 1e-38])
    drawn = wild[torch.randint(len(wild), (n,), generator=rng)]
    kinds = (
        level + 0.1 * noise,
        level * torch.exp(-t / 200) + 0.05 * noise,
        level + torch.cos(2 * torch.pi * t / (2 + index % 7)) + 0.3 * noise,
        level.expand(n).clone(),
        torch.zeros(n),
        level + 5 * (t > n // 2) + 0.1 * noise,
        torch.where(torch.rand(n, generator=rng) < 0.05, drawn, level + 0.1 * noise),
        drawn,
        torch.exp(20 * noise),
        level + noise.cumsum(0) * 0.1,
    )
    return kinds[index % len(kinds)]


def _check_declaration(gate: DampingGate) -> None:
    acts_on = getattr(gate, "acts_on", "gradient")
    if acts_on not in ("gradient", "step"):
        raise ConformanceError(f"acts_on must be 'gradient' or 'step', not {acts_on!r}")


def _check_answers(gate: DampingGate, steps: int, seed: int) -> None:
    """Check shapes each step, values once a block."""
    values: list[Tensor] = []
    half = (0, 0)
    for signal in loss_sequences(steps, seed):
        values.append(_factors(gate(signal), signal))
        done = signal.step + 1
        if len(values) == BLOCK or done == steps:
            _check_values(gate, torch.stack(values), done - len(values))
            values.clear()
        if done == steps // 2:
            half = done, _size(_state(gate, done))
    size = _size(_state(gate, steps))
    if size > max(half[1], SMALL):
        raise ConformanceError(
            f"memory must not grow with the steps; the state holds {half[1]} numbers after step "
            f"{half[0]} and {size} after step {steps}"
        )


def _factors(answer: Any, signal: StepSignal) -> Tensor:
    """Return what was answered as a row of numbers, checking shapes and types.

    The row: gradient factor, step factor, least and largest factor by tensor, loss, skip.
    """
    if isinstance(answer, Tensor):
        answer = Damping(gradient=answer) if not answer.ndim else answer
    wrong = _wrong_form(answer)
    if wrong:
        raise ConformanceError(
            f"a gate must return a 0-d tensor or a Damping of them; at step {signal.step} "
            f"(loss {float(signal.loss):g}) {wrong}"
        )
    one = signal.damping
    gradient = least = most = one
    if answer.gradient is not None and answer.gradient.ndim:
        # A factor by tensor may exceed 1; it must be neither negative nor infinite all the same.
        least, most = answer.gradient.aminmax()
    elif answer.gradient is not None:
        gradient = answer.gradient
    step = one if answer.step is None else answer.step
    asked = signal.skip if answer.skip is None else signal.skip | answer.skip
    # Each in double precision, so that nothing is rounded into [0, 1].
    return torch.stack([t.double() for t in (gradient, step, least, most, signal.loss, asked)])


def _wrong_form(answer: Any) -> str | None:
    """Say what is wrong with the form of an answer, if anything."""
    if isinstance(answer, Tensor):
        return f"its shape is {tuple(answer.shape)}"
    if not isinstance(answer, Damping):
        return f"it returned {type(answer).__name__} {answer!r}"
    for part, value in (("gradient", answer.gradient), ("step", answer.step)):
        if value is None:
            continue
        if value.ndim and not (part == "gradient" and value.shape == (TENSORS,)):
            return f"the shape of {part} is {tuple(value.shape)}"
        if not value.is_floating_point():
            return f"{part} is {value.dtype}"
    skip = answer.skip
    if skip is not None and (skip.ndim or skip.dtype != torch.bool):
        return f"skip is {skip.dtype} of shape {tuple(skip.shape)}, not a 0-d bool"
    return None


def _check_values(gate: DampingGate, rows: Tensor, first: int) -> None:
    gradient, step, least, most, losses, skipped = rows.unbind(1)
    upper = 1.0 if getattr(gate, "bounded", True) else math.inf
    checks = (
        ("the gradient factor", gradient, upper),
        ("the step factor", step, upper),
        ("a factor by tensor", least, math.inf),
        ("a factor by tensor", most, math.inf),
    )
    for name, value, limit in checks:
        # Of a step that is left out anyway nothing is asked.
        bad = ~((value >= 0) & (value <= limit) & value.isfinite()) & (skipped == 0)
        if bad.any():
            at = int(bad.nonzero()[0])
            span = "in [0, 1]" if limit == 1.0 else "finite and not negative"
            raise ConformanceError(
                f"{name} must be {span}; at step {first + at} (loss {float(losses[at]):g}) it is "
                f"{float(value[at]):g}"
            )


def _size(value: Any) -> int:
    """Count the numbers in a state."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 1


def _state(gate: DampingGate, step: int) -> dict[str, Any]:
    state = gate.state_dict()
    try:
        pack(state)
    except TypeError as error:
        raise ConformanceError(
            f"state_dict must hold tensors and plain values; at step {step}: {error}"
        ) from error
    return state


def _check_resume(make: Callable[[], DampingGate], seed: int) -> None:
    """Compare gates restored in mid-course with one that went on, bit for bit."""
    for pause in (0, 7, 2 * BLOCK + BLOCK // 2):  # the last where gates that look for periods damp
        signals = list(loss_sequences(pause + 700, seed + 1))
        whole = make()
        for signal in signals[:pause]:
            whole(signal)
        resumed: dict[str, DampingGate] = {}
        for way, through in (("torch.save", _saved), ("a checkpoint", _packed)):
            resumed[f"a gate resumed through {way}"] = again = make()
            again.load_state_dict(through(_state(whole, pause), pause))
        _compare(whole, resumed, signals[pause:])


def _saved(state: dict[str, Any], step: int) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        return torch.load(buffer, weights_only=True)
    except Exception as error:
        raise ConformanceError(
            f"state must load with weights_only=True; at step {step}: {error}"
        ) from error


def _packed(state: dict[str, Any], _: int) -> Any:
    tensors, skeleton = pack(state)
    return unpack({k: v.clone() for k, v in tensors.items()}, skeleton)


def _check_determinism(make: Callable[[], DampingGate], seed: int) -> None:
    signals = list(loss_sequences(3 * BLOCK, seed + 2))
    _compare(make(), {"a second gate shown the same losses": make()}, signals)


def _compare(
    one: DampingGate, others: Mapping[str, DampingGate], signals: Sequence[StepSignal]
) -> None:
    answers = [
        # Asked in turns: gates that draw from one global generator do not agree by chance.
        [_factors(gate(signal), signal) for gate in (one, *others.values())]
        for signal in signals
    ]
    a, *rest = (torch.stack(rows) for rows in zip(*answers, strict=True))
    for what, b in zip(others, rest, strict=True):
        differ = ~torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all(1)
        if differ.any():
            at = int(differ.nonzero()[0])
            raise ConformanceError(
                f"{what} must answer exactly alike; at step {signals[at].step} it answers "
                f"{_pair(b[at])}, not {_pair(a[at])}"
            )


def _check_no_wait(gate: DampingGate, seed: int) -> None:
    for signal in loss_sequences(200, seed + 3):
        with watching() as watch:
            gate(signal)
        if watch.found:
            raise ConformanceError(
                "a gate must not wait for the device (item(), tolist(), if tensor:); at step "
                f"{signal.step} it calls {watch.found}"
            )


def _check_explanations(gate: DampingGate, seed: int) -> None:
    explain = getattr(gate, "explain", None)
    if explain is None:
        return
    names: set[str] | None = None
    for signal in loss_sequences(200, seed + 4):
        gate(signal)
        with watching() as watch:
            found = dict(explain())
        if watch.found:
            raise ConformanceError(
                f"explain must not wait for the device; at step {signal.step} it calls "
                f"{watch.found}"
            )
        for name, value in found.items():
            if not isinstance(value, Tensor) or value.ndim:
                raise ConformanceError(
                    f"explain must return 0-d tensors; at step {signal.step} {name!r} is {value!r}"
                )
        if names is not None and names != found.keys():
            raise ConformanceError(
                f"what explain names must stay the same; at step {signal.step} it is "
                f"{sorted(found)}, not {sorted(names)}"
            )
        names = set(found)


def _check_no_sync(gate: DampingGate, seed: int) -> None:
    signals = list(loss_sequences(300, seed + 3, device="cuda"))
    for signal in signals[:100]:  # the first steps may set tables up
        gate(signal)
    before = torch.cuda.get_sync_debug_mode()
    for signal in signals[100:]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            gate(signal)
        except RuntimeError as error:
            raise ConformanceError(
                f"a gate must not wait for the device; at step {signal.step}: {error}"
            ) from error
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _pair(row: Tensor) -> str:
    return f"(gradient {float(row[0]):g}, step {float(row[1]):g}, by tensor {float(row[2]):g})"
