"""``arskit export``: another format of a checkpoint, compared with it or not written."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ars_kit import __version__
from ars_kit.durable import commit_directory, disk_errors, make_directory
from ars_kit.errors import ConfigError
from ars_kit.host import Host
from ars_kit.models import TOKENIZER_FILES, load_base
from ars_kit.schema import Choice
from ars_kit.spec import Exporter
from ars_kit.workbench import workbench
from ars_kit_serving.checkpoints import Checkpoint
from ars_kit_serving.kept import TransientError
from ars_kit_serving.parity import LENGTHS, compare, own_texts

PARITY = "parity.json"
CONFIGS = ("config.json", "generation_config.json")
CONTEXT = 256
"""Tokens of context that parity is looked for in."""


@dataclass(frozen=True, slots=True)
class Export:
    """One checkpoint and the format it is to have.

    Attributes:
        checkpoint: verified.
        host: the installed plugins.
        choice: the format, and its settings.
        target: the directory to write; must not exist.
        texts: held-out text in the checkpoint's tokens, to compare on.
    """

    checkpoint: Checkpoint
    host: Host
    choice: Choice
    target: Path
    texts: Sequence[Sequence[int]]


def export_checkpoint(export: Export) -> dict[str, Any]:
    """Write the directory; returns what ``parity.json`` says.

    Raises:
        ConfigError: the target exists, or the model cannot be exported.
        ParityError: what was exported computes something else. Nothing is left behind.
        PluginError: the exporter failed.
    """
    target, source = export.target, export.checkpoint.path
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} already exists; remove it, or choose another --into")
    exporter: Exporter = export.host.make("exporters", export.choice)
    facts: dict[str, Any] = {
        "format": str(export.choice),
        "source": export.checkpoint.name,
        "source_sha256": export.checkpoint.digest,
        "ars_kit": __version__,
    }

    blaming = export.host.blaming("exporters", export.choice.name, "while it exported")
    with blaming:
        write_compared(exporter, source, target, export.texts, facts)
    size = sum(p.stat().st_size for p in target.iterdir() if p.name.startswith("model."))
    return {"target": str(target), "bytes": size, **facts}


def write_compared(
    exporter: Exporter,
    source: Path,
    target: Path,
    texts: Sequence[Sequence[int]] | None,
    facts: dict[str, Any],
) -> None:
    """Export into a directory that appears whole, once it was compared, or not at all.

    Args:
        exporter: of the format.
        source: the verified checkpoint.
        target: the directory to write; must not exist.
        texts: of tokens, to compare on; None for what the model makes up.
        facts: of the export; what the comparison found is added.

    Raises:
        ConfigError: the model cannot be exported, or the target cannot be written.
        ParityError: what was exported computes something else.
    """

    def files(folder: Path) -> None:
        exporter.export(source, folder)
        _copy(source, folder)
        facts.update(_compared(exporter, source, folder, texts))
        text = json.dumps(facts, indent=2) + "\n"
        (folder / PARITY).write_text(text, encoding="utf-8")

    parent = target.absolute().parent
    with contextlib.ExitStack() as work:
        try:
            with disk_errors(target):
                make_directory(parent)
                scratch = work.enter_context(workbench(parent))
        except OSError as error:
            raise TransientError(
                f"cannot write {target}: {error.strerror}; choose another place for it"
            ) from error
        header = {"export": facts["format"], "source_sha256": facts["source_sha256"]}
        commit_directory(parent / target.name, files, header, scratch=scratch)


def _copy(source: Path, folder: Path) -> None:
    """Put the tokenizer and the configurations beside the model, unless the exporter did."""
    for pattern in (*TOKENIZER_FILES, *CONFIGS):
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def _compared(
    exporter: Exporter, source: Path, folder: Path, texts: Sequence[Sequence[int]] | None
) -> dict[str, Any]:
    model = load_base(str(source.absolute()), torch.float32)
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    engine = exporter.open(folder, context=min(own or CONTEXT, CONTEXT), slots=len(LENGTHS))
    try:
        if texts is None:
            texts = own_texts(model, engine.context)
        return compare(model, engine, texts, exporter.tolerance)
    finally:
        engine.close()
