"""Who is in a family: depths (``d10..d18``), or shapes written out one by one.

Shapes come from a file, ``--members members.toml``:

.. code-block:: toml

    [[member]]
    name = "small"
    num_hidden_layers = 4
    hidden_size = 32
    tokens = 400_000
    data = "texts/letters"

or from its one-line form, in which a run keeps them:
``small:num_hidden_layers=4,hidden_size=32; large:...``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ars_kit.errors import ConfigError
from ars_kit.schema import Choice, coerce, did_you_mean, parse_choice

SUFFIX = ".toml"
DEEPEST = 10_000
"""Layers that nobody means to ask for."""
_LONGEST = 100
"""Characters of a name: file systems take some 255 bytes, and states lie under longer ones."""
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{_LONGEST - 1}}}")
_TAKEN = ("best", "controls", "trackers")


@dataclass(frozen=True, slots=True)
class Member:
    """One member's name, and its shape so far as the name does not say it.

    Attributes:
        name: its directory's.
        num_hidden_layers: its depth.
        hidden_size: width of the residual stream. None leaves it, and each of the following, to
            the family's rule or its base.
        intermediate_size: width of the MLP.
        num_attention_heads: query heads.
        num_key_value_heads: heads that queries share.
        head_dim: dimensions of a head.
        tokens: that it trains on, where it is not the run's to say.
        data: the text that it trains on, where it is not the run's; written as ``--data`` is.
    """

    name: str
    num_hidden_layers: int
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tokens: int | None = None
    data: str | None = None

    def __str__(self) -> str:
        """Return the one-line form."""
        said = {k: getattr(self, k) for k in FIGURES if getattr(self, k) is not None}
        return str(Choice(self.name, said))

    def shape(self) -> dict[str, int | None]:
        """Return the sizes by their configuration key."""
        return {k: getattr(self, k) for k in FIGURES if k not in {"tokens", "data"}}


FIGURES = tuple(f.name for f in fields(Member) if f.name != "name")


def parse_roster(text: str) -> tuple[Member, ...]:
    """Read ``family.members``: depths, or shapes in their one-line form.

    Raises:
        ConfigError: not of that form, empty, or a name stands there twice.
    """
    if ":" not in text:
        return tuple(Member(f"d{depth}", depth) for depth in parse_depths(text))
    choices = [parse_choice(part) for part in text.split(";") if part.strip()]
    return _checked([_member(c.settings, c.name, f"member {c.name!r}") for c in choices])


def read_roster(path: Path) -> str:
    """Return the one-line form of a file of shapes.

    Raises:
        ConfigError: it is unreadable, no TOML, or not a list of ``[[member]]``.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read members file {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    entries = tree.get("member")
    if (
        tree.keys() != {"member"}
        or not isinstance(entries, list)
        or not all(isinstance(entry, dict) for entry in entries)
    ):
        raise ConfigError(f"{path} must hold nothing but [[member]] tables, one for each member")
    members = []
    for number, entry in enumerate(entries, start=1):
        name = entry.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"{path}: [[member]] number {number} needs a name")
        members.append(_member(entry, name, f"{path}: member {name!r}"))
    return "; ".join(map(str, _checked(members)))


def bad_name(name: str) -> str | None:
    """Return why a member cannot be called so; None if it can."""
    if _NAME.fullmatch(name) and name not in _TAKEN:
        return None
    return (
        f"{name!r} cannot be a member's name: write up to {_LONGEST} letters, digits, _ and -, and "
        f"none of {', '.join(_TAKEN)}"
    )


def parse_depths(text: str) -> tuple[int, ...]:
    """Read ``d10..d18`` or ``d10,d12`` into depths in birth order.

    Raises:
        ConfigError: not of that form, empty, descending or repeated.
    """
    depths: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        match = re.fullmatch(r"d(\d+)(?:\.\.d(\d+))?", part)
        if not match:
            raise ConfigError(
                f"cannot read members {text!r}; write d10..d18, or d10,d12, or name a file of "
                f"shapes that ends in {SUFFIX}"
            )
        first = int(match.group(1))
        last = int(match.group(2) or first)
        if last < first:
            raise ConfigError(f"members {part!r} run downwards; write d{last}..d{first}")
        if last > DEEPEST:  # said now: to lay it out would take all memory there is
            raise ConfigError(f"members {part!r} go beyond {DEEPEST:,} layers; is that a slip?")
        depths += range(first, last + 1)
    if depths != sorted(set(depths)):
        raise ConfigError(f"members {text!r} must grow from one to the next, each named once")
    if depths[0] < 1:
        raise ConfigError("a member needs at least one layer; start at d1")
    return tuple(depths)


def _member(raw: Mapping[str, Any], name: str, where: str) -> Member:
    for key in raw:
        if key not in FIGURES:
            raise ConfigError(
                f"{where} has no size {key!r}{did_you_mean(key, FIGURES)}. There are: "
                f"{', '.join(FIGURES)}"
            )
    sizes = {
        key: coerce(value, int, f"{where}: {key}") for key, value in raw.items() if key != "data"
    }
    data = _source(raw["data"], where) if "data" in raw else None
    if "num_hidden_layers" not in sizes:
        raise ConfigError(f"{where} needs num_hidden_layers")
    small = [f"{key} = {value}" for key, value in sizes.items() if value < 1]
    if small:
        raise ConfigError(f"{where}: {small[0]} must be at least 1")
    deep = sizes["num_hidden_layers"]
    if deep > DEEPEST:  # said now: to lay it out would take all memory there is
        raise ConfigError(
            f"{where}: num_hidden_layers = {deep} goes beyond {DEEPEST:,} layers; is that a slip?"
        )
    return Member(name=name, **sizes, data=data)


def _source(raw: Any, where: str) -> str:
    """Return a source, which one line of all members must be able to hold."""
    if not isinstance(raw, str) or not raw.strip() or {",", ";", "\n"} & {*raw}:
        raise ConfigError(
            f"{where}: data must be a path, hf:owner/name or a source with one setting at most, "
            f"without comma or semicolon, not {raw!r}"
        )
    return raw.strip()


def _checked(members: list[Member]) -> tuple[Member, ...]:
    if not members:
        raise ConfigError("a family needs at least one member")
    for i, member in enumerate(members):
        if bad := bad_name(member.name):
            raise ConfigError(bad)
        if member.name in [m.name for m in members[:i]]:
            raise ConfigError(f"member {member.name!r} is named twice")
    return tuple(members)
