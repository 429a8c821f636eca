"""The methods compared: each the same AdamW, with one way of keeping it stable around it.

Peers run at their published constants. AdaGC, Stable-SPAM, StableAdamW and AGC are those of the
``pytorch_optimizer`` package; where it is not installed they are left out with a notice. The
wrappers of ARS are found as any plugin is.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ars_kit import damping
from ars_kit.damping import DampedOptimizer
from ars_kit.host import Host
from ars_kit.schema import Choice
from ars_kit.spec import DampingGate, StepSignal
from stability.provocations import PROVOCATIONS

if TYPE_CHECKING:
    from torch.optim import Optimizer

Groups = list[dict[str, Any]]

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
WRAPPERS = ("ars-plan", "ars-paper", "ars")
DAMPED = "ars"
"""The wrapper whose gates are also left out one by one."""


CLIPPED = "ars-with-clip"
"""The wrapper with clipping to a global norm of 1.0 where its norm memory is."""
LEVEL = "ars-level"
"""The wrapper with a norm memory that falls as slowly as it rises."""
ORACLE = "oracle"
"""No method, but a bound: the wrapper, told what its surprise gate has to guess."""
OTHER_NORMS = {CLIPPED: Choice("clip"), LEVEL: Choice("norm-memory", {"shrink": 1.05})}
RUINED = frozenset({"clean", *(p.name for p in PROVOCATIONS.values() if p.ruins)})


class Prepare(Protocol):
    """Looks at the gradients before the base optimizer does, and may change them in place."""

    def __call__(self, params: Sequence[Tensor], loss: Tensor) -> bool:
        """Return whether the base optimizer is to step."""
        ...


class Told:
    """A gate that need not guess: it stops the gradient of a batch that it is told is ruined.

    No gate that has to judge by loss or gradients can be expected to do better at that.
    """

    def __init__(self) -> None:
        self.ruined = False

    def __call__(self, signal: StepSignal) -> Tensor:
        """Return 0 or 1."""
        return signal.loss.new_full((), 0.0 if self.ruined else 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: runs are not resumed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back nothing."""


@dataclass(frozen=True, slots=True)
class Stepper:
    """A base optimizer and what is done before each of its steps.

    Attributes:
        told: a gate that is told of each step whether its batch was ruined.
    """

    base: Optimizer
    prepare: Prepare | None = None
    told: Told | None = None

    def step(self, loss: Tensor, lr: float) -> None:
        """Take one step.

        Args:
            loss: of this step, 0-d, detached.
            lr: learning rate of every group.
        """
        for group in self.base.param_groups:
            group["lr"] = lr
        if isinstance(self.base, DampedOptimizer):
            self.base.step(loss=loss)
            return
        params = [p for g in self.base.param_groups for p in g["params"] if p.grad is not None]
        if self.prepare is None or self.prepare(params, loss):
            self.base.step()


@dataclass(frozen=True, slots=True)
class Method:
    """One way of training.

    Attributes:
        source: where it is from, for the report.
        code: what its results depend on besides the benchmark: a package's version, or a digest.
        make: from parameter groups to the thing that steps.
        only: the provocations it is run under; all where None.
    """

    name: str
    source: str
    code: str
    make: Callable[[Groups], Stepper]
    only: frozenset[str] | None = None


def adamw(groups: Groups) -> Optimizer:
    """Return the base that all methods share (Loshchilov & Hutter, 1711.05101)."""
    return torch.optim.AdamW(groups, lr=1.0, betas=BETAS, fused=True)


def grad_norm(params: Sequence[Tensor]) -> float:
    """Return the global gradient norm."""
    return torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]).item()


def _scale(params: Sequence[Tensor], factor: float) -> None:
    for p in params:
        if p.grad is not None:
            p.grad.mul_(factor)


@dataclass(slots=True)
class Clip:
    """Shrink the gradient to a global norm of at most ``limit`` (Pascanu et al., 1211.5063)."""

    limit: float = 1.0

    def __call__(self, params: Sequence[Tensor], loss: Tensor) -> bool:  # noqa: ARG002
        """Clip."""
        torch.nn.utils.clip_grad_norm_(params, self.limit)
        return True


