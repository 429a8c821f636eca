"""The benchmarks of throughput and of cost against size, on the real code at a very small size."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import throughput
throughput.SIZES["tiny"] = {
    "family.members": "d2", "data.sequence_length": 16, "train.batch_size": 2,
}
found = throughput.compare("tiny", {"train.device": "cpu"}, rounds=2, block=2, threads=1)
print("found", json.dumps(found))
"""


def test_the_loops_do_the_same_work() -> None:
    # In a process of its own, as the benchmark is: what other tests leave in accelerate or torch
    # is no part of it.
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("found ")[2])
    assert len(found["apart"]) == 3
    assert all(share < 1e-3 for share in found["apart"].values())
    assert found["loops"]["bare"]["ratio"] == 1.0
    assert found["loops"]["arskit"]["tokens_per_second"] > 0
    assert found["loops"]["arskit"]["mfu"] is None
    parts = found["parts"]
    assert sum(parts.values()) == pytest.approx(1.0)
    assert {"batches", "forward", "backward", "gates", "base optimizer"} <= parts.keys()
    assert all(share >= 0 for share in parts.values())


OVERHEAD = """
import sys
sys.path.insert(0, sys.argv[1])
import step_overhead
step_overhead.SIZES["tiny"] = {
    "family.members": "d2", "data.sequence_length": 16, "train.batch_size": 2,
}
sys.argv = ["step_overhead.py", "--sizes=tiny", "--rounds=2", "--block=2", *sys.argv[2:]]
step_overhead.main()
"""


