"""Starts a test's file twice, as two processes of one run."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from commands import Forked, script


def rendezvous() -> dict[str, str]:
    """Return the environment in which two processes find each other, as a launcher sets it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def run_two(
    path: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    ends: tuple[int, int] = (0, 0),
) -> None:
    """Run a file in two processes, each given its rank and the arguments, and await their ends."""
    ranks = [
        Forked(
            script,
            path,
            str(rank),
            *map(str, arguments),
            folder=Path.cwd(),
            environment={
                **os.environ, **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate()[1] for process in ranks]
    ended = tuple(process.returncode for process in ranks)
    # The one that broke leaves its peer a closed connection: both say why.
    assert ended == ends, "\n".join(
        f"--- rank {rank} ended with {ended[rank]}:\n{errors[-3000:]}"
        for rank, errors in enumerate(said)
    )
