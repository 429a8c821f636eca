"""onnxruntime-genai's models, by its own builder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, NoReturn

from ars_kit.errors import ConfigError
from ars_kit.models import load_base_config
from ars_kit.spec import Engine
from ars_kit_serving.engines.context import require_exportable
from ars_kit_serving.engines.shared_buffers import SharedBufferEngine
from ars_kit_serving.kept import SHORT, TransientError

MODEL = "model.onnx"
TOLERANCE = 1e-4
HEAD = 16
"""GroupQueryAttention with rotary positions wants a head size that is a multiple of this."""


class GenaiExporter:
    """A directory for onnxruntime-genai: ``model.onnx``, ``genai_config.json``, tokenizer."""

    def __init__(self, *, precision: Literal["fp32", "int8", "int4"] = "fp32") -> None:
        self.precision = precision
        self.tolerance: float | None = TOLERANCE if precision == "fp32" else None

    def export(self, source: Path, target: Path) -> None:
        """Run the builder in a process of its own, which takes its memory and its chatter along.

        Raises:
            ConfigError: it is not installed, does not know the architecture, or would leave out
                sliding windows, which no comparison of texts shorter than a window can show.
            TransientError: it was killed, or short of memory or disk.
        """
        if importlib.util.find_spec("onnxruntime_genai") is None:
            raise ConfigError("it is not installed; type: pip install onnxruntime-genai")
        config = load_base_config(str(source.absolute())).get_text_config()
        require_exportable(config, "genai")
        size = getattr(config, "head_dim", None)
        size = size or config.hidden_size // config.num_attention_heads
        if size % HEAD:
            raise ConfigError(
                f"its attention takes heads of a multiple of {HEAD} dimensions, this model's have "
                f"{size}"
            )
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(  # noqa: S603 -- our own interpreter, paths of our own
                [
                    sys.executable, "-m", "onnxruntime_genai.models.builder",
                    "-i", str(source.absolute()), "-o", str(target.absolute()), "-c", cache,
                    "-p", self.precision, "-e", "cpu",
                    "--extra_options", "hf_remote=false", "hf_token=false",
                ],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )  # fmt: skip
        if done.returncode < 0:
            raise TransientError(
                f"onnxruntime-genai's builder was killed by signal {-done.returncode}; it may "
                "have been short of memory"
            )
        if done.returncode or not (target / MODEL).is_file():
            _raise_reason(config.model_type, done.stderr)

    def open(self, target: Path, *, context: int, slots: int, threads: int = 0) -> Engine:
        """Run it in ONNX Runtime, which takes its rows as they are."""
        return SharedBufferEngine(target / MODEL, context=context, slots=slots, threads=threads)


def _raise_reason(kind: str, said: str) -> NoReturn:
    """Say why the builder failed: in its last line, or that which tells of a shortage.

    Raises:
        TransientError: it was short of memory or disk, wherever its traceback says so.
        ConfigError: it was not.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no reason given"]
    if short := next((line for line in reversed(lines) if SHORT.search(line)), None):
        raise TransientError(
            f"onnxruntime-genai's builder was short of memory or disk: {short[:300]}"
        )
    raise ConfigError(f"onnxruntime-genai's builder cannot export {kind}: {lines[-1][:300]}")