class ZClip:
    """Clip norms that stand out of their moving average (Kumar et al., 2504.02507).

    With moving mean mu and deviation s of the norm, a norm of score z = (n - mu) / s above
    ``limit`` becomes mu + s limit^2 / z (adaptive scaling, the paper's best). As in the authors'
    code the first ``warmup`` norms initialise the averages, the norm that enters them is the
    clipped one, and no norm exceeds ``most``.
    """

    def __init__(
        self, *, alpha: float = 0.97, limit: float = 2.5, warmup: int = 25, most: float = 1.0
    ) -> None:
        self.alpha, self.limit, self.warmup, self.most = alpha, limit, warmup, most
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def __call__(self, params: Sequence[Tensor], loss: Tensor) -> bool:  # noqa: ARG002
        """Clip."""
        norm = grad_norm(params)
        kept = norm
        if len(self.first) < self.warmup:
            self.first.append(norm)
            if len(self.first) == self.warmup:
                self.mean = math.fsum(self.first) / self.warmup
                self.variance = math.fsum((n - self.mean) ** 2 for n in self.first) / self.warmup
        else:
            deviation = math.sqrt(self.variance)
            z = (norm - self.mean) / (deviation + 1e-6)
            if z > self.limit:
                kept = self.mean + deviation * self.limit**2 / z
            self.mean = self.alpha * self.mean + (1 - self.alpha) * kept
            self.variance = self.alpha * self.variance + (1 - self.alpha) * (kept - self.mean) ** 2
        kept = min(kept, self.most)
        if not norm <= kept:
            _scale(params, kept / (norm + 1e-6))
        return True


class SkipStep:
    """Skip steps whose loss or gradient norm stands ``sigmas`` above the last 128, then clip.

    OLMo-core's SkipStepOptimizer (OLMo 2, 2501.00656) in its later form, which leaves values that
    are not finite out of its statistics and skips their steps. It judges from 64 values on.
    Unlike OLMo's, a skipped step here touches the moments in no way.
    """

    def __init__(self, *, window: int = 128, sigmas: float = 6.0, limit: float = 1.0) -> None:
        self.sigmas = sigmas
        self.needed = window // 2
        self.clip = Clip(limit)
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)

    def __call__(self, params: Sequence[Tensor], loss: Tensor) -> bool:
        """Return whether the step is within bounds; clip it."""
        norm = grad_norm(params)
        judged = len(self.losses) + 1 >= self.needed
        usual = self._usual(loss.item(), self.losses) and self._usual(norm, self.norms)
        self.losses.append(loss.item())
        self.norms.append(norm)
        return (usual or not judged) and self.clip(params, loss)

    def _usual(self, value: float, before: deque[float]) -> bool:
        finite = torch.tensor([v for v in before if math.isfinite(v)])
        if not math.isfinite(value):
            return False
        if len(finite) < 2:
            return True
        deviation, mean = torch.std_mean(finite)
        return bool(value - mean <= self.sigmas * deviation)


@dataclass(slots=True)
class UnitClip:
    """Adaptive gradient clipping, AGC (Brock et al., 2102.06171, eq. 3).

    The gradient of each unit shrinks to 0.01 times its weights' norm. As in the paper the output
    layer is left alone; it is the one given in ``spared``.
    """

    rule: Callable[[Tensor, Tensor], Tensor]
    spared: frozenset[int]

    def __call__(self, params: Sequence[Tensor], loss: Tensor) -> bool:  # noqa: ARG002
        """Clip."""
        for p in params:
            if p.grad is not None and id(p) not in self.spared:
                p.grad.copy_(self.rule(p, p.grad))
        return True


def _prepared(make: Callable[[], Prepare], groups: Groups) -> Stepper:
    return Stepper(adamw(groups), make())


def _packaged(name: str, groups: Groups) -> Stepper:
    import pytorch_optimizer  # noqa: PLC0415 -- optional

    cls = getattr(pytorch_optimizer, name)
    return Stepper(cls(groups, lr=1.0, betas=BETAS))


def _agc(groups: Groups) -> Stepper:
    from pytorch_optimizer.optimizer.agc import agc  # noqa: PLC0415 -- optional

    spared = frozenset(id(p) for g in groups if g["role"] == "embedding" for p in g["params"])
    return Stepper(adamw(groups), UnitClip(agc, spared))


