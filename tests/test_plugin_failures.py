"""What becomes of a run whose plugin breaks: named, nothing lost, gone on with once mended."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ars_kit.cli import main

Run = Callable[..., "Ended"]


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


GATE = """
import sys
import torch
from ars_kit.spec import Damping, Offer, hookimpl

class Gate:
    def __init__(self):
        self.seen = 0
        {made}

    def __call__(self, signal):
        self.seen += 1
        if signal.step == {step}:
            {breaks}
        return signal.loss.new_full((), 1 / (1 + self.seen % 3))

    def state_dict(self):
        return {{"seen": {state}}}

    def load_state_dict(self, state):
        self.seen = state["seen"]

@hookimpl
def arskit_gates():
    return [Offer("mine", "for a test", Gate)]
"""

OTHER = """
import sys
from ars_kit.spec import Document, InheritanceStrategy, Offer, hookimpl

def {name}():
    {body}

class Scratch:
    inherits = True
    def supports(self, parent, child):
        {supports}
    def inherit(self, parent, birth):
        {inherit}

class Source:
    def fingerprint(self):
        return {{}}
    def documents(self):
        {documents}

@hookimpl
def arskit_{kind}():
    return [Offer("mine", "for a test", {make})]
"""


def gate(step: int, breaks: str = "pass", made: str = "pass", state: str = "self.seen") -> str:
    return GATE.format(step=step, breaks=breaks, made=made, state=state)


@pytest.fixture
def run(
    tmp_path: Path,
    cache: Path,
    undrawn: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Call the command line beside an installed distribution ``arskit-broken 0.3``."""
    site = tmp_path / "site"
    info = site / "arskit_broken-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: arskit-broken\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[ars_kit]\nbroken = arskit_broken\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARSKIT_CACHE", str(cache))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # or a newer source may go unseen

    def call(source: str, *args: str) -> Ended:
        (site / "arskit_broken.py").write_text(source)
        importlib.invalidate_caches()
        sys.modules.pop("arskit_broken", None)
        monkeypatch.setattr(sys, "argv", ["arskit", *args])
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        return Ended(code, *capsys.readouterr())

    return call


@pytest.fixture
def options(tiny: list[str]) -> list[str]:
    return [*tiny, "--members", "d2", "--iterations", "30,4", "--set", "run.save_every=25",
            "--gate", "mine", "--set", "train.max_skipped=5"]  # fmt: skip


def kept(folder: Path) -> list[str]:
    return [p.name for p in folder.glob("checkpoints/.arskit/state/d2/step-*")]


def weights(folder: Path) -> str:
    file = folder / "checkpoints" / "d2" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        ("raise RuntimeError('boom')", "failed at step 57: RuntimeError('boom')"),
        ("sys.exit(9)", "failed at step 57: SystemExit(9)"),
        ("return 0.5", "returned float at step 57"),
        ("return Damping(step=0.5)", "returned float at step 57"),
        ("return torch.ones(2)", "returned a gradient of shape (2,)"),
    ],
)
def test_a_gate_that_breaks_at_step_57_is_named_and_the_run_goes_on_from_there_once_mended(
    breaks: str, message: str, options: list[str], run: Run, tmp_path: Path
) -> None:
    done = run(gate(57, f"self.seen -= 1; {breaks}"), "run", *options)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("arskit: ")]
    assert line.startswith("arskit: damping gate 'mine' of plugin 'broken' (arskit-broken 0.3) ")
    assert message in line
    assert "the state after 57 steps is kept" in line
    assert kept(tmp_path) == ["step-00000057"]
    status = json.loads(run(gate(-1), "status", "--json").stdout)
    assert (status[0]["state"], status[0]["steps"]) == ("training", 57)

    mended = run(gate(57), "run", *options)
    assert mended.returncode == 0, mended.stderr
    if breaks.startswith("raise"):
        before = weights(tmp_path)
        whole = run(gate(-1), "run", *options, "--restart")
        assert whole.returncode == 0, whole.stderr
        assert weights(tmp_path) == before, "bitwise as if it had never broken"


@pytest.mark.parametrize("value", ["float('nan')", "1.5", "-0.1"])
def test_a_factor_that_is_none_is_found_when_losses_are_read_and_kept_out_of_every_state(
    value: str, options: list[str], run: Run, tmp_path: Path
) -> None:
    broken = gate(57, f"return torch.tensor({value})")
    done = run(broken, "run", *options)
    assert done.returncode == 4, done.stderr
    assert "outside [0, 1] or not finite at step 57, 1 times before step 60" in done.stderr
    assert "(arskit-broken 0.3)" in done.stderr
    assert "the state after 50 steps is kept" in done.stderr
    assert kept(tmp_path) == ["step-00000050"]
    assert run(gate(-1), "run", *options).returncode == 0


def test_a_state_that_cannot_be_saved_is_named(options: list[str], run: Run) -> None:
    done = run(gate(-1, state="object()"), "run", *options)
    assert done.returncode == 4, done.stderr
    assert "'mine' of plugin 'broken' (arskit-broken 0.3) has a state that cannot" in done.stderr
    assert "/seen holds a object" in done.stderr


