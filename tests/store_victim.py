"""A make-believe training run that commits all the time, and a master that kills it.

Usage: ``python store_victim.py FOLDER KILLS SEED``. Each round forks a victim, which goes on from
what the folder holds, kills it with SIGKILL after a random while, and looks at what it left: every
step the victim reported as saved is still there or exceeded, all hashes agree, nothing is torn.
In the end the family equals one that was never interrupted, byte for byte. Prints JSON.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # forking is only sound from a single thread

import torch
from safetensors.torch import save_file

from ars_kit.history import read_history
from ars_kit.store import RunFolder, verify

SAVE_EVERY = 2


def train(folder: RunFolder, members: int, steps: int, report: int | None) -> None:
    """Train a family of ``members``, going on from what is there."""
    with folder.lock():
        parent = None
        for name in (f"m{i}" for i in range(members)):
            if folder.has(name):
                folder.heal_lineage(name, parent)
            else:
                train_member(folder, name, parent, steps, report)
            if parent:
                folder.states(parent).drop()
            parent = name


def train_member(
    folder: RunFolder, name: str, parent: str | None, steps: int, report: int | None
) -> None:
    step, tree = folder.states(name).load() or (0, {"w": torch.full((2000,), 1.0), "seen": []})
    folder.states(name).prune()
    folder.states(name).cut(step)
    while step < steps:
        tree = {"w": tree["w"] * 1.01 + step, "seen": [*tree["seen"], step]}
        folder.states(name).append([{"step": step, "loss": float(tree["w"][0])}])
        step += 1
        if step % SAVE_EVERY == 0:
            folder.states(name).save(tree, step=step)
            if report is not None:
                os.write(report, f"{name} {step}\n".encode())

    def files(to: Path) -> None:
        save_file({"w": tree["w"]}, to / "model.safetensors")
        (to / "history.jsonl").write_bytes(folder.history_path(name).read_bytes())

    folder.commit_member(name, files, parent=parent, facts={"steps": step})
    if report is not None:
        os.write(report, f"{name} {step + 1}\n".encode())


def one_life(folder: RunFolder, members: int, steps: int, patience: float) -> tuple[bool, str]:
    """Fork a victim and kill it after ``patience`` seconds of work.

    Returns:
        Whether it finished first, and the last step that it reported.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.write(writer, b"m0 0\n")
        code = 1
        try:
            train(folder, members, steps, writer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    select.select([reader], [], [])
    time.sleep(patience)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    text = b""
    while part := os.read(reader, 65536):
        text += part
    os.close(reader)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the victim failed by itself")
    return os.WIFEXITED(status), text.decode().splitlines()[-1]


def inspect(folder: RunFolder, reported: str, steps: int) -> None:
    """Look at what a killed victim left."""
    name, number = reported.split()
    done = int(number)
    if done > steps:
        assert folder.has(name), f"{name} was committed and is gone"
    elif not folder.has(name):
        found = folder.states(name).load()
        assert (found[0] if found else 0) >= done, f"{name} {done} was saved, {found} is there"
        if found:
            step, tree = found
            assert tree["seen"] == list(range(step))
            rows = read_history(folder.history_path(name))
            assert [r["step"] for r in rows][:step] == list(range(step))
    if folder.members():
        _, problems = verify(folder.path)
        # A member may have been committed a moment before its lineage; the next life enters it.
        assert [p for p in problems if not p.endswith("not in lineage.json")] == []
    with folder.lock():
        assert not list(folder.private.glob("tmp-*"))


def fingerprint(folder: RunFolder) -> dict[str, bytes]:
    return {
        p.relative_to(folder.path).as_posix(): p.read_bytes()
        for p in sorted(folder.path.rglob("*"))
        if p.is_file() and p.name != "lock"
    }


def main(out: Path, kills: int, seed: int) -> None:
    """Kill until the number is reached, then compare."""
    rng = random.Random(seed)
    torch.set_num_threads(1)
    members, steps = 3, 10
    whole = RunFolder(out / "whole")
    started = time.perf_counter()
    train(whole, members, steps, None)
    usual = time.perf_counter() - started
    expected = fingerprint(whole)
    killed = families = 0
    while killed < kills:
        folder = RunFolder(out / f"family-{families}")
        finished = False
        while not finished:
            # Short lives, so that a family is killed several times before it is whole.
            finished, reported = one_life(folder, members, steps, rng.uniform(0, usual / 3))
            if not finished:
                killed += 1
                inspect(folder, reported, steps)
        families += 1
        assert verify(folder.path)[1] == []
        assert fingerprint(folder) == expected, "a killed family is not the uninterrupted one"
    sys.stdout.write(json.dumps({"killed": killed, "families": families}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
