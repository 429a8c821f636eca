"""What a run is made of besides its settings: texts, tokenizer, base. Are they what it began with?

Of a base's files size and time of change are kept beside the hash, so that gigabytes are read again
only where one of the two is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ars_kit.data import Corpus
from ars_kit.durable import HASHERS, sha256
from ars_kit.errors import ConfigError
from ars_kit.settings import Settings

BASE_FILES = (
    "config.json", "model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
)  # fmt: skip
"""What transformers makes a model of; its tokenizer is hashed by itself."""


def identify_inputs(
    settings: Settings, texts: Mapping[str, Corpus], known: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what identifies a run's text, its tokenizer, its members' texts and its base.

    Args:
        settings: the run's.
        texts: by their sources.
        known: what was returned before, if ever: hashes of files that have not changed are taken
            from there.

    Returns:
        ``data`` and ``tokenizer``, hashes; ``others``, hashes by source, where there are such; and
        ``base``, where it is a directory: ``size``, ``mtime_ns`` and ``sha256`` by file.
    """
    facts = texts[settings.data.source].facts
    others = {s: c.facts.data_hash for s, c in texts.items() if s != settings.data.source}
    more: dict[str, Any] = {"others": others} if others else {}
    base = Path(settings.family.base or "").expanduser()
    if settings.family.base is not None and base.is_dir():
        more["base"] = _files_of(base, _files_in(known))
    return {"data": facts.data_hash, "tokenizer": facts.tokenizer_hash, **more}


def _files_of(base: Path, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return size, time of change and hash of each file of a base that makes up its model."""

    def look(file: Path) -> dict[str, Any]:
        stat, before = file.stat(), known.get(file.name, {})
        now = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        same = all(before.get(key) == value for key, value in now.items()) and "sha256" in before
        return {**now, "sha256": before["sha256"] if same else sha256(file)}

    files = sorted({file for pattern in BASE_FILES for file in base.glob(pattern)})
    with ThreadPoolExecutor(HASHERS) as pool:
        return dict(zip((file.name for file in files), pool.map(look, files), strict=True))


def require_unchanged(
    before: Mapping[str, Any], now: Mapping[str, Any], settings: Settings, out: Path
) -> None:
    """Refuse a base and texts that are not those a run began with.

    Args:
        before: what :func:`identify_inputs` returned when it began; of an older version without a
            base.
        now: what it returns now.
        settings: the run's.
        out: its folder.

    Raises:
        ConfigError: one is not, named.
    """
    mend = f"has changed since this run began in {out}; put it back, or start anew with --restart"
    old, new = ({n: f["sha256"] for n, f in _files_in(found).items()} for found in (before, now))
    moved_files = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if "base" in before and "base" in now and moved_files:
        raise ConfigError(f"{moved_files[0]} of the base {settings.family.base!r} {mend}")
    was, is_now = ({k: v for k, v in found.items() if k != "base"} for found in (before, now))
    if was == is_now:
        return
    known, others, main = before.get("others", {}), now.get("others", {}), settings.data.source
    moved = next((s for s in others if others[s] != known.get(s)), main)
    name = moved if before.get("data") == now["data"] else main
    raise ConfigError(f"the text of {name!r} {mend}")


def _files_in(record: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    found: Mapping[str, Mapping[str, Any]] = record.get("base", {})
    return found
