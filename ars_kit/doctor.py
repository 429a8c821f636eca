"""What is installed, which devices there are, what is missing and how to get it."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from ars_kit.host import Host

PACKAGES = ("ars-kit", "torch", "transformers", "accelerate", "datasets", "tokenizers",
            "safetensors", "pluggy")  # fmt: skip
EXTRAS = {"kagglehub": "pip install 'ars-kit[kaggle]'"}


def examine(host: Host) -> dict[str, dict[str, str]]:
    """Return the findings under headings."""
    return {
        "packages": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "optional packages": {p: _optional(p, how) for p, how in EXTRAS.items()},
        "devices": _devices(),
        "machine": {
            "memory available": f"{psutil.virtual_memory().available / 1e9:.1f} GB",
            "disk free here": f"{shutil.disk_usage('.').free / 1e9:.1f} GB",
        },
        "plugins": {
            **{p.name: f"{p.distribution} {p.version}" for p in host.plugins},
            **{p.name: why for p, why in host.quarantined.items()},
        },
    }


def _optional(package: str, how: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed; get it: {how}"


def _devices() -> dict[str, str]:
    found = {"cpu": f"{psutil.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    if len(found) == 1:
        found["accelerator"] = "none found; training runs on the CPU"
    return found
