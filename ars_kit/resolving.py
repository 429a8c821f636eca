"""Settings of what a user says: four layers over each other, typed and checked.

Precedence: flag > environment (``ARSKIT_SECTION_KEY``) > file (``run.toml``) > default. Two
profiles of defaults exist, one for the embedded family and one for a pretrained base; each value
remembers which layer it came from.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ars_kit.errors import ConfigError
from ars_kit.lora import WHOLE, parse_trainable
from ars_kit.roster import SUFFIX, parse_roster, read_roster
from ars_kit.schema import coerce, did_you_mean
from ars_kit.settings import (
    CONTROLS,
    SECTIONS,
    FamilySettings,
    Origin,
    Settings,
    keys,
    spelled,
)

# What fine-tuning a pretrained base wants otherwise than training a small one from nothing.
PRETRAINED: Mapping[str, Any] = {
    "family.depth": "same",
    "data.sequence_length": 1024,
    "train.steps_per_iteration": 1,
    "train.batch_size": 8,
    "train.lr": 1e-5,
    "train.lr_width": None,
    "train.schedule": "cosine",
    "train.warmup_steps": 10,
}

ADAPTED: Mapping[str, Any] = {"train.lr": 1e-4}
"""What adapters of a pretrained base want otherwise than all of it."""

LONGEST = 1 << 24
"""Tokens of a sequence: a mask of so many by so many has a number of bytes that is a number."""
POSITIVE = frozenset(
    {
        *(f"train.{k}" for k in ("batch_size", "accumulation", "steps_per_iteration", "lr")),
        *(f"train.{k}" for k in ("iterations", "tokens", "lr_width", "lr_vectors", "max_skipped")),
        *(f"train.{k}" for k in ("instability_limit", "instability_steps", "max_rollbacks")),
        *(f"family.{k}" for k in ("vocab_size", "head_dim", "aspect", "width", "init")),
        *("data.heldout_tokens", "run.save_every", "run.log_every", "run.heldout_every"),
    }
)
NOT_NEGATIVE = frozenset({"train.warmup_steps", "train.weight_decay", "run.price_per_hour"})
FINITE = frozenset({"optimizer.entropy_threshold", "optimizer.surprise_damping"})


def resolve(
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Path | None = None,
) -> Settings:
    """Lay the four layers over each other.

    Args:
        flags: by ``section.key``, as text or typed.
        environment: the process environment; ``ARSKIT_TRAIN_LR`` sets ``train.lr``.
        file: a ``run.toml``.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, an unreadable file.
    """
    layers: list[tuple[Origin, str, dict[str, Any]]] = [
        ("file", str(file), read_toml(file) if file else {}),
        ("environment", "environment", _from_environment(environment)),
        ("flag", "command line", dict(flags)),
    ]
    annotations = keys()
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(annotations, "default")
    for origin, where, layer in layers:
        for key, raw in layer.items():
            _require_known(key, annotations, where)
            if key == "family.base" and origin != "file":  # where a frozen run has none, it says so
                _require_no_model(raw, f"{where}: {key}")
            values[key] = coerce(raw, annotations[key], f"{where}: {key}")
            origins[key] = origin
    members = values.get("family.members", "")
    if members.endswith(SUFFIX):
        # What the run freezes are the shapes: the file may change after.
        values["family.members"] = read_roster(Path(members))
    if values.get("family.base"):
        adapted = values.get("train.trainable", WHOLE) != WHOLE
        values = {**PRETRAINED, **(ADAPTED if adapted else {}), **values}
    sections = {
        name: section(
            **{k.partition(".")[2]: v for k, v in values.items() if k.startswith(name + ".")}
        )
        for name, section in SECTIONS.items()
    }
    settings = Settings(**sections, origins=origins)
    _check(settings)
    return settings


def read_toml(path: Path) -> dict[str, Any]:
    """Read a settings file into ``section.key`` form.

    Raises:
        ConfigError: it is missing, unreadable, or no TOML.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read settings file {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    for section, body in tree.items():
        if not isinstance(body, dict):
            raise ConfigError(f"{path}: {section!r} must stand in a section such as [train]")
        for key, value in body.items():
            flat[f"{section}.{key}"] = value
    return flat


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what the environment sets; a misspelt setting is kept, for the complaint."""
    names = {f"ARSKIT_{key.replace('.', '_').upper()}": key for key in keys()}
    sections = tuple(f"ARSKIT_{name.upper()}_" for name in SECTIONS)
    return {
        names.get(n) or n.removeprefix("ARSKIT_").lower().replace("_", ".", 1): v
        for n, v in environment.items()
        if n.startswith(sections)
    }


def _require_known(key: str, known: Iterable[str], where: str) -> None:
    known = list(known)
    if key in known:
        return
    section = key.partition(".")[0]
    has = [k for k in known if k.startswith(section + ".")] or list(SECTIONS)
    raise ConfigError(
        f"{where}: no setting {key!r}{did_you_mean(key, known)}. There are: {', '.join(has)}"
    )


def _require_no_model(base: Any, where: str) -> None:
    """Refuse ``none`` for a base where a model directory has that name, and may be meant."""
    if isinstance(base, str) and base.lower() == "none" and Path(base, "config.json").is_file():
        raise ConfigError(
            f"{where} = {base!r} is no base, and there is a model directory of that name; write "
            f"./{base} for it, or leave it out for none"
        )


def _check(settings: Settings) -> None:
    """Refuse values that no run can have, before anything is looked at."""
    parse_roster(settings.family.members)
    _check_texts(settings.flat())
    _check_values(settings.flat())
    _check_family(settings.family)
    parse_trainable(settings.train.trainable)
    train, added = settings.train, [gate.name for gate in settings.optimizer.gates]
    if train.batch_size % train.accumulation:
        raise ConfigError(
            f"train.batch_size {train.batch_size} cannot be split into "
            f"{train.accumulation} equal micro-batches; change train.accumulation"
        )
    for name in settings.run.controls:
        if name not in CONTROLS:
            raise ConfigError(
                f"no control named {name!r}{did_you_mean(name, CONTROLS)}. "
                f"There are: {', '.join(CONTROLS)}"
            )
        if settings.run.controls.count(name) > 1:
            raise ConfigError(f"control {name!r} is named twice")
    for name in added:
        if added.count(name) > 1:
            raise ConfigError(f"damping gate {name!r} is added twice; a run has one of a name")


def _check_texts(values: Mapping[str, Any]) -> None:
    for key in ("data.source", "family.base"):
        if values[key] is not None and not values[key].strip():
            raise ConfigError(f"{key} is empty; name something, or leave it out")
        if values[key] is not None and re.search("[\ud800-\udfff]", values[key]):
            raise ConfigError(f"{key} is not UTF-8, so no settings file can hold it; rename it")


def _check_values(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        least = min(value) if key == "train.iterations" else value
        if key in POSITIVE and least is not None and not 0 < least < math.inf:  # no NaN either
            raise ConfigError(f"{key} must be greater than 0, not {least}")
        if key in FINITE and not all(map(math.isfinite, value)):
            raise ConfigError(f"{key} must be two finite numbers, not {spelled(value)}")
        if key in NOT_NEGATIVE and not 0 <= value < math.inf:
            raise ConfigError(f"{key} must be 0 or more, not {value}")
    if (length := values["data.sequence_length"]) < 2:
        raise ConfigError("data.sequence_length must be 2 or more: a window and its targets")
    if length > LONGEST:
        raise ConfigError(
            f"data.sequence_length {length} goes beyond {LONGEST:,} tokens; is that a slip?"
        )
    if not 0 < (share := values["data.heldout_fraction"]) < 0.9:
        raise ConfigError(f"data.heldout_fraction must lie in (0, 0.9), not {share}")
    if not 0 <= (share := values["train.decay_fraction"]) <= 1:
        raise ConfigError(f"train.decay_fraction must lie in [0, 1], not {share}")


def _check_family(family: FamilySettings) -> None:
    alone = family.depth in {"miniseries", "depth"}
    if family.base is None and not alone:
        raise ConfigError(f"family.depth = {family.depth!r} needs a base; name one with --base")
    if family.base is not None and alone:
        raise ConfigError("a pretrained base keeps its width: set family.depth to same or grow")
    if family.base is None and family.vocab_size <= 256:
        raise ConfigError(
            f"family.vocab_size {family.vocab_size} is too small: byte-level BPE starts at 257"
        )
    if family.head_dim % 2:
        raise ConfigError(
            f"family.head_dim must be even for rotary embeddings, not {family.head_dim}"
        )
