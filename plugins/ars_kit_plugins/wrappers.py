"""The built-in optimizer wrappers, as offers: which gates ARS puts around a base optimizer."""

from __future__ import annotations

from ars_kit.spec import DampingGate, GateStack, Offer, hookimpl


def ars_gates(
    *,
    entropy_threshold: float = 0.5,
    surprise_damping: float = 0.1,
    norm_memory: bool | None = None,
    loss_only: bool = False,
    jitter: float = 0.0,
    seed: int = 0,
) -> dict[str, DampingGate]:
    """Return the gates of ARS in the order they are asked.

    Args:
        entropy_threshold: of the Entropy Guard; alpha = 2e-3 at 0.5, ten times more per 0.25 less.
        surprise_damping: of the Surprise Gate; at 0.1 its factor is (limit / surprise)^2.
        norm_memory: give each gradient the norm it has had of late; none: unless loss_only.
        loss_only: judge the loss alone, which is known before there are gradients: no norm memory,
            and no overshoot for the Entropy Guard. So under --memory tiny.
        jitter: standard deviation of Chronos-Jitter's log-normal noise; 0 leaves it out.
        seed: of the jitter.
    """
    from ars_kit_plugins import gating  # noqa: PLC0415 -- torch is slow to import

    gates: dict[str, DampingGate] = {
        "guard": gating.Guard(),
        "surprise": gating.SurpriseGate(damping=surprise_damping),
    }
    if norm_memory and loss_only:
        raise ValueError(
            "norm_memory looks at gradients, which loss_only rules out (as --memory tiny does)"
        )
    if norm_memory is None:
        norm_memory = not loss_only
    if norm_memory:
        gates["norm-memory"] = gating.NormMemory()
    gates["entropy"] = gating.EntropyGuard(threshold=entropy_threshold, overshoot=not loss_only)
    if jitter:
        gates["jitter"] = gating.ChronosJitter(scale=jitter, seed=seed)
    return gates


def plan_gates(
    *,
    entropy_threshold: float = 0.5,
    surprise_damping: float = 0.1,
    jitter: float = 0.0,
    seed: int = 0,
) -> dict[str, DampingGate]:
    """Return the gates of the first plan of ARS: a historical baseline.

    Args:
        entropy_threshold: correlation of the losses with time above which steps are halved.
        surprise_damping: share of the relative surprise that is taken off the factor.
        jitter: standard deviation of Chronos-Jitter's log-normal noise; 0 leaves it out.
        seed: of the jitter.
    """
    from ars_kit_plugins import gating, published  # noqa: PLC0415 -- torch is slow to import

    gates: dict[str, DampingGate] = {
        "plan-entropy": published.PlanEntropyGuard(threshold=entropy_threshold),
        "plan-surprise": published.PlanSurpriseGate(damping=surprise_damping),
    }
    if jitter:
        gates["jitter"] = gating.ChronosJitter(scale=jitter, seed=seed)
    return gates


def paper_gates(
    *, alpha: float = 1.0, phi_min: float = 0.3, rho: float = 0.7, window: int = 50
) -> dict[str, DampingGate]:
    """Return the gate of the published ARS: a historical baseline.

    Args:
        alpha: steepness of the Surprise Gate.
        phi_min: its least factor.
        rho: lag-1 autocorrelation of the surprise that counts as resonance.
        window: surprises it is taken over.
    """
    from ars_kit_plugins.published import PaperGate  # noqa: PLC0415 -- torch is slow to import

    return {"paper": PaperGate(alpha=alpha, phi_min=phi_min, rho=rho, window=window)}


@hookimpl
def arskit_wrappers() -> list[Offer[GateStack]]:
    """Offer the built-in wrappers."""
    return [
        Offer("ars", "damp unstable steps: guard, Φ, norm memory, Ψ", ars_gates),
        Offer("ars-plan", "ARS as first planned; a historical baseline", plan_gates),
        Offer("ars-paper", "ARS as published; a historical baseline", paper_gates),
    ]
