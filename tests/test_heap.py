"""What a step frees is there for the next, without asking the system again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from ars_kit.heap import SETTINGS

PROBE = """
import json, resource, torch
from ars_kit.heap import keep_freed_memory

def faults():
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        kept = [torch.ones(30 * 2**18) for _ in range(3)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin

plain, kept = faults(), keep_freed_memory()
faults()
print(json.dumps([plain, kept, faults()]))
"""
"""Counts the pages that ten steps of 90 MB ask the system for, before and after."""


def probed(**told: str) -> tuple[int, bool, int]:
    environment = {k: v for k, v in os.environ.items() if k not in SETTINGS} | told
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True
    )
    plain, kept, after = json.loads(done.stdout)
    return plain, kept, after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of the GNU C library")
def test_what_a_step_frees_is_kept() -> None:
    plain, kept, after = probed()
    assert kept
    assert after < plain / 10


def test_what_the_environment_settles_is_left_alone() -> None:
    for name in SETTINGS:
        assert not probed(**{name: "glibc.malloc.arena_max=2" if "TUNABLES" in name else "1000"})[1]
