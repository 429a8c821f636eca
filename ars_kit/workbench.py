"""Where something is made before it is moved to its place beside, whole.

A run folder has one of its own. What is written elsewhere, by ``arskit grow`` and its like, gets a
folder beside the target for as long as it takes, with a lock in it that dies with its process. So
whoever works there next can tell what a killed process left from what a living one is filling.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ars_kit.errors import ConfigError
from ars_kit.lock import exclusive, is_abandoned

PREFIX = ".arskit-"
"""What the name of a workbench begins with."""
LOCK = "workbench.lock"


@contextlib.contextmanager
def workbench(parent: Path) -> Iterator[Path]:
    """Yield a directory in ``parent`` that is gone in the end, as are those that the dead left.

    Args:
        parent: an existing directory, on whose volume things are made.

    Raises:
        OSError: it cannot be made.
    """
    clear_abandoned(parent)
    bench = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with contextlib.ExitStack() as held:
            # Where a volume cannot lock, nobody can tell the dead, and what they leave stays.
            with contextlib.suppress(ConfigError):
                held.enter_context(exclusive(bench / LOCK, what=bench))
            yield bench
    finally:
        shutil.rmtree(bench, ignore_errors=True)


def clear_abandoned(parent: Path) -> None:
    """Remove the workbenches that dead processes left in a directory."""
    for bench in parent.glob(f"{PREFIX}*"):
        if is_abandoned(bench / LOCK) and not bench.is_symlink():
            shutil.rmtree(bench, ignore_errors=True)
