"""The built-in damping gates, as offers; their arithmetic is in ``gating``, which needs torch."""

from __future__ import annotations

from ars_kit.spec import DampingGate, Offer, hookimpl


def guard() -> DampingGate:
    """Skip a step whose loss or gradient is not finite."""
    from ars_kit_plugins.gating import Guard  # noqa: PLC0415 -- torch is slow to import

    return Guard()


def surprise(*, damping: float = 0.1, limit: float = 4.0, patience: int = 8) -> DampingGate:
    """Damp steps whose loss stands out of the last 32 (Surprise Gate).

    Args:
        damping: how hard: the factor is (limit / z) to the power 20 x damping.
        limit: robust standard scores above the median that count as surprise.
        patience: surprising steps in a row that are damped; a lasting shift is let through.
    """
    from ars_kit_plugins.gating import SurpriseGate  # noqa: PLC0415 -- torch is slow to import

    return SurpriseGate(damping=damping, limit=limit, patience=patience)


def entropy(*, threshold: float = 0.5, floor: float = 0.1) -> DampingGate:
    """Shrink the step size while training oscillates without progress (Entropy Guard).

    Args:
        threshold: of the period test: alpha = 2e-3 at 0.5, ten times more per 0.25 less.
        floor: least step factor.
    """
    from ars_kit_plugins.gating import EntropyGuard  # noqa: PLC0415 -- torch is slow to import

    return EntropyGuard(threshold=threshold, floor=floor)


def jitter(*, scale: float = 0.05, seed: int = 0) -> DampingGate:
    """Multiply a damped step size by seeded log-normal noise (Chronos-Jitter); never seen to help.

    Args:
        scale: standard deviation of the factor's logarithm.
        seed: of the noise.
    """
    from ars_kit_plugins.gating import ChronosJitter  # noqa: PLC0415 -- torch is slow to import

    return ChronosJitter(scale=scale, seed=seed)


def norm_memory(
    *, decay: float = 0.98, growth: float = 1.05, shrink: float | None = None
) -> DampingGate:
    """Give each tensor's gradient the norm it has had of late.

    Args:
        decay: weight of the past in the remembered norm.
        growth: largest factor by which one step may exceed the memory when it is learned.
        shrink: the same downwards: 1.05 keeps the memory nearly level; none lets it fall as fast as
            the norms do.
    """
    from ars_kit_plugins.gating import NormMemory  # noqa: PLC0415 -- torch is slow to import

    return NormMemory(decay=decay, growth=growth, shrink=shrink)


def clip(*, limit: float = 1.0) -> DampingGate:
    """Shrink a step whose global gradient norm exceeds a limit.

    Args:
        limit: largest norm that passes undamped.
    """
    from ars_kit_plugins.gating import ClipGate  # noqa: PLC0415 -- torch is slow to import

    return ClipGate(limit=limit)


def skip(*, limit: float = 6.0, most: int = 8, norm: bool = False) -> DampingGate:
    """Skip steps whose loss stands far above the last 128 (after OLMo's SkipStep).

    Args:
        limit: robust standard scores above the median from which a step is skipped.
        most: steps in a row that are skipped; then the new level is let through.
        norm: hold the logarithm of the global gradient norm to the same limit.
    """
    from ars_kit_plugins.skipping import SkipStep  # noqa: PLC0415 -- torch is slow to import

    return SkipStep(limit=limit, most=most, norm=norm)


@hookimpl
def arskit_gates() -> list[Offer[DampingGate]]:
    """Offer the built-in gates."""
    return [
        Offer("guard", "skip steps with a loss or gradient that is not finite", guard),
        Offer("surprise", "damp steps with a surprising loss (Surprise Gate, Φ)", surprise),
        Offer("norm-memory", "give each gradient the norm it has had of late", norm_memory),
        Offer("entropy", "shrink steps while training oscillates (Entropy Guard, Ψ)", entropy),
        Offer("jitter", "noise on damped step sizes (Chronos-Jitter, χ)", jitter),
        Offer("skip", "skip steps whose loss stands far above the recent ones", skip),
        Offer("clip", "shrink steps with a large gradient norm", clip),
    ]