def _oracle(host: Host, groups: Groups) -> Stepper:
    """Return the wrapper with its surprise gate replaced by one that knows."""
    told = Told()
    gates = {n: told if n == "surprise" else g for n, g in _gates(host, DAMPED).items()}
    return Stepper(DampedOptimizer(adamw(groups), gates), told=told)


def _other_norms(host: Host, choice: Choice, groups: Groups) -> Stepper:
    return Stepper(DampedOptimizer(adamw(groups), _with_norms(host, choice)))


def _with_norms(host: Host, choice: Choice) -> dict[str, DampingGate]:
    """Return the wrapper's gates with another one where its norm memory is."""
    gate = host.make("gates", choice)
    return {n: gate if n == "norm-memory" else g for n, g in _gates(host, DAMPED).items()}


def _gates(host: Host, name: str) -> dict[str, DampingGate]:
    return dict(host.make("wrappers", Choice(name)))


def _wrapped(host: Host, name: str, without: str | None, groups: Groups) -> Stepper:
    gates = _gates(host, name)
    if without is not None:
        del gates[without]
    return Stepper(DampedOptimizer(adamw(groups), gates))


def _digest(make: Callable[..., Any], gates: Mapping[str, Any]) -> str:
    """Return a digest of the source that a wrapper runs: its own, its gates', the optimizer's."""
    found = {damping.__name__}
    todo = [make.__module__, *(type(g).__module__ for g in gates.values())]
    while todo:
        name = todo.pop()
        if name in found or name not in sys.modules:
            continue
        found.add(name)
        family = name.partition(".")[0]
        used = vars(sys.modules[name]).values()
        names = (x.__name__ if inspect.ismodule(x) else getattr(x, "__module__", "") for x in used)
        todo += [n for n in names if str(n).partition(".")[0] == family]
    paths = [str(sys.modules[name].__file__) for name in sorted(found)]
    return hashlib.sha256(b"".join(Path(p).read_bytes() for p in paths)).hexdigest()[:12]


def installed_methods() -> tuple[dict[str, Method], list[str]]:
    """Return every method that can be run here, and a notice for each that cannot."""
    found = [
        Method("adamw", "torch", torch.__version__, lambda g: Stepper(adamw(g))),
        Method("clip", "1211.5063, limit 1.0", "1", partial(_prepared, Clip)),
        Method("zclip", "2504.02507", "1", partial(_prepared, ZClip)),
        Method("skipstep", "OLMo-core, with clip 1.0", "1", partial(_prepared, SkipStep)),
    ]
    notices = []
    try:
        package = version("pytorch_optimizer")
    except PackageNotFoundError:
        notices.append(
            "adagc, stable-spam, stableadamw, agc: left out, pytorch_optimizer is not installed"
        )
    else:
        found += [
            Method("adagc", "2502.11034", package, partial(_packaged, "AdaGC")),
            Method("stable-spam", "2502.17055", package, partial(_packaged, "StableSPAM")),
            Method("stableadamw", "2304.13013", package, partial(_packaged, "StableAdamW")),
            Method("agc", "2102.06171", package, _agc),
        ]
    host = Host.installed()
    for name in WRAPPERS:
        if name not in host.shelves["wrappers"]:
            notices.append(f"{name}: left out, no such optimizer wrapper is installed")
            continue
        gates = _gates(host, name)
        code = _digest(host.listing("wrappers", name).offer.make, gates)
        found.append(Method(name, "ars-kit", code, partial(_wrapped, host, name, None)))
        if name == DAMPED:
            found += [_ablated(host, gate, code) for gate in gates]
            for other, choice in OTHER_NORMS.items():
                gates = _with_norms(host, choice)
                digest = _digest(host.listing("wrappers", name).offer.make, gates)
                found.append(Method(other, "ars-kit", digest, partial(_other_norms, host, choice)))
            found.append(
                Method(
                    ORACLE, "told which batches are random", code, partial(_oracle, host), RUINED
                )
            )
    return {m.name: m for m in found}, notices


def _ablated(host: Host, gate: str, code: str) -> Method:
    # Without its guard a run differs only where something is not finite.
    only = frozenset({"nonfinite"}) if gate == "guard" else None
    name = f"{DAMPED}-without-{gate}"
    return Method(name, "ablation", code, partial(_wrapped, host, DAMPED, gate), only)
