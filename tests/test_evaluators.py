"""The built-in evaluators on small random models: each against a reference of somebody else's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import installed, make_text
from transformers import AutoTokenizer, PreTrainedModel

from ars_kit.data import Corpus, prepare
from ars_kit.errors import ArsKitError, ConfigError, DataError
from ars_kit.judge import checked
from ars_kit.models import build
from ars_kit.schema import parse_choice
from ars_kit.shapes import embedded_config
from ars_kit.spec import Assessment, Document, Evaluand
from ars_kit.tokenizer import TrainBPE
from ars_kit.tokens import heldout_windows
from ars_kit_plugins import harness

CONTEXT = 32


@dataclass
class Texts:
    texts: list[str]

    def fingerprint(self) -> dict[str, object]:
        return {"texts": self.texts}

    def documents(self) -> Iterator[Document]:
        for i, text in enumerate(self.texts):
            yield Document(text, f"text {i}")


@pytest.fixture(scope="module")
def corpus(cache: Path) -> Corpus:
    texts = [text[: 300 + 40 * (i % 9)] for i, text in enumerate(make_text(300))]
    corpus = prepare(Texts(texts), tokenizer=TrainBPE(300), cache=cache)
    assert corpus.facts.heldout_documents >= 20
    return corpus


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = embedded_config(2, vocab_size=300, context=CONTEXT, aspect=4)
    return build(config, seed=0).eval()


def evaluand(model: PreTrainedModel, corpus: Corpus, **changed: Any) -> Evaluand:
    member = Evaluand(
        name="d2",
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(str(corpus.tokenizer_dir)),
        heldout=list(heldout_windows(corpus.heldout, CONTEXT)),
        context=CONTEXT,
        bytes_per_token=corpus.heldout_bytes_per_token,
        batch_size=5,
        stream=corpus.heldout,
        passages=corpus.passages,
    )
    return replace(member, **changed)


@pytest.fixture(scope="module")
def member(model: PreTrainedModel, corpus: Corpus) -> Evaluand:
    return evaluand(model, corpus)


def judged(text: str, member: Evaluand) -> Assessment:
    found = installed().make("evaluators", parse_choice(text))(member)
    assert isinstance(found, Assessment)
    return found


def figures(text: str, member: Evaluand) -> dict[str, float]:
    found = judged(text, member).figures
    return {name: value for name, value in found.items() if value is not None}


def rows(found: Assessment) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in found.files["documents.jsonl"].splitlines()]


def test_what_is_not_finite_is_null_in_valid_json(corpus: Corpus) -> None:
    broken = build(embedded_config(2, vocab_size=300, context=CONTEXT, aspect=4), seed=0).eval()
    with torch.no_grad():
        broken.get_input_embeddings().weight[5] = torch.nan
    found = judged("perplexity", evaluand(broken, corpus))
    text = found.files["documents.jsonl"]
    assert "NaN" not in text
    assert {row["nats"] for row in rows(found)} == {None}


# --- perplexity ------------------------------------------------------------------------------


def recipe(model: PreTrainedModel, ids: torch.Tensor, longest: int, stride: int) -> float:
    """Return the nats of ids, by the loop of transformers' "Perplexity of fixed-length models".

    The page weighs a window's mean loss by one token fewer than that mean is over wherever the
    label before the first is masked already; here each counts for what it is over.
    """
    total, previous = 0.0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + longest, ids.shape[1])
        window = ids[:, begin:end]
        target = window.clone()
        target[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = model(window, labels=target).loss
        total += float(loss) * int((target[:, 1:] != -100).sum())
        previous = end
        if end == ids.shape[1]:
            break
    return total


@pytest.mark.parametrize("stride", [1, 8, 31, 32])
def test_a_strided_window_is_transformers_own_recipe(member: Evaluand, stride: int) -> None:
    few = [p for p in member.passages if p.document < 3]
    some = replace(member, passages=few, stream=member.stream[: few[-1].stop])
    found = rows(judged(f"perplexity:stride={stride}", some))
    assert [row["document"] for row in found] == [0, 1, 2]
    for row, passage in zip(found, few, strict=True):
        tokens = np.asarray(member.stream[passage.start : passage.stop], np.int64)
        ids = torch.tensor([[member.tokenizer.eos_token_id, *tokens]])
        nats = recipe(member.model, ids, CONTEXT + 1, stride)
        assert row["tokens"] == passage.stop - passage.start
        assert row["nats"] == pytest.approx(nats, rel=1e-5)


def test_a_context_of_its_own_reads_more(member: Evaluand) -> None:
    found = judged("perplexity:stride=16,context=64", member)
    assert "context 64, stride 16" in found.notes["perplexity"]
    assert found.figures != judged("perplexity:stride=16", member).figures


def test_without_a_stride_the_stream_is_read_in_windows(member: Evaluand) -> None:
    ids = torch.from_numpy(np.asarray(member.stream, np.int64))[None]
    nats = recipe(member.model, ids, CONTEXT + 1, CONTEXT)
    found = judged("perplexity", member)
    assert found.figures["heldout_loss"] == pytest.approx(nats / (ids.shape[1] - 1), rel=1e-6)
    assert sum(row["nats"] for row in rows(found)) == pytest.approx(nats, rel=1e-6)
    assert "windows of 32 that do not overlap" in found.notes["perplexity"]


def test_a_limited_stream_counts_the_documents_as_far_as_it_goes(
    member: Evaluand, corpus: Corpus
) -> None:
    windows = list(heldout_windows(corpus.heldout, CONTEXT, limit=500))
    found = rows(judged("perplexity", replace(member, heldout=windows)))
    assert sum(row["tokens"] for row in found) == 500
    whole = corpus.passages[len(found) - 1]
    assert 0 < found[-1]["bytes"] < whole.bytes
    assert found[-1]["tokens"] == 501 - whole.start


@pytest.mark.parametrize("how", ["perplexity", "perplexity:stride=8"])
def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(
    how: str, corpus: Corpus
) -> None:
    model = build(embedded_config(1, vocab_size=300, context=CONTEXT, aspect=4), seed=0).eval()
    torch.nn.init.zeros_(model.get_parameter("model.norm.weight"))  # every logit is then zero
    found = judged(how, evaluand(model, corpus))
    tokens = sum(row["tokens"] for row in rows(found))
    size = sum(row["bytes"] for row in rows(found))
    assert found.figures["perplexity"] == pytest.approx(300, rel=1e-5)
    assert found.figures["bits_per_byte"] == pytest.approx(math.log2(300) * tokens / size)
    low, high = (found.figures[f"bits_per_byte_{end}"] for end in ("low", "high"))
    assert low is not None
    assert high is not None
    assert low <= found.figures["bits_per_byte"] <= high


def test_every_byte_of_every_held_out_document_is_counted(member: Evaluand) -> None:
    found = rows(judged("perplexity:stride=32", member))
    core = member.tokenizer
    for row, passage in zip(found, member.passages, strict=True):
        text = core.decode(member.stream[passage.start : passage.stop], skip_special_tokens=True)
        assert row["bytes"] == len(text.encode())
        assert row["origin"] == passage.origin


def test_one_long_text_is_cut_into_passages(model: PreTrainedModel, cache: Path) -> None:
    text = "\n".join(make_text(120, seed=3)).replace("loss", "Verlust 🙂")
    whole = prepare(Texts([text]), tokenizer=TrainBPE(300), cache=cache)
    found = judged("perplexity:stride=32", evaluand(model, whole))
    parts = rows(found)
    assert len(parts) > 20
    assert {row["document"] for row in parts} == {0}
    assert sum(row["bytes"] for row in parts) == whole.facts.heldout_bytes
    assert sum(row["tokens"] for row in parts) == whole.facts.heldout_tokens
    assert all(1024 <= row["bytes"] < 1050 for row in parts[:-1])
    assert found.notes["perplexity"].endswith(f"interval over {len(parts)} passages of 1 document")
    assert found.figures["bits_per_byte_low"] is not None


def test_an_empty_held_out_split_has_no_figures(member: Evaluand) -> None:
    empty = replace(member, heldout=[], passages=[], stream=member.stream[:0])
    for how in ("perplexity", "perplexity:stride=8"):
        found = judged(how, empty)
        assert set(found.figures.values()) == {None}
        assert "heldout_loss" in found.figures


# --- bleu, generate, speed -------------------------------------------------------------------


def test_bleu_can_be_recomputed_from_the_pairs_and_counts_no_prompt(member: Evaluand) -> None:
    import sacrebleu

    found = judged("bleu:prompt=8,length=12,passages=11", member)
    pairs = [json.loads(line) for line in found.files["bleu.jsonl"].splitlines()]
    assert len(pairs) == 11
    hypotheses = [pair["hypothesis"] for pair in pairs]
    references = [pair["reference"] for pair in pairs]
    again = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert found.figures["bleu"] == pytest.approx(again)
    assert found.figures["chrf"] == pytest.approx(
        sacrebleu.corpus_chrf(hypotheses, [references]).score
    )
    prompts = [pair["prompt"] for pair in pairs]
    with_prompt = [
        [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        for texts in (hypotheses, references)
    ]
    assert sacrebleu.corpus_bleu(with_prompt[0], [with_prompt[1]]).score > again + 10
    assert "tok:13a" in found.notes["bleu_signature"]


def test_continuations_are_greedy_and_their_references_true(member: Evaluand) -> None:
    found = judged("bleu:prompt=8,length=12,passages=3", member)
    text = member.tokenizer.decode(member.stream)
    for line in found.files["bleu.jsonl"].splitlines():
        pair = json.loads(line)
        assert pair["prompt"] + pair["reference"] in text
        ids = member.tokenizer(pair["prompt"], return_tensors="pt").input_ids
        if ids.shape[1] != 8:  # cut inside a word, it may be read in other tokens
            continue
        for _ in range(12):
            with torch.no_grad():
                best = member.model(ids).logits[:, -1:].argmax(-1)
            if best.item() == member.tokenizer.eos_token_id:
                break
            ids = torch.cat((ids, best), dim=1)
        assert pair["hypothesis"] == member.tokenizer.decode(ids[0, 8:])


def test_passages_too_short_for_bleu_are_no_figure_but_a_note(member: Evaluand) -> None:
    found = judged("bleu:prompt=8,length=12", replace(member, passages=[]))
    assert found.figures == {"bleu": None, "chrf": None}
    assert "no held-out document has 20 tokens" in found.notes["bleu"]


def test_every_member_is_asked_the_same(member: Evaluand) -> None:
    found = judged("generate:length=6", member)
    assert not found.figures
    samples = json.loads(found.files["samples.json"])
    assert samples[0]["prompt"] == "Erkläre AGI Framework"
    assert all(sample.keys() == {"prompt", "text"} for sample in samples)
    assert found.files == judged("generate:length=6", member).files


def test_speed_is_measured_in_both_batches_with_its_spread(member: Evaluand) -> None:
    shares: list[float] = []
    watched = replace(member, progress=shares.append)
    found = figures("speed:prompt=8,length=4,repeats=3", watched)
    names = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token")
    assert found.keys() == {
        name + suffix + spread
        for name in names
        for suffix in ("", "_batch_8")
        for spread in ("", "_spread")
    }
    assert all(found[name] > 0 for name in names)
    assert found["prefill_tokens_per_second"] == pytest.approx(
        8 / found["time_to_first_token"], rel=1e-9
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("perplexity:stride=33", "stride=33 must be between 1 and the context, 32"),
        ("perplexity:stride=0", "stride=0 must be between 1 and the context"),
        ("perplexity:stride=8,context=1025", "reads 1024 tokens at most; context=1025"),
        ("perplexity:context=64", "context needs a stride beside it"),
        ("bleu:prompt=1020,length=8", "at most, fewer than prompt=1020 and length=8"),
        ("bleu:passages=0", "passages=0 must be at least 1"),
        ("speed:repeats=0", "repeats=0 must be at least 1"),
        ("generate:length=0", "length=0 must be at least 1"),
        ("lm-eval", "needs a task"),
        ("lm-eval:tasks=gone.yaml", "there is no task file gone.yaml"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(how: str, message: str, member: Evaluand) -> None:
    with pytest.raises(ConfigError, match=message):
        judged(how, member)


# --- the harness -----------------------------------------------------------------------------

TASK = """\
task: endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""


