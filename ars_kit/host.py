"""The installed plugins, read once, as shelves of offers by name.

A plugin that cannot be loaded, speaks a newer interface, or returns nonsense is quarantined and
named; the rest go on working. There is no global registry: whoever needs plugins is handed a host.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, cast

import pluggy

from ars_kit.errors import ArsKitError, ConfigError, PluginError
from ars_kit.schema import Choice, bind, did_you_mean
from ars_kit.spec import API_VERSION, PROJECT, Hooks, Offer

Kind = Literal[
    "optimizers",
    "wrappers",
    "gates",
    "strategies",
    "evaluators",
    "data_sources",
    "servers",
    "exporters",
    "trackers",
]  # the part of the hook's name after "arskit_"

SINGULAR: Mapping[Kind, str] = {
    "optimizers": "optimizer",
    "wrappers": "optimizer wrapper",
    "gates": "damping gate",
    "strategies": "inheritance strategy",
    "evaluators": "evaluator",
    "data_sources": "data source",
    "servers": "serving engine",
    "exporters": "export format",
    "trackers": "tracker",
}

PROMISES: Mapping[Kind, tuple[str, ...]] = {
    "optimizers": ("param_groups", "state", "step", "zero_grad", "state_dict", "load_state_dict"),
    "wrappers": ("items", "keys"),
    "gates": ("__call__", "state_dict", "load_state_dict"),
    "strategies": ("inherits", "supports", "inherit"),
    "evaluators": ("__call__",),
    "data_sources": ("fingerprint", "documents"),
    "servers": ("context", "slots", "close"),  # the rest is the serving room's to ask for
    "exporters": ("tolerance", "export", "open"),
    "trackers": ("start", "log", "finish"),
}
"""What every made thing of a kind has."""

LOAD_LIMIT = 30.0
"""Seconds a plugin may take to be imported and to name its offers."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True, slots=True)
class Plugin:
    """An installed plugin: its entry point's name and the distribution it came with."""

    name: str
    distribution: str
    version: str

    def __str__(self) -> str:
        """Return ``'name' (distribution version)``."""
        return f"{self.name!r} ({self.distribution} {self.version})"


@dataclass(frozen=True, slots=True)
class Listing:
    """An offer and the plugin it came from."""

    offer: Offer[Any]
    plugin: Plugin


