"""ONNX Runtime, as both kinds of exported model use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ars_kit.errors import ConfigError

KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
"""Element types that can be fed; what else a graph wants is refused."""

CHUNK = 512
"""Tokens of a prompt that are computed at once: a graph returns logits for every one of them."""


SMALL = 40_000_000
"""Bytes of a model below which a second thread costs more than it computes."""


def open_session(file: Path, threads: int) -> Any:
    """Open a graph on the CPU.

    Args:
        file: the model.
        threads: that one operator may use; 0 for one a core, but one for a small model.

    Raises:
        ConfigError: the runtime cannot run it.
    """
    options = onnxruntime.SessionOptions()
    size = sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))
    options.intra_op_num_threads = threads or int(size < SMALL)
    options.log_severity_level = 4  # what it logs as an error it raises as well
    # Threads that spin while they wait would take the cores that answers are sent from.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no class
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"ONNX Runtime cannot run {file.name}: {reason}") from error


def kind_of(node: Any) -> Any:
    """Return the numpy type of an input.

    Raises:
        ConfigError: numpy has none that fits.
    """
    if node.type not in KINDS:
        raise ConfigError(f"ONNX Runtime's {node.type} cannot be fed from here")
    return KINDS[node.type]
