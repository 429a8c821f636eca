"""The choice of a member: its rule, its margin, its words."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import assume, given
from hypothesis import strategies as st

from ars_kit.choosing import select, usual_metric
from ars_kit.cli import cli
from ars_kit.cli.options import find_models
from ars_kit.durable import MANIFEST, sha256
from ars_kit.errors import ConfigError, IntegrityError
from ars_kit.judgements import read_judgement
from ars_kit.outcome import kept_judgements, newer_than_best
from ars_kit.resampling import bits_per_byte, difference_interval, interval
from ars_kit.rules import Aim, Limit, Rule, parse_aims, parse_limit, task_note
from ars_kit.spec import Assessment
from ars_kit.store import RunFolder, locate

BYTES = np.full(40, 1000.0)
NOISE = np.random.default_rng(0).normal(0, 40, 40)


def commit(folder: RunFolder, name: str, bits: float, noise: Any = NOISE, **figures: Any) -> None:
    """Commit a member whose documents cost ``bits`` a byte, more or less."""
    nats = bits * math.log(2) * BYTES + noise - np.mean(noise)

    def files(home: Path) -> None:
        metrics = {"model_id": name, "bits_per_byte": bits, "data_hash": "text", **figures}
        (home / "metrics.json").write_text(json.dumps(metrics))
        (home / "quality").mkdir()
        rows = [
            {"document": i, "origin": "", "nats": float(n), "tokens": 300, "bytes": 1000}
            for i, n in enumerate(nats)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (home / "quality" / "documents.jsonl").write_text(text)

    folder.commit_member(name, files, parent=None, facts={})


@pytest.fixture
def family(tmp_path: Path) -> RunFolder:
    """Three members; what is hard for one is as hard for the others."""
    folder = RunFolder(tmp_path / "a run")
    commit(folder, "d2", 2.0, parameters=100, bleu=3.0)
    commit(folder, "d3", 1.6, parameters=200, bleu=2.0)
    commit(folder, "d4", 1.5, parameters=300, bleu=1.0)
    return folder


def chosen(folder: RunFolder, rule: Rule, cache: Path | None = None) -> dict[str, Any]:
    return select(folder.path, rule, cache or folder.path / "none")


# --- chance ----------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_normal_theory_where_that_holds() -> None:
    rng = np.random.default_rng(1)
    nats = rng.normal(700, 50, 400)
    sizes = np.full(400, 1000.0)
    found = interval(nats, sizes)
    assert found is not None
    middle = bits_per_byte(nats, sizes)
    half = 1.96 * nats.std() / math.sqrt(400) / 1000 / math.log(2)
    assert found == pytest.approx((middle - half, middle + half), rel=0.01)
    assert interval(nats, sizes) == found  # the draws are seeded


def test_about_95_of_100_intervals_cover_what_they_should() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(150):
        sizes = rng.uniform(500, 1500, 60)
        nats = 0.7 * sizes + rng.normal(0, 60, 60)
        low, high = interval(nats, sizes) or (0.0, 0.0)
        covered += low <= 0.7 / math.log(2) <= high
    assert 133 <= covered <= 149


def test_a_pair_is_told_apart_where_its_members_overlap() -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(700, 200, 80)
    one, two = hard + rng.normal(0, 2, 80), hard + 3 + rng.normal(0, 2, 80)
    sizes = np.full(80, 1000.0)
    alone = [interval(nats, sizes) for nats in (one, two)]
    assert alone[0] is not None
    assert alone[1] is not None
    assert alone[0][1] > alone[1][0]  # each by itself: nothing to see
    low, high = difference_interval(two, sizes, one, sizes) or (0.0, 0.0)
    assert 0 < low < 3 / 1000 / math.log(2) < high


def test_very_many_documents_take_no_longer_than_many() -> None:
    sizes = np.full(100_000, 100.0)
    nats = np.random.default_rng(4).normal(70, 5, 100_000)
    low, high = interval(nats, sizes) or (0.0, 0.0)
    half = 1.96 * 5 / math.sqrt(100_000) / 100 / math.log(2)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)


def test_one_document_has_no_interval() -> None:
    assert interval(np.ones(1), np.ones(1)) is None


# --- the choice ------------------------------------------------------------------------------


def test_the_lowest_bits_per_byte_wins_and_the_margin_is_said(family: RunFolder) -> None:
    found = chosen(family, Rule())
    assert (found["member"], found["runner_up"]) == ("d4", "d3")
    assert found["margin"] == pytest.approx(0.1)
    assert found["interval"] == pytest.approx([0.1, 0.1])  # the documents differ alike
    assert found["distinguishable"] is True
    assert found["words"].startswith("d4: lowest bits_per_byte, 1.5. d3 comes next, 0.1 away")
    assert found["words"].endswith("more than chance.")
    assert json.loads((family.path / "best.json").read_text()) == found
    assert locate("best", family.path) == family.path / "d4"


def test_a_lead_within_chance_is_called_that(family: RunFolder) -> None:
    commit(family, "d5", 1.4999, noise=-NOISE, parameters=400)
    found = chosen(family, Rule())
    assert found["member"] == "d5"
    low, high = found["interval"]
    assert low < 0 < high
    assert found["distinguishable"] is False
    assert found["words"].endswith("d5 is best, but not distinguishable from d4.")


def test_an_end_of_an_interval_is_not_rounded_to_zero(tmp_path: Path) -> None:
    """Else a lead that is more than chance would stand beside an interval that begins at zero."""
    folder = RunFolder(tmp_path)
    commit(folder, "d2", 1.50002)
    commit(folder, "d3", 1.5)
    found = chosen(folder, Rule())
    assert found["distinguishable"]
    assert "(95 % interval of the difference +0.00002 to +0.00002 bits" in found["words"]


@pytest.mark.parametrize(("documents", "clear"), [(5, False), (6, True)])
def test_few_documents_prove_nothing_however_they_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: int, clear: bool
) -> None:
    monkeypatch.setitem(globals(), "BYTES", BYTES[:documents])
    folder = RunFolder(tmp_path)
    commit(folder, "d2", 1.6, noise=NOISE[:documents])
    commit(folder, "d3", 1.5, noise=NOISE[:documents])
    found = chosen(folder, Rule())
    assert found["interval"] == pytest.approx([0.1, 0.1])
    assert (found["documents"], found["distinguishable"]) == (documents, clear)
    end = "more than chance." if clear else "too few to tell chance from merit."
    assert found["words"].endswith(end)


def test_a_budget_leaves_members_out_and_says_so(family: RunFolder) -> None:
    found = chosen(family, Rule(limits=(Limit("parameters", most=True, bound=250),)))
    assert found["member"] == "d3"
    assert found["left_out"] == {"d4": "parameters is 300"}
    assert found["rule"] == "lowest bits_per_byte of those with parameters at most 250"
    with pytest.raises(ConfigError, match=r"no member is left to choose from\. d2: parameters is"):
        chosen(family, Rule(limits=(Limit("parameters", most=True, bound=1),)))


@pytest.mark.parametrize(
    ("rule", "member"),
    [
        (Rule((Aim("bleu"),)), "d2"),
        (Rule((Aim("bleu", "lowest"),)), "d4"),
        (Rule((Aim("parameters"),)), "d2"),
        (Rule((Aim("parameters", "highest"),)), "d4"),
    ],
)
def test_the_better_end_of_a_figure_is_known_or_said(
    family: RunFolder, rule: Rule, member: str
) -> None:
    found = chosen(family, rule)
    assert found["member"] == member
    assert found["interval"] is None
    assert "chance cannot be told from merit" in found["words"]


def test_several_figures_are_weighed_by_how_near_each_comes_to_its_best(family: RunFolder) -> None:
    found = chosen(family, Rule(parse_aims("bits_per_byte:3, bleu:1")))
    scores = [(1.5 / 2.0) ** 0.75, (1.5 / 1.6) ** 0.75 * (2 / 3) ** 0.25, (1 / 3) ** 0.25]
    assert found["member"] == "d3"
    assert found["value"] == pytest.approx(scores[1])
    assert found["runner_up"] == "d2"
    assert found["margin"] == pytest.approx(scores[1] - scores[0])
    assert found["metric"] == "score"
    assert found["rule"] == "highest score by lowest bits_per_byte (75 %) and highest bleu (25 %)"
    assert "score is not kept by document" in found["words"]


def test_what_is_weighed_may_be_0_but_not_less(family: RunFolder) -> None:
    commit(family, "d5", 1.2, parameters=300, bleu=0.0)
    assert chosen(family, Rule(parse_aims("bits_per_byte:1,bleu:1")))["member"] == "d2"
    commit(family, "d6", 1.2, parameters=300, bleu=-1.0)
    with pytest.raises(ConfigError, match=r"bleu of d6 is -1; only figures of 0 and above"):
        chosen(family, Rule(parse_aims("bits_per_byte:1,bleu:1")))


@given(
    values=st.lists(
        st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=6, unique=True
    ),
    unit=st.floats(0.01, 100),
)
def test_neither_a_unit_nor_another_member_changes_a_weighed_ranking(
    values: list[tuple[float, float]], unit: float
) -> None:
    rule = Rule(parse_aims("loss:2,bleu:1"))

    def order(rows: list[tuple[float, float]], unit: float) -> list[str]:
        family = [{"model_id": str(r), "loss": r[0] * unit, "bleu": r[1]} for r in rows]
        logs = rule.values(family)
        assume(all(abs(a / b - 1) > 1e-9 for a, b in itertools.combinations(logs, 2)))
        return [str(m["model_id"]) for m, _ in rule.ranked(family)]

    assert order(values, 1.0) == order(values, unit)
    fewer = [name for name in order(values, 1.0) if name != str(values[0])]
    assert order(values[1:], 1.0) == fewer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bleu:", "cannot read 'bleu:'"),
        ("bleu:0", "weights above 0"),
        ("bleu:-1,chrf:1", "cannot read 'bleu:-1'"),
        ("bleu:1e999", "weights above 0"),
        ("bleu:_1", "cannot read 'bleu:_1'"),
        ("bleu,chrf", "write FIGURE, or FIGURE:WEIGHT,FIGURE:WEIGHT"),
        ("bleu:1,bleu:2", "names bleu twice"),
    ],
)
def test_weights_that_are_none_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_aims(text)


def test_an_end_goes_with_one_figure() -> None:
    assert parse_aims("cost", "highest") == (Aim("cost", "highest"),)
    with pytest.raises(ConfigError, match="--prefer goes with one figure"):
        parse_aims("bleu:1,chrf:1", "lowest")


def test_the_earlier_of_two_equals_wins(family: RunFolder) -> None:
    commit(family, "d5", 1.5)
    assert chosen(family, Rule())["member"] == "d4"


def keep(
    folder: RunFolder, name: str, cache: Path, text: str, share: float = 0.1, **figures: float
) -> Path:
    """Keep a judgement of a member as `arskit evaluate` does."""
    home = kept_judgements(cache, sha256(folder.path / name / MANIFEST))
    home.mkdir(parents=True, exist_ok=True)
    tree = {"identity": {"data": text, "heldout_fraction": share}, "figures": figures}
    (home / "a.json").write_text(json.dumps(tree))
    return home / "a.json"


def test_a_figure_measured_later_counts_where_the_text_is_the_same(
    family: RunFolder, tmp_path: Path
) -> None:
    fast = Rule(limits=(Limit("decode_tokens_per_second", most=False, bound=50),))
    hint = r"measure it first: arskit evaluate d2 d3 d4 --eval speed --out '.*/a run'"
    with pytest.raises(ConfigError, match=hint):
        chosen(family, fast)
    for name, speed, text in (("d2", 90.0, "text"), ("d3", 60.0, "text"), ("d4", 99.0, "other")):
        kept = keep(family, name, tmp_path, text, decode_tokens_per_second=speed)
        kept.with_name("b.json").write_text("damaged")
    found = chosen(family, fast, tmp_path)
    assert found["member"] == "d3"
    assert found["left_out"] == {"d4": "decode_tokens_per_second was not measured"}


def test_later_figures_count_that_were_measured_on_what_is_held_out_of_the_runs_text(
    family: RunFolder, tmp_path: Path
) -> None:
    family.write_text(".arskit/data.json", json.dumps({"data": "text", "others": {"b": "own"}}))
    commit(family, "d5", 1.7, data_hash="own")  # trained on another, judged on the run's
    commit(family, "d6", 1.7, data_hash="own")
    keep(family, "d5", tmp_path, "text", chrf=5.0)
    keep(family, "d6", tmp_path, "own", chrf=99.0)
    keep(family, "d4", tmp_path, "text", share=1.0, chrf=99.0)  # with what it was trained on
    found = chosen(family, Rule((Aim("chrf"),)), tmp_path)
    assert found["member"] == "d5"
    assert {*found["left_out"]} == {"d2", "d3", "d4", "d6"}


def test_figures_that_were_not_measured_alike_prove_nothing(
    family: RunFolder, tmp_path: Path
) -> None:
    """A run that went on under another evaluator, and judgements made since in two ways."""
    whole, strides = "512 tokens, windows of 32", "512 tokens, context 32, stride 8"
    commit(family, "d5", 1.3, notes={"perplexity": whole})
    assert chosen(family, Rule())["unalike"] is None  # of the others nothing is known
    commit(family, "d6", 1.1, notes={"perplexity": strides})
    found = chosen(family, Rule())
    assert found["unalike"] == (
        f"bits_per_byte was not measured alike, so it does not compare (d5: {whole}; d6: {strides})"
    )
    assert (found["interval"], found["distinguishable"]) == (None, None)
    assert found["words"].endswith(f"d5 comes next, 0.2 away; {found['unalike']}.")
    for name, length in (("d5", 32), ("d6", 64)):
        file = keep(family, name, tmp_path, "text", chrf=length / 10)
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "notes": {"bleu": f"{length} tokens"}})
        )
    mixed = chosen(family, Rule((Aim("chrf"),)), tmp_path)
    assert "(d5: 32 tokens; d6: 64 tokens)" in mixed["words"]
    small = Rule((Aim("chrf"),), (Limit("bits_per_byte", most=True, bound=1.2),))
    assert chosen(family, small, tmp_path)["unalike"] is None  # one alone is compared with nobody


def test_scores_of_different_questions_are_not_compared(family: RunFolder, tmp_path: Path) -> None:
    ages = itertools.count(2_000_000_000)

    def put(name: str, file: str, acc: float, count: int) -> None:
        kept = keep(family, name, tmp_path, "text", arc_easy_acc=acc)
        notes = {"lm-eval:arc": "9 questions", "lm-eval:arc_easy": f"{count} questions"}
        kept = kept.rename(kept.with_name(file))
        kept.write_text(json.dumps({**json.loads(kept.read_text()), "notes": notes}))
        os.utime(kept, (next(ages),) * 2)

    rule, weighed = Rule((Aim("arc_easy_acc"),)), Rule(parse_aims("arc_easy_acc:1,bits_per_byte:1"))
    commit(family, "d5", 1.4, arc_easy_acc=0.9, notes={"lm-eval:arc_easy": "20 questions"})
    put("d4", "b.json", 0.5, 100)
    for refused in (rule, weighed):
        with pytest.raises(ConfigError) as found:
            chosen(family, refused, tmp_path)
        assert str(found.value) == (
            "arc_easy_acc was not measured alike, so it does not compare (d4: 100 questions; d5: "
            "20 questions); put the task to all with one limit: arskit evaluate d4 d5 --eval "
            f"lm-eval:tasks=...,limit=N --out '{family.path}'"
        )
    assert not (family.path / "best.json").exists()
    put("d5", "b.json", 0.4, 100)  # as the line says: what is asked last counts
    assert chosen(family, rule, tmp_path)["member"] == "d4"
    put("d5", "c.json", 0.6, 300)
    with pytest.raises(ConfigError, match="d5: 300 questions"):
        chosen(family, rule, tmp_path)
    put("d4", "c.json", 0.5, 300)
    assert chosen(family, rule, tmp_path)["member"] == "d5"


def test_what_is_found_in_the_cache_again_is_what_was_asked_for_last(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"figures": {"bleu": 1.0}, "files": {}, "notes": {}}))
    os.utime(file, (1, 1))
    assert read_judgement(file) == Assessment({"bleu": 1.0})
    assert file.stat().st_mtime > 1


def test_a_note_on_a_task_is_of_the_figures_that_begin_with_its_name() -> None:
    notes = dict.fromkeys(("lm-eval:arc", "lm-eval:arc_easy", "own_lm-eval:arc", "bleu"), "")
    assert task_note("arc_easy_acc", notes) == "lm-eval:arc_easy"
    assert task_note("arc_acc", notes) == "lm-eval:arc"
    assert task_note("own_arc_acc", notes) == "own_lm-eval:arc"
    assert task_note("arcs_acc", notes) is None
    assert task_note("bleu", notes) is None


def test_who_asks_for_the_best_hears_of_members_that_came_later(
    family: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert newer_than_best(family.path) == ["d2", "d3", "d4"]
    chosen(family, Rule())
    find_models(["d2", "best"], family.path)
    assert capsys.readouterr().err == ""
    commit(family, "d5", 1.0)
    commit(family, "d6", 1.1)
    find_models(["d2"], family.path)
    assert capsys.readouterr().err == ""
    find_models(["d2", "best"], family.path)
    assert capsys.readouterr().err == (
        "arskit: best was chosen before d5, d6; to choose again: arskit select "
        f"--out '{family.path}'\n"
    )
    family.write_text("best.json", '{"member": "d4"}')  # of a version that did not say
    assert newer_than_best(family.path) == []


def test_a_bad_metric_is_named_with_the_nearest(family: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"named 'blue' \(did you mean 'bleu'\?\)\. There are: b"):
        chosen(family, Rule((Aim("blue"),)))


@pytest.mark.parametrize("text", ["cost", "cost<1", "cost<=x", "<=3", "cost<=1,5", "cost<=_1"])
def test_a_condition_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write FIGURE<=NUMBER"):
        parse_limit(text)


def test_conditions_are_read() -> None:
    assert parse_limit("parameters<=250_000.") == Limit("parameters", most=True, bound=250000.0)
    assert parse_limit("perplexity <= 1e2") == Limit("perplexity", most=True, bound=100.0)
    assert parse_limit("bleu>=-.5") == Limit("bleu", most=False, bound=-0.5)


def test_a_folder_without_members_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no member is committed"):
        select(tmp_path / "nothing", Rule(), tmp_path)


def test_damaged_documents_are_named(family: RunFolder) -> None:
    file = family.path / "d4" / "quality" / "documents.jsonl"
    file.write_text(file.read_text().replace("300", "301"))
    with pytest.raises(IntegrityError, match=r"d4: quality/documents\.jsonl is not what was"):
        chosen(family, Rule())


def test_one_member_has_no_runner_up(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    commit(folder, "d2", 2.0)
    found = chosen(folder, Rule())
    assert found["runner_up"] is None
    assert found["words"].endswith("There is no other to choose from.")


def test_without_a_byte_the_loss_decides() -> None:
    assert usual_metric([{"bits_per_byte": None}, {"bits_per_byte": 1.0}]) == "bits_per_byte"
    assert usual_metric([{"bits_per_byte": None, "heldout_loss": 2.0}]) == "heldout_loss"


@pytest.mark.parametrize("number", ["nan", "inf", "-1"])
@pytest.mark.parametrize("option", ["--max-params", "--min-tokens-per-second"])
def test_a_bound_that_is_no_number_is_refused(family: RunFolder, option: str, number: str) -> None:
    """NaN would leave every member out, or none, and infinity is no bound."""
    done = CliRunner().invoke(cli, ["select", option, number, "--out", str(family.path)])
    assert done.exit_code == 2
    assert option in done.output
