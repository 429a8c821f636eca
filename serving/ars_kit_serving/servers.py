"""The built-in serving engines; nothing heavy is imported before one is chosen."""

from __future__ import annotations

from typing import Any, Literal

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


def genai(service: Service, *, precision: Literal["fp32", "int8", "int4"] = "fp32") -> Engine:
    """Export once with onnxruntime-genai's builder, and run that in ONNX Runtime: fastest on a CPU.

    Args:
        service: what to serve.
        precision: of the weights; int8 and int4 round.
    """
    from ars_kit_serving.derived import derived_engine  # noqa: PLC0415 -- torch is slow
    from ars_kit_serving.genai import GenaiExporter  # noqa: PLC0415 -- onnxruntime is slow

    return derived_engine(service, GenaiExporter(precision=precision), f"genai-{precision}")


def onnx(service: Service, *, precision: Literal["fp32", "fp16"] = "fp32") -> Engine:
    """Export once to one ONNX graph, and run that in ONNX Runtime: any architecture, on a CPU.

    Args:
        service: what to serve.
        precision: of weights and arithmetic.
    """
    from ars_kit_serving.decoder import OnnxExporter  # noqa: PLC0415 -- torch is slow
    from ars_kit_serving.derived import derived_engine  # noqa: PLC0415 -- torch is slow

    return derived_engine(service, OnnxExporter(precision=precision), f"onnx-{precision}")


def vllm(
    service: Service,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    compiled: bool = True,
    memory: float = 0.9,
    port: int = 0,
    seconds: float = 600.0,
) -> Any:
    """Run vLLM, installed in an environment of its own, as a process behind the server.

    Args:
        service: what to serve.
        device: cpu or cuda; auto takes a GPU where the driver shows one.
        dtype: of weights and arithmetic; auto is fp32 on a CPU and bf16 elsewhere.
        compiled: whether vLLM compiles the model before it answers; it starts slower and runs
            faster.
        memory: share of a GPU's that it may take.
        port: of loopback that it listens on; 0 for a free one. Its key is random, or
            ``ARSKIT_VLLM_KEY`` of the environment: for who wants to ask vLLM itself.
        seconds: that it may take to be ready.
    """
    from ars_kit_serving.engines.vllm import (  # noqa: PLC0415 -- torch is slow
        VllmEngine,
        VllmSettings,
    )

    return VllmEngine(
        service,
        VllmSettings(device, dtype, compiled=compiled, memory=memory, port=port, seconds=seconds),
    )


@hookimpl
def arskit_servers() -> list[Offer[Engine]]:
    """Offer the engines."""
    return [
        Offer("genai", "an onnxruntime-genai export in ONNX Runtime, fastest on a CPU", genai),
        Offer("onnx", "one ONNX graph in ONNX Runtime, for what genai cannot export", onnx),
        Offer("transformers", "any architecture, as transformers runs it", transformers),
        Offer("vllm", "vLLM in a process and an environment of its own", vllm),
    ]
