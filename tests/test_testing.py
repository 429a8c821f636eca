"""The conformance kit: every rule it holds is broken once, and the built-in gates keep them all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import installed

from ars_kit.settings import Choice
from ars_kit.spec import Damping, StepSignal
from ars_kit.testing import ConformanceError, check_gate, gates
from ars_kit_plugins.gating import EntropyGuard
from ars_kit_plugins.published import PaperGate, PlanEntropyGuard, PlanSurpriseGate

BUILT_IN = ("guard", "surprise", "entropy", "norm-memory", "jitter", "clip")
MAKERS = {name: lambda n=name: installed().make("gates", Choice(n)) for name in BUILT_IN}
MAKERS |= {"plan-entropy": PlanEntropyGuard, "plan-surprise": PlanSurpriseGate, "paper": PaperGate}


class Half:
    """A gate that keeps every rule; the broken ones differ in one thing."""

    def __init__(self) -> None:
        self.seen = torch.zeros(())

    def __call__(self, signal: StepSignal) -> Any:
        self.seen = self.seen + 1
        return torch.where(self.seen > 100, 0.5, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen.clone()}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"].clone()


class Uphill(Half):
    def __call__(self, signal: StepSignal) -> Any:
        return torch.where(signal.loss > 1e30, -0.35, super().__call__(signal))


class NotANumber(Half):
    def __call__(self, signal: StepSignal) -> Any:
        return Damping(step=signal.loss - signal.loss + 1)


class Above(Half):
    def __call__(self, signal: StepSignal) -> Any:
        return super().__call__(signal) * 1.5


class OneDimensional(Half):
    def __call__(self, signal: StepSignal) -> Any:
        return torch.ones(1)


class PlainNumber(Half):
    def __call__(self, signal: StepSignal) -> Any:
        return 0.5


class SkipsByNumber(Half):
    def __call__(self, signal: StepSignal) -> Any:
        return Damping(skip=torch.ones(()))


class Reads(Half):
    def __call__(self, signal: StepSignal) -> Any:
        return torch.ones(()) if float(signal.loss) > 1 else super().__call__(signal)


class Lists(Half):
    def __call__(self, signal: StepSignal) -> Any:
        return super().__call__(signal) * (max(signal.norms().tolist()) < math.inf)


class GoesToNumpy(Half):
    def __call__(self, signal: StepSignal) -> Any:
        return super().__call__(signal) * (signal.loss.numpy() < math.inf)


class Forgets(Half):
    def load_state_dict(self, state: Any) -> None:
        pass


class BeginsAnew(EntropyGuard):
    """Its memory shows only while it damps."""

    def load_state_dict(self, state: Any) -> None:
        self.window = None


class Draws(Half):
    def __call__(self, signal: StepSignal) -> Any:
        return torch.rand(())


class Hoards(Half):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []

    def __call__(self, signal: StepSignal) -> Any:
        self.losses.append(signal.loss)
        return super().__call__(signal)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen.clone(), "losses": list(self.losses)}


class KeepsObjects(Half):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen.clone(), "where": {1, 2}}


class ActsNowhere(Half):
    acts_on = "learning rate"


class SaysNumbers(Half):
    def explain(self) -> Any:
        return {"seen": 3.0}


class SaysVectors(Half):
    def explain(self) -> Any:
        return {"seen": self.seen.expand(2)}


class SaysLate(Half):
    def explain(self) -> Any:
        return {"seen": self.seen, "sum": torch.tensor(self.seen.item())}


class SaysAnother(Half):
    def __call__(self, signal: StepSignal) -> Any:
        self.step = signal.step
        return super().__call__(signal)

    def explain(self) -> Any:
        return {"early" if self.step < 50 else "late": self.seen}


def test_a_good_gate_passes() -> None:
    check_gate(Half)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Uphill, r"gradient factor must be in \[0, 1\]; at step \d+ \(loss 1e\+38\) it is -0.35"),
        (NotANumber, r"step factor must be in \[0, 1\]; at step \d+ \(loss \S+\) it is nan"),
        (Above, r"gradient factor must be in \[0, 1\]; at step 0 \(loss \S+\) it is 1.5"),
        (OneDimensional, r"0-d tensor .* at step 0 \(loss \S+\) its shape is \(1,\)"),
        (PlainNumber, r"or a Damping .* at step 0 \(loss \S+\) it returned float 0.5"),
        (
            SkipsByNumber,
            r"at step 0 \(loss \S+\) skip is torch.float32 of shape \(\), not a 0-d bool",
        ),
        (Reads, r"must not wait for the device .* at step 0 it calls _local_scalar_dense"),
        (Lists, r"must not wait for the device .* at step 0 it calls tolist"),
        (GoesToNumpy, r"must not wait for the device .* at step 0 it calls numpy"),
        (Forgets, r"resumed through torch.save must answer exactly alike; at step \d+"),
        (BeginsAnew, r"resumed through torch.save must answer exactly alike; at step \d+"),
        (Draws, r"must answer exactly alike; at step 0 it answers \(gradient 0\.\d+"),
        (Hoards, r"memory must not grow .* \d+ numbers after step 5000 and \d+ after step 10000"),
        (KeepsObjects, r"state_dict must hold .* at step \d+: /where holds a set"),
        (ActsNowhere, r"acts_on must be 'gradient' or 'step', not 'learning rate'"),
        (SaysNumbers, r"explain must return 0-d tensors; at step 0 .seen. is 3.0"),
        (SaysVectors, r"explain must return 0-d tensors; at step 0 .seen. is tensor"),
        (SaysLate, r"explain must not wait for the device; at step 0 it calls _local_scalar_dense"),
        (SaysAnother, r"must stay the same; at step 50 it is \[.late.\], not \[.early.\]"),
    ],
)
def test_a_broken_rule_is_named(
    gate: type[Half | EntropyGuard], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 10_000 if gate is Hoards else short(monkeypatch)
    with pytest.raises(ConformanceError, match=message):
        check_gate(gate, steps=steps)


def short(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let sequences have 250 losses; returns how many show all ten kinds of them."""
    monkeypatch.setattr(gates, "BLOCK", 250)
    return 2500


@pytest.mark.parametrize("name", MAKERS)
def test_the_built_in_gates_keep_the_rules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_gate(MAKERS[name], steps=short(monkeypatch))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", MAKERS)
def test_the_built_in_gates_keep_them_over_a_million_losses(name: str) -> None:
    check_gate(MAKERS[name], thorough=True)