def overhead(*flags: str) -> dict[str, Any]:
    command = [sys.executable, "-c", OVERHEAD, str(ROOT), "--threads=1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (size,) = json.loads(Path(flags[-1]).read_text())["sizes"]
    return dict(size)


def test_what_a_step_costs_is_measured(tmp_path: Path) -> None:
    found = overhead("--json", str(tmp_path / "all.json"))
    assert found["loops"].keys() == {"bare", "bare+clip", "adamw", "ars"}
    assert all(loop["q1"] <= loop["ratio"] <= loop["q3"] for loop in found["loops"].values())
    alone = overhead("--gates-alone", "--json", str(tmp_path / "gates.json"))
    assert alone["loops"] == {}
    assert alone["gates"]["ratio"] > 0 < found["gates"]["ratio"]


def test_the_gates_are_left_out_on_the_same_model(tmp_path: Path) -> None:
    import step_overhead
    from loops import our_job

    from ars_kit.host import Host
    from ars_kit.plan import plan_run
    from ars_kit.resolving import resolve
    from ars_kit.store import RunFolder
    from ars_kit.tokens import Batches

    flags = {"family.members": "d2", "data.sequence_length": 16, "train.batch_size": 2}
    plan = plan_run(resolve({**flags, "optimizer.name": "ars"}, {}, None), Host.installed())
    batches = Batches(np.zeros(1000, dtype=np.uint16), sequence_length=16, batch_size=2, seed=0)
    job = our_job(plan, batches, RunFolder(tmp_path))
    other = step_overhead._without_gates(job, tmp_path)
    assert other.model is job.model
    assert other.optimizer.base is job.optimizer.base
    assert job.optimizer.gates.keys() > other.optimizer.gates.keys() == set()


@pytest.mark.parametrize(
    ("benchmark", "flags", "line"),
    [
        ("throughput", ["--sizes=embedded d14", "--precision=fp8"], "throughput.py: .*'fp8'"),
        ("throughput", ["--sizes=1M"], "throughput.py: no size '1M'; there are embedded d14, "),
        ("kept_memory", ["--sizes=1M"], "kept_memory.py: no size '1M'; there are "),
        ("step_overhead", ["--sizes=1M"], "step_overhead.py: no size '1M'; there are "),
        ("growth", ["--kinds=txt"], "growth.py: no kind 'txt'; there are text, "),
        ("growth", ["--sizes=ten"], "growth.py: .*--sizes: 'ten' is not numbers with commas"),
        ("evaluation", ["--depths=x"], "evaluation.py: .*--depths: 'x' is not numbers with"),
        ("vram", ["--trainable=lora:r=0"], "vram.py: .*r must be 1 or more"),
        ("evaluation", ["--data=nowhere"], "evaluation.py: no such file or folder: nowhere"),
    ],
)
def test_flags_that_cannot_be_get_one_line(
    benchmark: str,
    flags: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / f"{benchmark}.py")
    monkeypatch.setattr(sys, "argv", [path, *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert re.match(line, said[-1])
    assert not any("Traceback" in row for row in said)
    assert list(tmp_path.iterdir()) == []


def test_every_benchmark_ends_so() -> None:
    called = [path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text("utf-8")]
    assert called
    for name in called:
        assert (ROOT / name).read_text("utf-8").endswith('"__main__":\n    run(main)\n'), name


def test_large_sizes_are_planned_without_weights(tmp_path: Path) -> None:
    import throughput

    for size, parameters in (("1B", 1.0e9), ("7B", 7.6e9)):
        plan = throughput.plan_of(size, 10, {"train.device": "cpu"}, tmp_path)
        assert plan.members[0].parameters == pytest.approx(parameters, rel=0.25)


def test_a_process_that_keeps_its_memory_is_paired_with_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import kept_memory

    monkeypatch.setattr(kept_memory, "STEPS", {"embedded d14": 4})
    row = kept_memory.train("embedded d14", keeping=False)
    assert row["seconds"] > 0
    assert row["parameters"] == 131112
    asked: list[bool] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append("--keeping" in command)
        return SimpleNamespace(stdout=json.dumps({**row, "seconds": 0.9 if asked[-1] else 1.0}))

    monkeypatch.setattr(kept_memory.subprocess, "run", run)
    found = kept_memory.compare("embedded d14", rounds=3)
    assert asked == [True, False, False, True, True, False]
    assert found["ratio"] == pytest.approx(0.9)
    assert found["seconds"] == [1.0, 0.9]


def figures(ratio: float, clipping: float, plain: float, fabric: float) -> dict[str, Any]:
    def made(r: float) -> dict[str, float]:
        return {"ratio": r, "q1": r, "q3": r}

    loops = {"arskit": made(ratio)}
    return {
        "size": "s",
        "device": "cpu",
        "loops": loops,
        "clipping_trainer_over_arskit": made(clipping),
        "trainer_over_arskit": made(plain),
        "fabric_over_arskit": made(fabric),
    }


@pytest.mark.parametrize(
    ("ratios", "met"),
    [
        ((1.02, 1.01, 1.01, 1.01), [True, True, True, True]),
        ((1.04, 1.01, 1.01, 1.01), [False, True, True, True]),
        ((1.0, 0.99, 1.01, 1.01), [True, False, True, True]),
        ((1.0, 1.01, 0.99, 1.01), [True, True, False, True]),
        ((1.0, 1.01, 1.01, 0.99), [True, True, True, False]),
    ],
)
def test_a_bar_is_met_where_it_is(
    ratios: tuple[float, float, float, float], met: list[bool]
) -> None:
    import throughput

    found = throughput.bars([figures(*ratios)])
    assert [bar["met"] for bar in found] == met


def test_every_cost_is_measured(tmp_path: Path) -> None:
    import growth

    sizes = {"text": 1, "checkpoint": 1, "history": 50, "family": 2, "growth": 11}
    assert sizes.keys() == growth.MEASURES.keys() == growth.DEFAULT.keys() == growth.UNITS.keys()
    for kind, size in sizes.items():
        found = growth.measure(kind, [size])
        assert found["exponents"]["seconds"] is None
        assert found["points"][0]["seconds"] > 0


def test_what_grows_worse_than_in_proportion_is_named() -> None:
    import growth

    points = [{"size": s, "seconds": s**2 / 100, "verify_seconds": s} for s in (10.0, 20.0)]
    exponents = {key: growth.exponent(points, key) for key in ("seconds", "verify_seconds")}
    assert exponents == pytest.approx({"seconds": 2.0, "verify_seconds": 1.0})
    assert growth.worse([{"kind": "x", "exponents": exponents}]) == ["x: seconds, exponent 2.00"]
    for volume, named in ((1.9, []), (1.8, ["x: seconds, exponent 2.00"])):
        held = {**exponents, "plain_seconds": volume}
        assert growth.worse([{"kind": "x", "exponents": held}]) == named
