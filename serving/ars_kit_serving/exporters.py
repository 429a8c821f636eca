"""The built-in export formats; nothing heavy is imported before one is chosen."""

from __future__ import annotations

from typing import Literal

from ars_kit.spec import Exporter, Offer, hookimpl


def onnx(*, precision: Literal["fp32", "fp16"] = "fp32") -> Exporter:
    """Write one decoder graph with its cache, for ONNX Runtime; any architecture.

    Args:
        precision: of weights and arithmetic.
    """
    from ars_kit_serving.decoder import OnnxExporter  # noqa: PLC0415 -- torch is slow

    return OnnxExporter(precision=precision)


def genai(*, precision: Literal["fp32", "int8", "int4"] = "fp32") -> Exporter:
    """Write a directory for onnxruntime-genai, the fastest on a CPU.

    Args:
        precision: of the weights; int8 and int4 round, and are judged by what it does to the loss.
    """
    from ars_kit_serving.genai import GenaiExporter  # noqa: PLC0415 -- onnxruntime is slow

    return GenaiExporter(precision=precision)


@hookimpl
def arskit_exporters() -> list[Offer[Exporter]]:
    """Offer the formats."""
    return [
        Offer("onnx", "one decoder graph with its cache, for ONNX Runtime", onnx),
        Offer("genai", "a directory for onnxruntime-genai, the fastest on a CPU", genai),
    ]
