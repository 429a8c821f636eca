"""Medians with their spread, and what everything was measured on."""

from __future__ import annotations

import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("ars-kit", "torch", "transformers", "onnxruntime", "onnxruntime-genai")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of several rounds, the lowest and the highest."""
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "rounds": len(values),
    }


def facts() -> dict[str, Any]:
    """Return the command and what it ran on."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "command": shlex.join(["python", f"benchmarks/{command[0]}", *command[1:]]),
        "environment": {
            "machine": f"{psutil.cpu_count()} cores of a shared {platform.machine()} CPU",
            "Python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }
