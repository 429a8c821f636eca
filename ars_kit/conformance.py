"""Whether the gates that a distribution offers keep the rules of every gate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ars_kit.errors import ArsKitError, ConfigError
from ars_kit.host import Host, Plugin
from ars_kit.schema import Choice, did_you_mean, parse_choice
from ars_kit.spec import DampingGate

Check = Callable[[Callable[[], DampingGate]], object]
"""Takes what makes a gate, and raises where the gate breaks a rule."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What came out of checking one gate.

    Attributes:
        gate: as it was chosen; the entry point's name for a plugin that could not be loaded.
        distribution: that offers it.
        version: of the distribution.
        problem: the rule it breaks and how, in one line, or None.
    """

    gate: str
    distribution: str
    version: str
    problem: str | None

    def __str__(self) -> str:
        """Return the finding in one line."""
        return f"{self.gate} ({self.distribution} {self.version}): {self.problem or 'ok'}"


def check_gates(host: Host, wanted: str, check: Check) -> Iterator[Finding]:
    """Check one gate, or every gate of a distribution, a finding at a time.

    Args:
        host: the installed plugins.
        wanted: a gate with or without settings, or a distribution. A gate's name comes first.
        check: as :func:`ars_kit.testing.check_gate`.

    Raises:
        ConfigError: nothing installed has that name.
        PluginError: two plugins offer that gate.
    """
    choice = parse_choice(wanted)
    if choice.name in host.shelves["gates"]:
        yield _checked(host, choice, host.listing("gates", choice.name).plugin, check)
        return
    offered = [
        (listing.plugin, name)
        for name, listings in sorted(host.shelves["gates"].items())
        for listing in listings
    ]
    broken = [plugin for plugin in host.quarantined if _same(plugin.distribution, wanted)]
    mine = [(plugin, name) for plugin, name in offered if _same(plugin.distribution, wanted)]
    if not mine and not broken:
        known = {name for _, name in offered} | {plugin.distribution for plugin, _ in offered}
        raise ConfigError(
            f"no damping gate and no distribution with one is named {wanted!r}"
            f"{did_you_mean(wanted, known)}. There are: {', '.join(sorted(known))}"
        )
    for plugin in broken:
        yield Finding(plugin.name, plugin.distribution, plugin.version, host.quarantined[plugin])
    for plugin, name in mine:
        yield _checked(host, Choice(name), plugin, check)


def _checked(host: Host, choice: Choice, plugin: Plugin, check: Check) -> Finding:
    problem = None
    try:
        check(lambda: host.make("gates", choice))
    except (ArsKitError, AssertionError) as error:
        problem = _one_line(error)
    except Exception as error:  # noqa: BLE001 -- a stranger's code
        problem = f"it raised {type(error).__name__}: {_one_line(error)}"
    return Finding(str(choice), plugin.distribution, plugin.version, problem)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _same(one: str, other: str) -> bool:
    """Whether two spellings name one distribution (PEP 503)."""
    return _normal(one) == _normal(other)


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