def task_of(tmp_path: Path, questions: list[dict[str, Any]]) -> Path:
    file = tmp_path / "endings.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in questions))
    task = tmp_path / "endings.yaml"
    task.write_text(TASK.format(file=file))
    return task


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def likelihood(member: Evaluand, text: str, ending: str) -> float:
    before = member.tokenizer(text).input_ids
    ids = member.tokenizer(f"{text} {ending}", return_tensors="pt").input_ids
    with torch.no_grad():
        logs = member.model(ids[:, :-1]).logits.log_softmax(-1)
    picked = logs.gather(-1, ids[:, 1:, None])[0, :, 0]
    return float(picked[len(before) - 1 :].sum())


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore")  # what the harness and its libraries warn of is their affair
def test_the_harness_scores_a_task_file_as_counted_by_hand(
    member: Evaluand, tmp_path: Path
) -> None:
    pairs = [("gate grows", "loss of"), ("is", "to and"), ("größer", "naïve")]
    questions = [
        {"text": f"{i}: the loss", "endings": pairs[i % 3], "answer": i % 2} for i in range(7)
    ]
    task = task_of(tmp_path, questions)
    found = judged(f"lm-eval:tasks={task}", member)
    right = [
        max((0, 1), key=lambda k, q=q: likelihood(member, q["text"], q["endings"][k]))
        == q["answer"]
        for q in questions
    ]
    assert found.figures["endings_acc"] == pytest.approx(sum(right) / 7)
    assert "endings_acc_stderr" in found.figures
    assert json.loads(found.files["lm-eval.json"])["n-samples"]["endings"]["effective"] == 7
    assert found.notes["lm-eval:endings"].endswith(": version 1.0, 0-shot, 7 questions")
    few = judged(f"lm-eval:tasks={task},limit=3", member)
    assert few.notes["lm-eval:endings"].endswith(" 3 questions")

    with pytest.raises(DataError, match="cannot be had"):
        judged(f"lm-eval:tasks={task_of(tmp_path, [])}", member)


