"""Another server as a process of ours: its log is kept, and it never outlives us."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from ars_kit.errors import PluginError
from ars_kit_serving.engines import warden

PAUSE = 0.1
"""Seconds between two looks at whether it is ready."""

ERROR = re.compile(r"(?:(?<=\s)|^)(?:\w*(?:Error|Exception)|^ERROR): .+")
"""How Python ends a traceback, and pip and uvicorn begin what went wrong."""

GRACE = 10.0
"""Seconds from SIGTERM to SIGKILL."""


class Child:
    """A server on loopback, kept by a warden (:mod:`ars_kit_serving.engines.warden`).

    Args:
        name: what users call it.
        command: starts it.
        environment: all of it.
        log: the file that its output goes to.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        keep = [sys.executable, "-I", str(warden.__file__), str(GRACE)]
        with log.open("wb") as output:
            # A process group, not a session: Linux shares time between sessions (sched_autogroup),
            # and on a busy machine vLLM's own server would wait while its worker spins.
            self.process = subprocess.Popen(  # noqa: S603 -- our own interpreter and arguments
                [*keep, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=log.parent,
                process_group=0,
            )

    def wait_until_ready(self, url: str, seconds: float) -> None:
        """Ask ``url`` until it answers 200.

        Raises:
            PluginError: the process ended, or it took too long; it is stopped then.
        """
        end = time.monotonic() + seconds
        while not _answers(url):
            if complaint := self.complaint():
                self.stop()
                raise PluginError(complaint)
            if time.monotonic() > end:
                self.stop()
                raise PluginError(
                    f"{self.name} did not answer within {seconds:g} seconds; its log is {self.log}"
                )
            time.sleep(PAUSE)

    def complaint(self) -> str | None:
        """Return one line on its end, or None while it runs."""
        if self.process.poll() is None:
            return None
        return f"{self.name} has ended: {self.reason()}. Its log is {self.log}"

    def stop(self) -> None:
        """Tell it to stop, wait, and leave nothing of it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE + 5)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def reason(self) -> str:
        """Return the first error of its log, which the later ones come from, or its last line."""
        return reason_in(self.log)


def reason_in(log: Path, start: int = 0) -> str:
    """Return the first error in a log from a byte on, or its last line."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no word"]
    errors = [found[0] for line in lines if (found := ERROR.search(line))]
    return (errors or lines[-1:])[0][:300]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 -- http to loopback
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
