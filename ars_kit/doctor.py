"""What is installed, which devices and backends there are, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ars_kit.durable import byte_count
from ars_kit.store import RunFolder, free_bytes

if TYPE_CHECKING:
    from ars_kit.host import Host

PACKAGES = ("ars-kit", "torch", "transformers", "accelerate", "datasets", "tokenizers",
            "safetensors", "pluggy")  # fmt: skip
EXTRAS = {"kagglehub": "pip install 'ars-kit[kaggle]'"}


def examine(host: Host, out: Path) -> dict[str, dict[str, str]]:
    """Return the findings under headings.

    Args:
        host: the installed plugins.
        out: the run folder.
    """
    packages = {p: _version(p, "pip install --force-reinstall ars-kit") for p in PACKAGES}
    return {
        "packages": {"python": platform.python_version(), **packages},
        "optional packages": {p: _version(p, how) for p, how in EXTRAS.items()},
        **_hardware(),
        "machine": {"memory available": byte_count(psutil.virtual_memory().available)},
        "run folder": {
            "path": str(out.absolute()),
            "free there": byte_count(free_bytes(out)),
            "holds": _holds(RunFolder(out)),
        },
        "plugins": {
            **{f"{p.name} ({p.distribution} {p.version})": "loaded" for p in host.plugins},
            **{
                f"{p.name} ({p.distribution} {p.version})": f"put aside: it {why}"
                for p, why in host.quarantined.items()
            },
        },
    }


def _version(package: str, how: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed; get it: {how}"


def _holds(folder: RunFolder) -> str:
    """Say what is in a run folder, and whether a run could write there."""
    path = folder.path.absolute()
    place = next(p for p in (path, *path.parents) if os.path.lexists(p))
    closed = not place.is_dir() or not os.access(place, os.W_OK)
    refused = "; nothing can be written there: choose another --out" if closed else ""
    if place != path:
        return "nothing yet" + (refused or "; it will be made")
    return ("a run" if folder.holds_work() else "no run") + refused


def _hardware() -> dict[str, dict[str, str]]:
    """Return the devices and what torch computes with on them."""
    try:
        import torch  # noqa: PLC0415 -- what is missing is what this is for
    except ImportError as error:
        return {"devices": {"none": f"torch cannot be imported: {error}"}}
    return {"devices": _devices(torch), "backends": _backends(torch)}


def _devices(torch: Any) -> dict[str, str]:
    found = {"cpu": f"{psutil.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found[f"cuda:{i}"] = f"{properties.name}, {byte_count(properties.total_memory)}, {bf16}"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    if len(found) > 1:
        return found
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        found["accelerator"] = (
            "an NVIDIA driver is here, but this torch was built without CUDA; get another build: "
            "https://pytorch.org/get-started/locally"
        )
    else:
        found["accelerator"] = "none found; training runs on the CPU"
    return found


def _backends(torch: Any) -> dict[str, str]:
    libraries = {"MKL": torch.backends.mkl, "oneDNN": torch.backends.mkldnn,
                 "OpenMP": torch.backends.openmp}  # fmt: skip
    distributed = torch.distributed
    ways = [
        name
        for name in ("gloo", "nccl", "mpi")
        if distributed.is_available() and getattr(distributed, f"is_{name}_available")()
    ]
    return {
        "cpu libraries": _listed([n for n, lib in libraries.items() if lib.is_available()]),
        "cuda": torch.version.cuda or "not in this build of torch",
        "several processes": _listed(ways),
    }


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
