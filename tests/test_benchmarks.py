"""The benchmarks of evaluation, serving and export, on the real code at a very small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


# --- evaluation ------------------------------------------------------------------------------


def test_the_evaluator_and_the_loop_read_the_same(cache: Path, tmp_path: Path) -> None:
    import evaluation

    from ars_kit.models import build
    from ars_kit.shapes import embedded_config

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i * i}: {'larger ' * (i % 5)}{i}" for i in range(600)))
    corpus = evaluation.opened(str(text), cache, paragraphs=True)
    assert corpus.facts.heldout_documents > 20
    config = embedded_config(1, vocab_size=evaluation.VOCABULARY, context=16)
    model = build(config, seed=0).eval()
    member = evaluation.evaluand(model, corpus, context=16, tokens=300, batch_size=4)
    found = evaluation.compare(member, 8, rounds=1)
    assert found["tokens"] >= 300
    assert found["largest_relative_difference"] < 1e-5
    assert found["ratio_lowest"] == found["ratio"] == found["ratio_highest"] > 0


def test_a_prompt_that_is_counted_flatters() -> None:
    from evaluation import with_and_without_prompt

    prompt = "the cat sat on the mat and looked at the moon "
    found = with_and_without_prompt(
        [{"prompt": prompt, "hypothesis": "until dawn", "reference": "all night long"}]
    )
    assert found["bleu_continuation"] < 1
    assert found["bleu_prompt_included"] > 50


# --- serving and export ----------------------------------------------------------------------


@pytest.mark.slow  # `make serving-bench` runs it too, before the figures
def test_the_serving_benchmark_measures_every_server(tmp_path: Path) -> None:
    """The whole of it at its smallest, on real servers."""
    target = tmp_path / "serving.json"
    command = [sys.executable, str(ROOT / "serving.py"), "--tiny", "--json", str(target)]
    subprocess.run([*command, "--engine", "transformers"], check=True, capture_output=True)
    (found,) = json.loads(target.read_text())["checkpoints"]
    assert {(r["server"], r["clients"]) for r in found["rows"]} == {
        ("arskit serve, transformers", 1),
        ("arskit serve, transformers", 2),
        ("transformers serve", 1),
        ("transformers serve", 2),
        ("generate()", 1),
        ("the matrices alone", 1),
        ("the matrices alone", 2),
    }
    for row in found["rows"]:
        assert row["tokens_per_second"]["median"] > 0
        assert (row["server"] == "transformers serve") == ("ratio" not in row)


def test_the_way_to_vllm_is_judged_against_vllm_itself_round_by_round() -> None:
    from serving import DIRECT, PROXY, figures, judge_proxy

    def seen(speed: float, first: float) -> dict[str, float | None]:
        rest = {"between_tokens_seconds": 1.0, "tokens_per_cpu_second": 1.0}
        return {"tokens_per_second": speed, "first_token_seconds": first, **rest}

    cells = {
        (PROXY, 8): [seen(96, 0.104), seen(48, 0.204), seen(30, 0.120)],
        (DIRECT, 8): [seen(100, 0.1), seen(50, 0.2), seen(60, 0.1)],
    }
    share, later = judge_proxy(cells, "2M")
    assert (share["met"], share["figures"]) == (True, "96% (50% to 96%)")
    assert (later["met"], later["figures"]) == (True, "4.0 ms (4.0 to 20.0)")
    assert not judge_proxy({**cells, (PROXY, 8): [seen(45, 0.2)] * 3}, "2M")[0]["met"]
    row = next(r for r in figures(cells) if r["server"] == PROXY)
    assert row["ratio"]["median"] == 0.96
    assert row["later_seconds"]["highest"] == pytest.approx(0.02)


def test_the_bars_of_serving_are_judged_round_by_round() -> None:
    from serving import DEFAULT, GENERATE, MATRICES, TRANSFORMERS, judge

    def rounds(*speeds: float) -> list[dict[str, float | None]]:
        return [{"tokens_per_second": speed} for speed in speeds]

    cells: Any = {
        (DEFAULT, 8): rounds(300, 30, 500),
        (TRANSFORMERS, 8): rounds(100, 10, 100),  # a slow round is slow for both
        (DEFAULT, 1): rounds(40, 50, 60),
        (GENERATE, 1): rounds(10, 11, 12),
    }
    first, second = judge(cells, "x")
    assert (first["met"], first["figures"]) == (True, "3.0 (3.0 to 5.0)")
    assert (second["met"], second["figures"]) == (False, "4.5 (4.0 to 5.0)")
    assert judge({}, "x")[0]["met"] is None
    cells[MATRICES, 1] = rounds(50, 66, 72)
    second = judge(cells, "x")[1]
    assert second["figures"] == "4.5 (4.0 to 5.0); the matrices alone: 6.0 (5.0 to 6.0)"


def test_the_matrices_alone_are_all_of_a_model_s_and_the_last_sees_the_ends_of_prompts() -> None:
    from speed.clients import Load
    from speed.matrices import Matrices
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, num_hidden_layers=2))

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}

    alone = Matrices(model, tokenizer, threads=1)  # type: ignore[arg-type] # all it asks of one
    assert (len(alone.body), len(alone.head)) == (2 * 7, 1)
    session, rows = alone.session, alone._rows(3)
    (logits,) = session.run(alone.head, rows)
    wanted = model.lm_head(torch.from_numpy(rows["x16"])).detach().numpy()
    assert np.abs(logits - wanted).max() < 1e-5
    seen: list[tuple[int, int]] = []

    class Counting:
        def run(self, names: list[str], fed: dict[str, Any]) -> None:
            seen.append((len(names), len(fed["x16"])))

    alone.session = Counting()
    found = alone.measure(Load(2, 4, 3, ["abc", "de"]))
    each = [(14, 5), (1, 2), (15, 2), (15, 2)]
    assert seen == each + each
    assert found["tokens_per_second"]


def test_the_export_benchmark_makes_compares_and_times(tmp_path: Path, monkeypatch: Any) -> None:
    import export as bench

    monkeypatch.setattr(bench, "FORMATS", {"genai": bench.FORMATS["genai"]})
    found = bench.formats("tiny", bench.SIZES["tiny"], tmp_path)
    rows = {row["format"]: row for row in found["formats"]}
    assert set(rows) == {bench.EAGER, "genai"}
    assert rows["genai"]["parity"]["refused"] is None
    for row in rows.values():
        assert {r["rounds"] for r in row["tokens_per_cpu_second"].values()} == {1}
