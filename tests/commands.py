"""Calls the command line as a user does: in a process of its own.

Importing torch and transformers takes a process longer than most of what the tests ask of it. So
most are forked from one that has imported them; the few tests that are about starting have their
process started.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Done = subprocess.CompletedProcess[str]

PATIENCE = 240.0

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
}
"""What the command line sets before it imports anything: in a warm process it is too late."""

WARM = (
    "ars_kit.cli", "ars_kit.controls", "ars_kit.reporting", "ars_kit_plugins.ars",
    "ars_kit_plugins.growth", "transformers.models.qwen2.modeling_qwen2",
    "matplotlib.figure", "matplotlib.backends.backend_svg",
)  # fmt: skip
"""What nearly every command imports; what one needs besides it imports itself."""


class Forked:
    """A process forked from a warm one, with those parts of :class:`subprocess.Popen` that we use.

    Args:
        main: what it calls; of a module, so that it is found there.
        given: its arguments.
        folder: its working directory.
        environment: all of it.
        together: whether what it says on stderr goes where stdout goes.
    """

    def __init__(
        self,
        main: Callable[..., None],
        *given: Any,
        folder: Path,
        environment: Mapping[str, str],
        together: bool = False,
    ) -> None:
        warm = multiprocessing.get_context("forkserver")
        warm.set_forkserver_preload(list(WARM))
        self._said = tempfile.TemporaryDirectory()
        out = Path(self._said.name) / "out"
        said = (out, out if together else out.with_name("err"))
        self._process = warm.Process(
            target=_live, args=(main, given, said, folder, dict(environment))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Await its end; return what it said on stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: it lives on.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        with self._said as folder:
            both = [Path(folder) / name for name in ("out", "err")]
            out, err = (said.read_text("utf-8") if said.exists() else "" for said in both)
        return out, err


def _live(
    main: Callable[..., None],
    given: Sequence[Any],
    said: tuple[Path, Path],
    folder: Path,
    environment: Mapping[str, str],
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = io.TextIOWrapper(io.BytesIO())
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(n, "w"), "utf-8", line_buffering=True) for n in (1, 2)
    )
    faulthandler.enable()  # where a process dies of itself, it says where
    main(*given)


def arskit(*arguments: str) -> None:
    """Be the command line."""
    from ars_kit.cli import main

    sys.argv = ["arskit", *arguments]
    main()


def script(path: str, *arguments: str) -> None:
    """Be a file of Python that was called."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def call_forked(
    arguments: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    together: bool = False,
) -> Done:
    """Call the command line in a process forked from a warm one, with all of its environment."""
    process = Forked(arskit, *arguments, folder=folder, environment=environment, together=together)
    out, err = process.communicate()
    return Done(list(arguments), process.returncode or 0, out, err)


def call_started(arguments: Sequence[str], *, folder: Path, environment: Mapping[str, str]) -> Done:
    """Call the command line in a process started for it, with all of its environment."""
    return subprocess.run(
        [sys.executable, "-m", "ars_kit", *arguments],
        env={k: v for k, v in environment.items() if k not in QUIET},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