def test_a_group_has_the_questions_of_its_tasks() -> None:
    results = {
        "results": {"all": {}, "a": {}}, "versions": {"a": 2}, "n-shot": {"all": 0, "a": 0},
        "group_subtasks": {"all": ["a", "rest"], "rest": ["b"]},
        "n-samples": {"a": {"effective": 5}, "b": {"effective": 7}},
    }  # fmt: skip
    notes = harness._how(results)
    assert notes["lm-eval:all"].endswith(": version None, 0-shot, 12 questions")
    assert notes["lm-eval:a"].endswith(": version 2, 0-shot, 5 questions")


@pytest.mark.filterwarnings("ignore")
def test_a_task_that_the_harness_does_not_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import tasks

    few = partial(tasks.TaskManager, include_path=Path(tasks.__file__).parent / "wikitext")
    # Reading all of its thousands of tasks takes the better part of a minute.
    monkeypatch.setattr(tasks, "TaskManager", lambda **_: few(include_defaults=False))
    harness._index.cache_clear()
    # When it is made, which the plan does: not after the first member has been trained.
    with pytest.raises(ConfigError, match="has no task 'no_such_task'"):
        installed().make("evaluators", parse_choice("lm-eval:tasks=no_such_task"))
    harness._index.cache_clear()


def test_without_the_harness_the_extra_is_named(
    member: Evaluand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ArsKitError, match=r"pip install 'ars-kit\[lm-eval\]'"):
        judged("lm-eval:tasks=arc_easy", member)


def test_text_that_no_file_can_hold_is_said_by_its_name() -> None:
    with pytest.raises(TypeError, match=r"'a\.txt' holds a lone surrogate"):
        checked(Assessment({}, {"a.txt": "a\ud800"}))
