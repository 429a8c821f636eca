"""Whether what a distribution offers keeps the rules of its kind: gates and strategies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ars_kit.errors import ArsKitError, ConfigError
from ars_kit.host import SINGULAR, Host, Kind, Plugin
from ars_kit.schema import Choice, did_you_mean, parse_choice

Check = Callable[[Callable[[], Any]], object]
"""Takes what makes an offer, and raises where what is made breaks a rule."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What came out of checking one offer.

    Attributes:
        offer: as it was chosen; the entry point's name for a plugin that could not be loaded.
        distribution: that offers it.
        version: of the distribution.
        problem: the rule it breaks and how, in one line, or None.
    """

    offer: str
    distribution: str
    version: str
    problem: str | None

    def __str__(self) -> str:
        """Return the finding in one line."""
        return f"{self.offer} ({self.distribution} {self.version}): {self.problem or 'ok'}"


def check_offers(host: Host, wanted: str, checks: Mapping[Kind, Check]) -> Iterator[Finding]:
    """Check one offer, or every one of a distribution that there is a check for.

    Args:
        host: the installed plugins.
        wanted: an offer with or without settings, or a distribution. An offer's name comes first.
        checks: by kind, such as :func:`ars_kit.testing.check_gate`.

    Raises:
        ConfigError: nothing installed has that name.
        PluginError: two plugins offer that.
    """
    choice = parse_choice(wanted)
    kinds = [kind for kind in checks if choice.name in host.shelves[kind]]
    for kind in kinds:
        plugin = host.listing(kind, choice.name).plugin
        yield _checked(host, kind, choice, plugin, checks[kind])
    if kinds:
        return
    offered = [
        (listing.plugin, kind, name)
        for kind in checks
        for name, listings in sorted(host.shelves[kind].items())
        for listing in listings
    ]
    broken = [plugin for plugin in host.quarantined if _same(plugin.distribution, wanted)]
    mine = [offer for offer in offered if _same(offer[0].distribution, wanted)]
    if not mine and not broken:
        known = {name for *_, name in offered} | {plugin.distribution for plugin, *_ in offered}
        nouns = " or ".join(SINGULAR[kind] for kind in checks)
        raise ConfigError(
            f"no {nouns} and no distribution with one is named {wanted!r}"
            f"{did_you_mean(wanted, known)}. There are: {', '.join(sorted(known))}"
        )
    for plugin in broken:
        yield Finding(plugin.name, plugin.distribution, plugin.version, host.quarantined[plugin])
    for plugin, kind, name in mine:
        yield _checked(host, kind, Choice(name), plugin, checks[kind])


def _checked(host: Host, kind: Kind, choice: Choice, plugin: Plugin, check: Check) -> Finding:
    problem = None
    try:
        check(lambda: host.make(kind, choice))
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
