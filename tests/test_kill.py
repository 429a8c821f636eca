"""The long kill loop: SIGKILL at random moments, many times. Run by ``make kill-test``."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = int(os.environ.get("ARSKIT_TEST_KILLS", "200"))
STEPS = 20
"""Optimizer steps there must be for each kill, all members together, lest the run ends early."""


def train(out: Path, cache: Path, text: Path) -> subprocess.Popen[bytes]:
    iterations = KILLS * STEPS // 9  # three members, three steps an iteration
    return subprocess.Popen(
        [sys.executable, "-m", "ars_kit", "run", "--members", "d2..d4", "--out", str(out),
         "--iterations", f"{iterations},{iterations}", "--data", str(text),
         "--sequence-length", "32", "--batch-size", "4", "--set", "family.vocab_size=300",
         "--set", "run.save_every=2", "--set", "run.log_every=1"],
        env={**os.environ, "ARSKIT_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_progress(process: subprocess.Popen[bytes], out: Path) -> None:
    """Return once a training state appears that was not there before, or the run ends."""
    before = set(out.glob(".arskit/state/*/step-*"))
    while process.poll() is None:
        if set(out.glob(".arskit/state/*/step-*")) - before:
            return
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_kills_end_bitwise_equal(tmp_path: Path, cache: Path, text_folder: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, stderr = (process := train(whole, cache, text_folder)).communicate()
    assert process.returncode == 0, stderr
    draw = random.Random(0)
    for kill in range(KILLS):
        process = train(killed, cache, text_folder)
        if kill % 10 == 9:
            time.sleep(draw.uniform(0, 6))  # while it starts, reads its state, or is born
        else:
            wait_for_progress(process, killed)
            time.sleep(draw.uniform(0, 0.1))
        assert process.poll() is None, f"the run ended after {kill} kills; raise STEPS"
        process.kill()
        process.communicate()
    _, stderr = (process := train(killed, cache, text_folder)).communicate()
    assert process.returncode == 0, stderr
    hashes = [
        [
            hashlib.sha256((o / m / "model.safetensors").read_bytes()).hexdigest()
            for m in ("d2", "d3", "d4")
        ]
        for o in (whole, killed)
    ]
    assert hashes[0] == hashes[1]
