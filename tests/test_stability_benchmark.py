"""The benchmark of stability: its own arithmetic, and the real code at a very small size."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a small text, {i * i}.\n" for i in range(300)))
    return path


def moments(steps: int, calm: int = 0, seed: int = 3) -> list[Any]:
    from stability.provocations import Moment

    return [Moment(seed, step, steps, calm) for step in range(steps)]


def altered(name: str, steps: int, calm: int = 0, seed: int = 3) -> list[bool]:
    from stability.provocations import PROVOCATIONS

    alter = PROVOCATIONS[name].alter
    assert alter is not None
    batch = np.frombuffer(b"abcdefghijklmnopqrstuvwxyzabcdef" * 4, np.uint8).reshape(4, 32)
    return [not np.array_equal(alter(m, batch), batch) for m in moments(steps, calm, seed)]


def test_a_paired_interval_is_students() -> None:
    from stability.figures import paired

    a = {1: 1.0, 2: 2.0, 3: 4.0, 9: 100.0}
    found = paired(a, {1: 0.0, 2: 0.0, 3: 0.0})
    assert (found.n, found.dead) == (3, 0)
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.303 * math.sqrt(7 / 3) / math.sqrt(3))
    assert not found.clear
    assert paired({1: 1.0, 2: 1.1, 3: 0.9}, {1: 0.0, 2: 0.0, 3: 0.0}).clear


def test_a_dead_run_is_counted_and_never_averaged() -> None:
    from stability.figures import Table, figure

    found = figure({1: 2.0, 2: None, 3: 4.0})
    assert (found.mean, found.n, found.dead) == (3.0, 3, 1)
    assert figure({1: None}).mean is None
    table = Table({("x", "a"): {1: 9.0, 2: 9.0}, ("x", "b"): {1: 1.0, 2: None}, ("x", "c"): {3: 1}})
    assert table.better("x", "a", "b") is True
    assert table.better("x", "b", "a") is False
    assert table.better("x", "a", "c") is None
    assert table.best("x", ["a", "b"]) == "a"
    assert table.deaths("x", "a", "b") == "b dead 1/2"
    assert table.deaths("x", "b", "a") == "dead 1/2"


def scores(**changed: float | None) -> Any:
    """Return a table in which ARS clears every bar, but for what is changed."""
    from stability.bars import PEERS
    from stability.figures import Table
    from stability.provocations import PROVOCATIONS

    found: dict[tuple[str, str], dict[int, float | None]] = {}
    for p in PROVOCATIONS:
        for m in (*PEERS, "ars", "ars-without-entropy"):
            mean = 2.0 if p == "clean" else 2.1
            if m == "ars":
                mean = 1.99 if p == "clean" else 2.0
            if p == "oscillation":
                mean = 0.1 if m == "ars" else 0.2
            found[p, m] = {1: mean - 0.01, 2: mean + 0.01}
    for name, value in changed.items():
        place = tuple(name.split("__"))
        found[place[0].replace("_", "-"), place[1]] = {1: value, 2: value}
    return Table(found)


def judged(table: Any) -> dict[str, bool | None]:
    from stability.bars import bars
    from stability.provocations import PROVOCATIONS

    return {b.claim.split(":")[0].split(" by")[0]: b.met for b in bars(table, list(PROVOCATIONS))}


def test_the_bars_are_met_where_they_are_met() -> None:
    assert set(judged(scores()).values()) == {True}


@pytest.mark.parametrize(
    ("change", "bar"),
    [
        ({"corrupt_10__ars": 2.05}, "corrupt-10"),
        ({"nonfinite__ars": None}, "nonfinite"),
        ({"nonfinite__ars": 2.01}, "nonfinite"),
        ({"shift__ars": 2.15}, "in no provocation worse than the best peer"),
        ({"clean__ars": 2.007}, "clean"),
        ({"oscillation__ars": 0.16}, "oscillation"),
        (
            {f"{p}__ars": 2.2 for p in ("bursts", "spikes", "shift", "period_8")},
            "better than clip and zclip in at least 7 of 10 provocations",
        ),
    ],
)
def test_a_bar_is_not_met_where_it_is_not(change: dict[str, float | None], bar: str) -> None:
    assert judged(scores(**change))[bar] is False


def test_a_run_of_clean_text_alone_judges_no_provocation() -> None:
    from stability.bars import bars
    from stability.figures import Table

    table = Table({place: seeds for place, seeds in scores().scores.items() if place[0] == "clean"})
    known = {b.claim.split(":")[0]: b.met for b in bars(table, ["clean"])}
    assert {claim for claim, met in known.items() if met is not None} == {"clean"}


def test_provocations_are_functions_of_seed_and_step() -> None:
    for name in ("corrupt-10", "corrupt-2", "bursts", "period-8"):
        assert altered(name, 300) == altered(name, 300)
    assert altered("corrupt-10", 300) != altered("corrupt-10", 300, seed=4)
    assert not any(altered("corrupt-10", 300, calm=300))


def test_provocations_do_what_they_say() -> None:
    assert 0.08 < np.mean(altered("corrupt-10", 3000)) < 0.12
    assert 0.01 < np.mean(altered("corrupt-2", 3000)) < 0.03
    bursts = "".join("x" if hit else "." for hit in altered("bursts", 500))
    assert sorted(len(run) for run in bursts.split(".") if run) == [6] * 10
    assert altered("period-8", 16) == ([False] * 4 + [True] * 4) * 2
    assert altered("shift", 10) == [False] * 3 + [True] * 7


def test_gradients_are_struck_where_they_are_meant_to_be() -> None:
    from stability.provocations import PROVOCATIONS

    spikes = broken = 0
    for moment in moments(1000):
        gradients = [torch.ones(8, 4), torch.ones(5)]
        strike = PROVOCATIONS["spikes"].strike
        assert strike is not None
        strike(moment, gradients)
        spikes += bool(gradients[1].norm() > 50 * math.sqrt(5))
        gradients = [torch.ones(8, 4), torch.ones(5)]
        strike = PROVOCATIONS["nonfinite"].strike
        assert strike is not None
        strike(moment, gradients)
        broken += sum(int((~g.isfinite()).sum()) for g in gradients)
    assert 10 <= spikes <= 30
    assert 10 <= broken <= 30


def step_of(method: str, norm: float, before: int = 200, usual: float = 0.5) -> float:
    """Return the gradient norm that a method lets through after steps of a usual norm."""
    from stability.methods import SkipStep, ZClip

    prepare = {"zclip": ZClip, "skipstep": SkipStep}[method]()
    p = torch.nn.Parameter(torch.zeros(4))
    noise = np.random.default_rng(0).normal(0, 0.02, before)
    took = True
    for n in [*(usual + noise).tolist(), norm]:
        p.grad = torch.tensor([n, 0.0, 0.0, 0.0])
        took = prepare([p], torch.tensor(1.0 + n / 100))
    assert p.grad is not None
    return p.grad.norm().item() if took else 0.0


def test_zclip_pulls_an_outlier_back_to_the_usual_norm() -> None:
    assert step_of("zclip", 0.51) == pytest.approx(0.51, abs=1e-4)
    # z = 475 at sigma 0.02: what is left is the mean, and 2.5^2 / 475 sigmas on top.
    assert step_of("zclip", 10.0) == pytest.approx(0.5, abs=0.02)


def test_what_is_ruined_is_what_is_altered() -> None:
    from stability.provocations import PROVOCATIONS

    for name in ("corrupt-10", "corrupt-2", "bursts"):
        ruins = PROVOCATIONS[name].ruins
        assert ruins is not None
        assert [ruins(m) for m in moments(300, calm=20)] == altered(name, 300, calm=20)
        assert any(altered(name, 300, calm=20))


def test_the_oracle_stops_the_gradients_of_what_is_ruined() -> None:
    from stability.methods import ORACLE, installed_methods

    weight = torch.nn.Parameter(torch.zeros(4))
    group = {"params": [weight], "role": "vector", "lr": 0.1, "weight_decay": 0.0}
    stepper = installed_methods()[0][ORACLE].make([group])
    for ruined, moved in ((True, False), (False, True)):
        before = weight.detach().clone()
        weight.grad = torch.ones(4)
        assert stepper.told is not None
        stepper.told.ruined = ruined
        stepper.step(torch.tensor(1.0), 0.1)
        assert bool((weight != before).any()) is moved


def test_verdicts_follow_the_interval_and_the_dead() -> None:
    from stability.figures import Table
    from stability.report import verdicts

    near, far = {1: 2.0, 2: 2.1, 3: 2.2}, {1: 2.5, 2: 2.6, 3: 2.7}
    unsure = {1: 2.3, 2: 2.0, 3: 2.25}
    cases = {"clean": (near, far), "shift": (far, near), "bursts": (unsure, near),
             "nonfinite": (near, dict.fromkeys(near))}  # fmt: skip
    table = Table(
        {(p, m): s for p, pair in cases.items() for m, s in zip(("ars", "clip"), pair, strict=True)}
    )
    found = {v.provocation: v for v in verdicts(table, cases)}
    words = {p: v.word for p, v in found.items()}
    assert words == {"clean": "helps", "shift": "hurts", "bursts": "no difference shown",
                     "nonfinite": "helps"}  # fmt: skip
    assert found["clean"].peer == "clip"
    assert found["nonfinite"].peer is None
    assert found["nonfinite"].clip_dead == 3


def test_runs_of_two_codes_are_compared(tmp_path: Path) -> None:
    from stability.runner import Book, Key, Outcome

    book = Book(tmp_path / "book.jsonl")
    for code, score in (("old", 2.0), ("new", 2.0), ("other", 2.5)):
        for seed in (1, 2) if code == "old" else (1,):
            key = Key("tiny", 9, "ars", code, "clean", seed, 0.1, "t", "v")
            book.add(key, Outcome(score, None, 3.0, 1.0))
    assert book.code_of("ars", "new", "tiny", 9) == "old"
    assert book.compared("ars", "old", "new") == (1, 1)
    assert book.compared("ars", "old", "other") == (0, 1)
    assert book.compared("ars", "old", "absent") == (0, 0)


def test_skipstep_skips_an_outlier_and_what_is_not_finite() -> None:
    assert step_of("skipstep", 0.51) == pytest.approx(0.51, abs=1e-4)
    assert step_of("skipstep", 10.0) == 0.0
    assert step_of("skipstep", math.nan) == 0.0
    assert step_of("skipstep", 10.0, before=20) == pytest.approx(1.0, abs=1e-3)


def test_runs_repeat_exactly_and_guards_show(text_file: Path, tmp_path: Path) -> None:
    from stability.methods import installed_methods
    from stability.runner import Book, Key, run_all
    from stability.task import SIZES, file_text

    text, size = file_text(text_file), replace(SIZES["tiny"], steps=80, calm=1)
    methods, _ = installed_methods()

    def key(method: str, provocation: str) -> Key:
        code = methods[method].code  # of seed 4, gradients are infinite at step 50
        return Key("tiny", 80, method, code, provocation, 4, 1e-2, text.digest, torch.__version__)

    keys = [key(m, p) for m in ("clip", "ars") for p in ("clean", "nonfinite")]
    said: list[str] = []
    books = [Book(tmp_path / f"{i}.jsonl") for i in range(2)]
    for book in books:
        run_all(keys, size, text, book, said.append)
    first, second = ({k: (o.score, o.died, o.peak) for k, o in b.outcomes.items()} for b in books)
    assert first == second
    assert first[keys[0]][0] is not None
    assert first[keys[1]][0] is None, "an infinite gradient kills a clipped run"
    assert first[keys[3]][0] is not None, "and ARS skips it"

    assert books[0].code_of("ars", methods["ars"].code, "tiny", 80) == methods["ars"].code
    assert books[0].code_of("ars", "newer", "tiny", 80) == methods["ars"].code
    assert books[0].code_of("ars", "newer", "small", 80) == "newer"

    said.clear()
    again = Book(tmp_path / "0.jsonl")
    assert again.outcomes == books[0].outcomes
    run_all(keys, size, text, again, said.append)
    assert said == ["4 of 4 runs are done already"]


@pytest.mark.gpu
def test_every_method_runs_through_every_provocation_on_a_gpu(
    text_file: Path, tmp_path: Path
) -> None:
    from stability.methods import installed_methods
    from stability.provocations import PROVOCATIONS
    from stability.runner import Book, Key, run_all
    from stability.task import SIZES, file_text

    text, size = file_text(text_file), replace(SIZES["tiny"], steps=40, calm=1)
    keys = [
        Key(
            "tiny", 40, name, method.code, p, 1, 1e-2, text.digest, torch.__version__, device="cuda"
        )
        for name, method in installed_methods()[0].items()
        for p in PROVOCATIONS
        if p in (method.only or PROVOCATIONS)
    ]
    book = Book(tmp_path / "gpu.jsonl")
    run_all(keys, size, text, book, lambda _: None)
    assert book.outcomes.keys() == set(keys)
    assert all(o.score is not None for k, o in book.outcomes.items() if k.provocation == "clean")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_not_taken_by_itself() -> None:
    from click import BadParameter

    command = runpy.run_path(str(ROOT / "stability.py"))
    for parameters in (10, 20_000_000):
        assert command["_device"]("auto", parameters) == "cpu"
    with pytest.raises(BadParameter, match="torch sees no GPU here"):
        command["_device"]("cuda", 10)


def test_a_gpu_is_taken_for_large_models(monkeypatch: pytest.MonkeyPatch) -> None:
    command = runpy.run_path(str(ROOT / "stability.py"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command["_device"]("auto", 111_296) == "cpu"
    assert command["_device"]("auto", 11_236_160) == "cuda"
    assert command["_device"]("cpu", 11_236_160) == "cpu"


def test_results_that_name_no_device_are_of_a_cpu(tmp_path: Path) -> None:
    from stability.runner import Book, Key, Outcome

    path = tmp_path / "book.jsonl"
    key = Key("tiny", 9, "ars", "code", "clean", 1, 0.1, "t", "v")
    Book(path).add(key, Outcome(2.0, None, 3.0, 1.0))
    row = json.loads(path.read_text())
    assert row["key"].pop("device") == "cpu"
    path.write_text(json.dumps(row) + "\n")
    book = Book(path)
    assert key in book.outcomes
    assert book.code_of("ars", "newer", "tiny", 9) == "code"
    assert book.code_of("ars", "newer", "tiny", 9, "cuda") == "newer"


def test_the_command_writes_its_report(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "stability"
    subprocess.run(
        [
            sys.executable, ROOT / "stability.py", "--model=tiny", "--seeds=2", "--lr=0.01",
            "--methods=clip,ars,ars-without-entropy", f"--text={text_file}", f"--out={out}",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    tree = json.loads(out.with_suffix(".json").read_text())
    rows = {(r["provocation"], r["method"]): r for r in tree["results"]}
    assert len(rows) == 33
    mine, clip = (rows["clean", m]["scores"] for m in ("ars", "clip"))
    mean = sum(mine[s] - clip[s] for s in ("1", "2")) / 2
    assert rows["clean", "ars"]["against_clip"]["mean"] == pytest.approx(mean, abs=1e-9)
    assert rows["clean", "ars"]["damage"]["mean"] == 0.0
    page = out.with_suffix(".md").read_text()
    assert "| **no** |" in page or "| yes |" in page
    assert str(tmp_path) not in page
    assert "- ars-without-entropy: clean, corrupt-10, corrupt-2" in page
    assert out.with_suffix(".svg").read_text().count("<circle") == 22