@dataclass(slots=True)
class Host:
    """Every offer of every installed plugin, and every plugin that was put aside.

    Attributes:
        shelves: for each kind, the listings by offer name; more than one listing under a name
            is a clash, refused when that name is chosen.
        quarantined: plugins that were not loaded, with the reason in one line.
    """

    shelves: dict[Kind, dict[str, list[Listing]]] = field(
        default_factory=lambda: {kind: {} for kind in SINGULAR}
    )
    plugins: list[Plugin] = field(default_factory=list)
    quarantined: dict[Plugin, str] = field(default_factory=dict)

    @classmethod
    def installed(cls, without: Iterable[str] = ()) -> Host:
        """Read the ``ars_kit`` entry points of every installed distribution.

        Args:
            without: plugins to leave out, by entry point or by distribution (the environment's
                ``ARSKIT_WITHOUT``).
        """
        skip = set(without)
        found = sorted(entry_points(group=PROJECT), key=lambda e: (_plugin(e).distribution, e.name))
        host = cls()
        for entry in found:
            plugin = _plugin(entry)
            if skip & {plugin.name, plugin.distribution}:
                continue
            try:
                # What a plugin prints while it is loaded is no part of a command's result.
                with _at_most(LOAD_LIMIT), contextlib.redirect_stdout(sys.stderr):
                    host.register(entry.load(), plugin)
            except _TooLongError:
                host.quarantined[plugin] = f"was not loaded after {LOAD_LIMIT:g} seconds"
            except (Exception, SystemExit) as error:  # noqa: BLE001 -- a stranger's import
                host.quarantined[plugin] = f"failed to load: {error!r}"
        return host

    def register(self, module: object, plugin: Plugin) -> None:
        """Put a plugin's offers on the shelves, or the plugin into quarantine with the reason."""
        version = getattr(module, "ARSKIT_API", API_VERSION)
        if version != API_VERSION:
            self.quarantined[plugin] = (
                f"is written for plugin API {version}; this ars-kit speaks {API_VERSION}"
            )
            return
        try:
            offers = _offers(module)
        except PluginError as error:
            self.quarantined[plugin] = str(error)
            return
        self.plugins.append(plugin)
        for kind, offer in offers:
            self.shelves[kind].setdefault(offer.name, []).append(Listing(offer, plugin))

    def names(self, kind: Kind) -> list[str]:
        """Return the names on a shelf, sorted."""
        return sorted(self.shelves[kind])

    def listing(self, kind: Kind, name: str) -> Listing:
        """Return what is offered under ``name``.

        Raises:
            PluginError: nobody offers it (with what is installed and what was put aside), or
                two plugins do.
        """
        found = self.shelves[kind].get(name, [])
        if len(found) == 1:
            return found[0]
        what = SINGULAR[kind]
        if found:
            who = " and ".join(str(f.plugin) for f in found)
            raise PluginError(
                f"{what} {name!r} is offered twice, by {who}; "
                f"leave one out: ARSKIT_WITHOUT={self._handle(found[-1].plugin)}"
            )
        names = self.names(kind)
        message = (
            f"no {what} named {name!r}{did_you_mean(name, names)}. Installed: {', '.join(names)}"
        )
        if self.quarantined:
            message += ". Put aside: " + "; ".join(self.complaints())
        raise PluginError(message)

    def complaints(self) -> list[str]:
        """Return one line for each quarantined plugin: who, why, and how to go on without it."""
        return [
            f"plugin {plugin} {why}. To go on without it: ARSKIT_WITHOUT={self._handle(plugin)}"
            for plugin, why in self.quarantined.items()
        ]

    def _handle(self, plugin: Plugin) -> str:
        """Return what leaves this plugin out, and no other."""
        names = [p.name for p in (*self.plugins, *self.quarantined)]
        return plugin.name if names.count(plugin.name) == 1 else plugin.distribution

    def check(self, kind: Kind, choice: Choice, extra: Iterable[str] = ()) -> dict[str, Any]:
        """Return the typed settings of a choice without making anything.

        Args:
            kind: the shelf.
            choice: what the user chose.
            extra: required keyword parameters that the host itself will supply.

        Raises:
            PluginError: no such offer.
            ConfigError: a setting it does not have, or of the wrong type.
        """
        listing = self.listing(kind, choice.name)
        supplied = set(extra)
        clash = supplied & set(choice.settings)
        if clash:
            raise ConfigError(
                f"{choice.name!r}: {', '.join(sorted(clash))} is set by the run itself; "
                "use the run's own option"
            )
        with self.blaming(kind, choice.name, "when its settings were read"):
            return bind(repr(choice.name), listing.offer.make, choice.settings, supplied)

    def make(self, kind: Kind, choice: Choice, *args: Any, **supplied: Any) -> Any:
        """Make what was chosen.

        Raises:
            PluginError: no such offer, or its ``make`` raised or made something else.
            ConfigError: a setting does not fit.
        """
        listing = self.listing(kind, choice.name)
        settings = self.check(kind, choice, supplied)
        with self.blaming(kind, choice.name, "when it was made"):
            try:
                made = listing.offer.make(*args, **settings, **supplied)
            except ValueError as error:
                raise ConfigError(f"{choice.name!r}: {error}") from error
        who = f"{SINGULAR[kind]} {choice.name!r} of plugin {listing.plugin}"
        _require(kind, who, made)
        if kind == "wrappers":
            for name, gate in made.items():
                _require("gates", f"gate {name!r} of {who}", gate)
        return made

    @contextlib.contextmanager
    def blaming(self, kind: Kind, name: str, when: str) -> Iterator[None]:
        """Name the plugin that offers ``name`` where its code raises, or calls ``sys.exit``.

        Raises:
            PluginError: anything else than what this package raises itself, or a lack of memory.
        """
        try:
            yield
        except (ArsKitError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's; not imported here
                raise
            who = f"{SINGULAR[kind]} {name!r} of plugin {self.listing(kind, name).plugin}"
            raise PluginError(f"{who} failed {when}: {error!r}") from error


def _require(kind: Kind, who: str, made: object) -> None:
    lacks = [name for name in PROMISES[kind] if not hasattr(made, name)]
    if lacks:
        raise PluginError(f"{who} is a {type(made).__name__}, which has no {', '.join(lacks)}")


class _TooLongError(BaseException):
    """Not an Exception, so that a plugin that catches those does not go on hanging."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, where the system has an alarm clock and this thread hears it."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _plugin(entry: EntryPoint) -> Plugin:
    dist = entry.dist
    return Plugin(entry.name, dist.name if dist else "?", dist.version if dist else "?")


def _offers(module: object) -> list[tuple[Kind, Offer[Any]]]:
    """Call every hook that ``module`` implements and check what it returns.

    Raises:
        PluginError: a misspelt hook, a hook that raises, or a return that is no list of offers.
    """
    # A manager of its own for each plugin: what is wrong is then wrong with this one.
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    try:
        manager.register(module)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"is not a plugin: {' '.join(str(error).split())}") from error
    found: list[tuple[Kind, Offer[Any]]] = []
    for kind in SINGULAR:
        hook = getattr(manager.hook, f"arskit_{kind}")
        if not hook.get_hookimpls() and callable(getattr(module, f"arskit_{kind}", None)):
            raise PluginError(f"has arskit_{kind}() without @hookimpl above it, so nobody calls it")
        try:
            answers = hook()
        except (Exception, SystemExit) as error:
            raise PluginError(f"failed in arskit_{kind}(): {error!r}") from error
        if not answers and hook.get_hookimpls():
            answers = [None]  # pluggy drops what returns nothing
        for answer in answers:
            found += [(kind, _checked(offer, kind)) for offer in _sequence(answer, kind)]
    return found


def _sequence(answer: object, kind: Kind) -> list[object]:
    if not isinstance(answer, list | tuple):
        raise PluginError(f"returned {type(answer).__name__} from arskit_{kind}(), not a list")
    return list(answer)


def _checked(offer: object, kind: Kind) -> Offer[Any]:
    if not isinstance(offer, Offer):
        raise PluginError(f"returned {offer!r} from arskit_{kind}(), not an Offer")
    name, summary = cast("Any", offer.name), cast("Any", offer.summary)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PluginError(f"offers {name!r}; a name is lower-case letters, digits and dashes")
    if not isinstance(summary, str):
        raise PluginError(f"offers {name!r} with a summary that is no text: {summary!r}")
    if not callable(offer.make):
        raise PluginError(f"offers {name!r} with a make that cannot be called")
    return offer
