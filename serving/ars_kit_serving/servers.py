"""The built-in serving engines; nothing heavy is imported before one is chosen."""

from __future__ import annotations

from typing import Literal

from ars_kit.spec import Engine, Offer, Service, hookimpl


def transformers(
    service: Service,
    *,
    device: str = "auto",
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
) -> Engine:
    """Run the model as transformers has it; every architecture, sequences batched.

    Args:
        service: what to serve.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.
        dtype: of weights and arithmetic; auto is fp32 on a CPU and bf16 elsewhere.
    """
    from ars_kit_serving.engines.eager import EagerEngine  # noqa: PLC0415 -- torch is slow

    return EagerEngine(service, device=device, dtype=dtype)


@hookimpl
def arskit_servers() -> list[Offer[Engine]]:
    """Offer the engines."""
    return [Offer("transformers", "any architecture, as transformers runs it", transformers)]
