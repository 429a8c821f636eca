"""The inheritance benchmark's own arithmetic, and one comparison at a very small size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def cost(scale: Any, members: Any) -> float:
    by_name = {m.name: f for m, f in zip(scale.members, scale.per_token, strict=True)}
    return math.fsum(by_name[m.name] * m.tokens for m in members)


@pytest.mark.parametrize("arm", ["lineage", "trunk", "jump", "duplicate", "no-growth"])
@pytest.mark.parametrize("kappa", [0.8, 1.0, 1.25])
def test_a_layout_costs_what_it_is_given(arm: str, kappa: float) -> None:
    from inheritance.arms import ARMS
    from inheritance.scale import SCALES

    scale = SCALES["full"]
    spent = cost(scale, ARMS[arm].layout(scale, kappa))
    assert spent == pytest.approx(kappa * scale.costs[-1], rel=5e-3)


def test_pruning_pays_for_the_largest_and_for_the_teachers() -> None:
    from inheritance.arms import prune
    from inheritance.scale import SCALES

    scale = SCALES["full"]
    members = prune(scale, 1.2)
    teachers = math.fsum(
        above / 3 * m.tokens for m, above in zip(members, scale.per_token[1:], strict=False)
    )
    spent = cost(scale, members) + teachers
    assert spent == pytest.approx(1.2 * scale.costs[-1], rel=5e-3)


def test_every_arm_has_a_colour_of_its_own() -> None:
    from inheritance.arms import ARMS
    from inheritance.plot import COLOURS

    assert COLOURS.keys() == ARMS.keys()
    assert len(set(COLOURS.values())) == len(ARMS)


def test_a_lineage_is_early_where_it_is_cheap() -> None:
    from inheritance.arms import lineage
    from inheritance.scale import SCALES

    scale = SCALES["full"]
    members = lineage(0.3)(scale, 1.0)
    spent = [cost(scale, members[: i + 1]) / c for i, c in enumerate(scale.costs)]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] == pytest.approx(1.3, abs=0.01)
    assert spent[-1] == pytest.approx(1.0, abs=0.005)


def results(gaps: dict[float, list[float]], seeds: int = 2) -> Any:
    """Return results in which a lineage of two is ``gaps`` behind scratch, by its budget."""
    from inheritance.figures import Results
    from inheritance.runner import Born, Key
    from inheritance.scale import SCALES, Scale

    tiny = SCALES["tiny"]
    scale = Scale(**{**tiny.__dict__, "shapes": tiny.shapes[:2]})

    def key(arm: str, kappa: float, seed: int) -> Key:
        return Key("tiny", arm, kappa, seed, 0.01, 0.5, "adamw", "text")

    def born(size: int, loss: float, flops: float) -> Born:
        return Born(size, loss, loss, flops, flops, 1.0, ((flops, loss),))

    found = {}
    for seed in range(1, seeds + 1):
        noise = 0.01 * seed
        alone = [born(0, 3 + noise, 10), born(1, 2 + noise, 100)]
        found[key("scratch", 1.0, seed)] = tuple(alone)
        for kappa, each in gaps.items():
            first = born(0, 3 + noise + each[0], 10 * kappa)
            found[key("lineage", kappa, seed)] = (
                first,
                born(1, 2 + noise + each[1], 90 * kappa),
            )
    return Results.of(scale, found)


def test_the_budget_at_which_the_last_gap_closes() -> None:
    found = results({0.8: [0.1, 0.2], 1.0: [-0.1, 0.1], 1.25: [-0.2, -0.1]})
    sigma = found.sigma("reported")
    assert sigma == pytest.approx(0.01 / math.sqrt(2))
    crossing = found.crossing("lineage")
    share = (0.1 - sigma) / 0.2
    assert (crossing.kappa, crossing.bound) == (pytest.approx(1 + share * 0.25), "=")
    assert found.crossing("lineage", [0]).kappa < 1
    assert found.chosen("lineage") == 1.25
    assert found.rung("lineage", 1.25).saved == pytest.approx(1 - 125 / 110)
    paid = 1 - sum(kappa * 100 / 110 for kappa in (0.8, 1.0, 1.25))
    assert found.with_probes("lineage") == pytest.approx(paid)


def test_a_gap_that_never_closes_is_a_bound_and_not_a_figure() -> None:
    crossing = results({0.8: [0.1, 0.2], 1.0: [0.0, 0.1]}).crossing("lineage")
    assert (str(crossing), crossing.within(9.0)) == ("> 1.00", False)
    crossing = results({0.8: [0.0, -0.1]}).crossing("lineage")
    assert (str(crossing), crossing.within(0.8)) == ("<= 0.80", True)
    assert results({}).crossing("lineage") is None


def test_a_gap_that_opens_again_counts_from_where_it_stays_closed() -> None:
    found = results({0.8: [0.0, -0.1], 1.0: [0.0, 0.1], 1.25: [0.0, -0.1]})
    assert 1.0 < found.crossing("lineage").kappa < 1.25


def test_text_is_cut_into_documents_and_nothing_is_lost(tmp_path: Path) -> None:
    from inheritance.text import cut

    source = tmp_path / "a.txt"
    source.write_text("\n\n".join(f"Absatz {i}: " + "ä" * 900 for i in range(40)), "utf-8")
    text = cut([source], tmp_path / "work")
    documents = [json.loads(line)["text"] for line in text.path.read_text("utf-8").splitlines()]
    assert "".join(documents).strip() == source.read_text("utf-8")
    assert min(map(len, documents[:-1])) >= 4000


def test_a_comparison_runs_reports_and_goes_on(tmp_path: Path) -> None:
    import importlib.util

    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(f"line {i} of a text, {i * i}. " * 30 for i in range(150)))
    spec = importlib.util.spec_from_file_location("bench_inheritance", ROOT / "inheritance.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["bench_inheritance"] = bench  # dataclasses look their module up
    spec.loader.exec_module(bench)
    options = [
        "--tiny", "--seeds", "1", "--arms", "scratch,no-growth", "--data", str(source),
        "--work", str(tmp_path / "work"), "--out", str(tmp_path / "result"),
    ]  # fmt: skip
    first = CliRunner().invoke(bench.main, options)
    assert first.exit_code == 0, first.output
    tree = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert len(tree["scratch"]) == 3
    assert tree["arms"]["no-growth"]["rungs"][0]["kappa"] == pytest.approx(1, abs=0.01)
    again = CliRunner().invoke(bench.main, options)
    assert "2 of 2 runs are done already" in again.output
    assert "<svg" in (tmp_path / "result.svg").read_text("utf-8")
    assert (
        "no arm named"
        in CliRunner().invoke(bench.main, [*options[:3], "--arms", "no", *options[5:]]).output
    )
