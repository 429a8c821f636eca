"""Starts a test's file twice, as two processes of one run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping


def rendezvous() -> dict[str, str]:
    """Return the environment in which two processes find each other, as a launcher sets it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def run_two(
    script: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    ends: tuple[int, int] = (0, 0),
) -> None:
    """Run a file in two processes, each given its rank and the arguments, and await their ends."""
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), *map(str, arguments)],
            env={**os.environ, **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process, end in zip(ranks, ends, strict=True):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == end, errors[-3000:]
