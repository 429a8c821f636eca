"""What can be said of settings at once, before torch is imported: names and what they are given."""

from __future__ import annotations

import os

from ars_kit.errors import DataError
from ars_kit.host import Host
from ars_kit.optim import check_names
from ars_kit.roster import parse_roster
from ars_kit.settings import Settings
from ars_kit.source import FILES, parse_source


def check_choices(settings: Settings, host: Host) -> None:
    """Refuse what nobody offers, and text that is not there.

    :func:`ars_kit.plan.plan_run` checks all of it and more; it needs torch, and a slip of the
    keyboard should not wait for that.

    Raises:
        ConfigError: members that are none, or a setting that a choice does not have.
        PluginError: a name nobody offers.
        DataError: no such file or folder.
    """
    own = [m.data for m in parse_roster(settings.family.members) if m.data is not None]
    check_names(host, settings.optimizer)
    host.check("strategies", settings.family.strategy)
    for evaluator in settings.run.evaluators:
        host.check("evaluators", evaluator)
    for tracker in settings.run.trackers:
        host.check("trackers", tracker)
    for source in (parse_source(text, host) for text in [settings.data.source, *own]):
        host.check("data_sources", source)
        path = source.settings.get("path")
        # os.path has an answer too for what no file can be called, and for nobody's home.
        there = isinstance(path, str) and os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111
        if source.name == FILES and isinstance(path, str) and not there:
            raise DataError(f"no such file or folder: {path}")
