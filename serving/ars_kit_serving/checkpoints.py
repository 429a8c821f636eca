"""What may be served or exported: verified, and free of code of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ars_kit.durable import directory_hash
from ars_kit.errors import ConfigError
from ars_kit.lineage import is_name
from ars_kit.store import locate

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory that was found fit.

    Attributes:
        name: what it is called from now on: a member's name, ``best``, or the directory's.
        path: where it is.
        digest: sha256 of all that is in it.
        config: its transformers configuration.
    """

    name: str
    path: Path
    digest: str
    config: PretrainedConfig


def open_checkpoint(name: str, out: Path) -> Checkpoint:
    """Find a checkpoint, verify it, and look at its configuration.

    Args:
        name: a member of ``out``, ``best``, or a directory.
        out: the run folder.

    Raises:
        ConfigError: there is none; it brings code of its own, is no causal language model of
            transformers, or holds no safetensors.
        IntegrityError: it is not what was committed.
    """
    from ars_kit.models import load_base_config  # noqa: PLC0415 -- torch is slow

    path = locate(name, out)
    _refuse_code(path)
    config = load_base_config(str(path.absolute()))
    _refuse_other_weights(path, getattr(config, "transformers_weights", None))
    called = name if name == "best" or is_name(name) else path.resolve().name
    return Checkpoint(called, path, directory_hash(path), config)


def _refuse_code(path: Path) -> None:
    code = sorted(p.relative_to(path).as_posix() for p in path.rglob("*.py"))
    if code:
        raise ConfigError(
            f"{path} brings code of its own ({code[0]}), which is never run; use a checkpoint "
            "without any"
        )
    for file in sorted(path.glob("*.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error
        if isinstance(found, dict) and found.get("auto_map"):
            raise ConfigError(
                f"{file} names code of its own (auto_map), which is never run; use a checkpoint "
                "without any"
            )


def _refuse_other_weights(path: Path, named: str | None) -> None:
    """Refuse a directory whose weights transformers would not read from safetensors.

    Without ``model.safetensors`` it reads a pickle, whatever other safetensors lie beside.

    Args:
        path: the directory.
        named: the file that its configuration names instead (``transformers_weights``), if any.
    """
    files = [named] if named else ["model.safetensors", "model.safetensors.index.json"]
    safe = named is None or named.endswith((".safetensors", ".safetensors.index.json"))
    if not safe or not any((path / file).is_file() for file in files):
        raise ConfigError(
            f"{path} holds no safetensors called {files[0]}; weights in other formats are not read"
        )
