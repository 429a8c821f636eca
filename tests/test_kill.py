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


def train(out: Path, cache: Path, text: Path, steps: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ars_kit", "run", "--members", "d2..d4", "--out", str(out),
         "--iterations", f"{steps},{steps}", "--data", str(text), "--sequence-length", "32",
         "--batch-size", "4", "--set", "family.vocab_size=300", "--set", "run.save_every=1"],
        env={**os.environ, "ARSKIT_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_kills_end_bitwise_equal(tmp_path: Path, cache: Path, text_folder: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = KILLS * 2
    _, stderr = (process := train(whole, cache, text_folder, steps)).communicate()
    assert process.returncode == 0, stderr
    source, kills = random.Random(0), 0
    while True:
        process = train(killed, cache, text_folder, steps)
        # Long enough to import, and then a moment of training.
        deadline = time.monotonic() + 4 + source.random() * 4
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is not None:
            _, stderr = process.communicate()
            assert process.returncode == 0, stderr
            break
        process.kill()
        process.communicate()
        kills += 1
    hashes = [
        [
            hashlib.sha256((o / m / "model.safetensors").read_bytes()).hexdigest()
            for m in ("d2", "d3", "d4")
        ]
        for o in (whole, killed)
    ]
    assert hashes[0] == hashes[1]
    assert kills >= KILLS, f"only {kills} kills before the run ended; raise the steps"