def test_a_state_that_is_not_taken_back_is_named(options: list[str], run: Run) -> None:
    run(gate(57, "raise RuntimeError('boom')"), "run", *options)
    other = gate(-1).replace('self.seen = state["seen"]', 'self.seen = state["new"]')
    done = run(other, "run", *options)
    assert done.returncode == 4, done.stderr
    assert "(arskit-broken 0.3) could not take its state back: KeyError('new')" in done.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_this_name", "failed to load: ModuleNotFoundError"),
        ("def broken(:", "failed to load: SyntaxError"),
        ("import sys; sys.exit(3)", "failed to load: SystemExit(3)"),
        ("ARSKIT_API = 99", "is written for plugin API 99"),
        (gate(0, made="sys.exit(3)"), "failed when it was made: SystemExit(3)"),
        (gate(0).replace("def __call__", "def call"), "has no __call__"),
        (gate(0).replace("def state_dict", "def states"), "is a Gate, which has no state_dict"),
        (gate(0).replace('"mine"', '"clip"'), "no damping gate named 'mine'"),
    ],
)
def test_a_gate_that_cannot_be_had_stops_the_run_before_it_trains(
    source: str, message: str, options: list[str], run: Run, tmp_path: Path
) -> None:
    done = run(source, "run", *options)
    assert done.returncode == 4, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if "clip" not in source:
        assert "(arskit-broken 0.3)" in done.stderr
    assert not (tmp_path / "checkpoints").exists()
    assert run(source, "plugins", "list").returncode == 0
    if "class Gate" not in source:
        alone = run(source, "plan", *options[: options.index("--gate")])
        assert alone.returncode == 0, "without that gate a run goes on"
        assert alone.stderr.startswith("arskit: plugin 'broken' (arskit-broken 0.3) ")


def other(kind: str, make: str, body: str = "pass", **parts: str) -> str:
    filled = {"supports": "return None", "inherit": "pass", "documents": "yield 1", **parts}
    return OTHER.format(kind=kind, make=make, name="made", body=body, **filled)


@pytest.mark.parametrize(
    ("source", "chosen", "message"),
    [
        (
            other("evaluators", "lambda: made", "sys.exit(5)").replace("made()", "made(member)"),
            ["--eval", "mine"],
            "evaluator 'mine' of plugin 'broken' (arskit-broken 0.3) failed judging d2: SystemExit",
        ),
        (
            other("evaluators", "lambda: made", "return {'x': 'y'}").replace("made()", "made(m)"),
            ["--eval", "mine"],
            "'x': 'y' is no figure by name",
        ),
        (
            other(
                "evaluators", "lambda: made", "return {'tokens': 1, 'mine': 2, 'steps': 3}"
            ).replace("made()", "made(member)"),
            ["--eval", "mine"],
            "(arskit-broken 0.3) returned steps, tokens, which the run measures itself; d2 is",
        ),
        (
            other("strategies", "Scratch", supports="1 / 0"),
            ["--strategy", "mine"],
            "(arskit-broken 0.3) failed asked what it supports: ZeroDivisionError",
        ),
        (
            other("strategies", "Scratch", inherit="raise KeyError('gone')"),
            ["--strategy", "mine"],
            "(arskit-broken 0.3) failed at the birth of d3: KeyError('gone')",
        ),
        (
            other("strategies", "Scratch"),
            ["--strategy", "mine"],
            "'mine' bore a NoneType, no Seed",
        ),
        (
            other("data_sources", "Source"),
            ["--data", "mine"],
            "failed at document 0: TypeError('it yielded 1, no Document of text')",
        ),
        (
            other("optimizers", "lambda params, *, lr: None"),
            ["--base-optimizer", "mine"],
            "optimizer 'mine' of plugin 'broken' (arskit-broken 0.3) is a NoneType, which has no",
        ),
    ],
)
def test_every_kind_of_plugin_is_named_where_it_breaks(
    source: str, chosen: list[str], message: str, tiny: list[str], run: Run
) -> None:
    done = run(source, "run", *tiny, "--members", "d2,d3", *chosen)
    assert done.returncode == 4, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_member_is_judged_without_the_evaluator_that_broke(
    tiny: list[str], run: Run, tmp_path: Path
) -> None:
    one = [*tiny, "--members", "d2"]
    body = other("evaluators", "lambda: made", "1 / 0").replace("made()", "made(member)")
    assert run(body, "run", *one, "--eval", "mine").returncode == 4
    assert kept(tmp_path) == ["step-00000018"]
    done = run("", "run", *one, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["members"][0]["heldout_loss"] > 0


def test_the_held_out_loss_is_measured_whoever_else_judges(tiny: list[str], run: Run) -> None:
    body = other("evaluators", "lambda: made", "return {'mine': 2.0}").replace("made()", "made(m)")
    one = ["--members", "d2", "--eval", "mine", "--json"]
    done = run(body, "run", *tiny, *one)
    assert done.returncode == 0, done.stderr
    (metrics,) = json.loads(done.stdout)["members"]
    assert metrics["mine"] == 2.0
    assert metrics["heldout_loss"] > 0


def test_a_second_signal_leaves_at_once_and_nothing_is_lost(
    options: list[str], run: Run, tmp_path: Path
) -> None:
    """The step that the first signal waits for takes a minute here."""
    run(gate(30, "import time; time.sleep(60)"), "plugins", "list")  # writes the plugin
    command = [sys.executable, "-m", "ars_kit", "run", *options]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, stderr=subprocess.PIPE
    )
    for _ in range(1200):
        if kept(tmp_path) or process.poll() is not None:
            break
        time.sleep(0.05)
    time.sleep(1)  # on to step 30
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM, stderr
    assert kept(tmp_path) == ["step-00000025"]
    assert run(gate(-1), "run", *options).returncode == 0


def test_what_a_plugin_prints_when_it_is_loaded_is_no_result(run: Run) -> None:
    done = run("print('hello')", "plugins", "list", "--json")
    assert json.loads(done.stdout)["quarantined"] == []
    assert "hello" in done.stderr
