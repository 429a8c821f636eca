"""``arskit evaluate``: any model, any text, nothing measured twice."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import make_text
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

from ars_kit import durable, evaluating
from ars_kit.cli import cli
from ars_kit.cli.members import _print_figures
from ars_kit.data import prepare
from ars_kit.errors import ConfigError, DataError, PluginError
from ars_kit.evaluating import evaluate
from ars_kit.host import Host
from ars_kit.models import build, save_member
from ars_kit.outcome import FROZEN, frozen_settings, read_metrics
from ars_kit.resolving import resolve
from ars_kit.settings import to_toml
from ars_kit.shapes import embedded_config
from ars_kit.source import NamedSource, parse_source
from ars_kit.store import RunFolder
from ars_kit.tokenizer import TrainBPE, load_fast


class Watcher:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.cached: list[str] = []
        self.shares: list[float] = []
        self.failures: list[str] = []

    def preparing(self, stage: str, count: int) -> None:
        """Do nothing."""

    def judging(self, model: str, evaluator: str) -> None:
        self.asked.append(evaluator)

    def share(self, done: float) -> None:
        self.shares.append(done)

    def judged(self, model: str, evaluator: str, *, cached: bool) -> None:
        if cached:
            self.cached.append(evaluator)

    def unkept(self, reason: str) -> None:
        self.failures.append(reason)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, cache: Path, text_folder: Path) -> Path:
    """A model directory that no run knows."""
    host = Host.installed()
    source = NamedSource(host, parse_source(str(text_folder), host))
    corpus = prepare(source, tokenizer=TrainBPE(300), cache=cache)
    config = embedded_config(2, vocab_size=300, context=32, aspect=4)
    path = tmp_path_factory.mktemp("stranger") / "model"
    save_member(build(config, seed=0).eval(), corpus.tokenizer_dir, path)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("other") / "other.txt"
    file.write_text("\n".join(make_text(3, seed=9)), encoding="utf-8")
    return file


def judge(
    stranger: Path, data: Path, cache: Path, *evaluators: str, fresh: bool = False, **more: Any
) -> tuple[dict[str, Any], Watcher]:
    watcher = Watcher()
    overrides = {"data.source": str(data), "data.sequence_length": 32, **more}
    if evaluators:
        overrides["run.evaluators"] = list(evaluators)
    (found,) = evaluate(
        [str(stranger)],
        Host.installed(),
        cache / "no run",
        cache,
        overrides,
        watcher=watcher,
        fresh=fresh,
    )
    return found, watcher


def test_all_of_another_text_is_judged_once(stranger: Path, other: Path, tmp_path: Path) -> None:
    first, watcher = judge(stranger, other, tmp_path)
    assert watcher.asked == ["perplexity"]
    assert watcher.shares[-1] == 1.0
    kept = list((tmp_path / "evaluations").glob("*/*.json"))
    rows = json.loads(kept[0].read_text())["files"]["documents.jsonl"].splitlines()
    size = sum(json.loads(row)["bytes"] for row in rows)
    assert size == pytest.approx(other.stat().st_size, abs=4)  # the first token is not predicted

    again, watcher = judge(stranger, other, tmp_path)
    assert again == first
    assert (watcher.asked, watcher.cached) == ([], ["perplexity"])

    redone, watcher = judge(stranger, other, tmp_path, fresh=True)
    assert redone == first
    assert watcher.asked == ["perplexity"]

    kept[0].write_text("damaged")
    assert judge(stranger, other, tmp_path)[1].asked == ["perplexity"]


def test_it_is_said_by_whose_settings_a_stranger_is_judged(
    stranger: Path, other: Path, text_folder: Path, tmp_path: Path
) -> None:
    """Without a run, or with another one's, text and context are not what a reader may think."""
    found, _ = judge(stranger, other, tmp_path)
    none = f"the defaults, as no run is in {tmp_path / 'no run'}"
    assert found["notes"]["settings"] == f"model is judged with a context of 32, {none}"
    out = tmp_path / "run"
    settings = resolve({"data.source": str(text_folder), "data.sequence_length": "32"}, {})
    RunFolder(out).write_text("run.toml", to_toml(settings))
    RunFolder(out).write_text(".arskit/data.json", json.dumps({"tokenizer": "its own"}))
    told = []
    for home, name in ((out, stranger), (out, out / "model"), (tmp_path / "no run", out / "model")):
        shutil.copytree(stranger, out / "model", dirs_exist_ok=True)
        (judged,) = evaluate(
            [str(name)], Host.installed(), home, tmp_path,
            {} if home == out else {"data.source": str(text_folder)}, watcher=Watcher(),
        )  # fmt: skip
        told.append(judged["notes"].get("settings"))
    assert told == [
        f"model is judged with a context of 32 on {text_folder}, those of {out}",
        None,
        f"model is judged with a context of 128, {none}; its own run's are had by --out {out}",
    ]


def test_what_a_judgement_depends_on_makes_it_another(
    stranger: Path, other: Path, tmp_path: Path
) -> None:
    judge(stranger, other, tmp_path)
    for how in ("perplexity:stride=16", "perplexity:stride=8", "generate:length=2"):
        assert judge(stranger, other, tmp_path, how)[1].asked
        assert not judge(stranger, other, tmp_path, how)[1].asked
    assert not judge(stranger, other, tmp_path, "perplexity")[1].asked


def test_changed_text_or_weights_are_judged_again(
    stranger: Path, other: Path, tmp_path: Path
) -> None:
    text, model = tmp_path / "text.txt", tmp_path / "model"
    shutil.copy(other, text)
    shutil.copytree(stranger, model)
    judge(model, text, tmp_path)
    assert not judge(model, text, tmp_path)[1].asked
    text.write_text(text.read_text(encoding="utf-8") + " And more.\n", encoding="utf-8")
    assert judge(model, text, tmp_path)[1].asked
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(bytes(weights))
    assert judge(model, text, tmp_path)[1].asked


def test_what_cannot_be_is_said_before_anything_is_measured(
    stranger: Path, other: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no member 'd7'"):
        evaluate([str(stranger), "d7"], Host.installed(), tmp_path, tmp_path, {}, watcher=Watcher())
    assert not (tmp_path / "evaluations").exists()
    with pytest.raises(ConfigError, match="evaluator 'perplexity' is named twice"):
        judge(stranger, other, tmp_path, "perplexity:stride=16", "perplexity")
    with pytest.raises(PluginError, match=r"no evaluator named 'blue' \(did you mean 'bleu'\?\)"):
        judge(stranger, other, tmp_path, "blue")
    with pytest.raises(ConfigError, match="'speed' has no setting 'repeat'"):
        judge(stranger, other, tmp_path, "speed:repeat=3")


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (BertForMaskedLM, "no causal language model: it is a BertForMaskedLM"),
        (BertLMHeadModel, "what it predicts changes with the tokens that come later"),
    ],
)
def test_what_reads_ahead_is_not_judged(
    stranger: Path, other: Path, tmp_path: Path, cls: Any, message: str
) -> None:
    """It has seen what it is asked for, and would be the best of all."""
    model = Path(shutil.copytree(stranger, tmp_path / "model"))
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    cls(config).save_pretrained(model)
    with pytest.raises(ConfigError, match=message):
        judge(model, other, tmp_path)
    assert not (tmp_path / "evaluations").exists()


def test_of_a_text_that_was_trained_on_only_the_held_out_side_is_judged(
    controlled: Path, text_folder: Path, cache: Path, tmp_path: Path
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(controlled, run)
    shutil.copytree(text_folder, copy)
    record = run / ".arskit" / "data.json"
    known = json.loads(record.read_text(encoding="utf-8"))
    for now in (known, {**known, "data": "?", "others": {"copy": known["data"]}}):
        record.write_text(json.dumps(now), encoding="utf-8")
        (found,) = evaluate(
            ["d2"], Host.installed(), run, cache, {"data.source": str(copy)}, watcher=Watcher()
        )
        assert found["heldout_loss"] == read_metrics(RunFolder(run), "d2")["heldout_loss"]
        assert "only what the run held out" in found["notes"]["text"]


def test_another_device_than_the_runs_can_be_named(
    controlled: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(controlled, run)
    frozen = run / FROZEN
    frozen.write_text(
        frozen.read_text(encoding="utf-8").replace('device = "auto"', 'device = "mps"')
    )
    assert frozen_settings(run).train.device == "mps"
    monkeypatch.setenv("ARSKIT_CACHE", str(cache))
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)

    def judged(*more: str) -> Any:
        return CliRunner().invoke(cli, ["evaluate", "d2", "--out", str(run), "--json", *more])

    with pytest.raises(ConfigError, match=r"device 'mps' is not available here; there is: .*cpu"):
        raise judged().exception
    with pytest.raises(ConfigError, match=r"train\.device must be one of auto, cpu, cuda, mps"):
        raise judged("--device", "tpu").exception
    (found,) = json.loads(judged("--device", "cpu").stdout)
    assert found["model_id"] == "d2"


def test_what_the_cache_cannot_keep_is_told_all_the_same(
    stranger: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = judge(stranger, other, tmp_path, "perplexity", "generate:length=2")
    shutil.rmtree(tmp_path / "evaluations")
    (tmp_path / "evaluations").touch()  # in the way
    found, watcher = judge(stranger, other, tmp_path, "perplexity", "generate:length=2")
    assert found == kept
    (reason,) = watcher.failures
    assert re.fullmatch(r"cannot write .*/evaluations/\w+ \(File exists\)", reason)
    (tmp_path / "evaluations").unlink()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "sync", full)
    found, watcher = judge(stranger, other, tmp_path, "perplexity", "generate:length=2")
    assert found == kept
    (reason,) = watcher.failures
    assert re.fullmatch(r"cannot write .* \(No space left on device\)", reason)


def test_what_generate_wrote_is_shown(
    stranger: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # measured, and from the cache
        found, _watcher = judge(stranger, other, tmp_path, "perplexity", "generate:length=2")
        (name,) = found["files"]
        assert [s["prompt"] for s in json.loads(found["files"][name])][1] == "The"
    _print_figures([found])
    shown = capsys.readouterr().out
    assert shown.index("heldout_loss") < shown.index('"prompt": "The"')
    assert shown.count("samples.json") == 1


def test_text_of_nothing_is_refused_and_of_one_letter_is_measured(
    stranger: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" \n")
    with pytest.raises(DataError, match="no text"):
        judge(stranger, text, tmp_path)
    text.write_text("a")
    found, _ = judge(stranger, text, tmp_path)
    assert found["heldout_loss"] > 0
    assert found["bits_per_byte"] is None


def test_a_member_keeps_its_tokenizer_when_its_text_has_changed(
    controlled: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, texts = tmp_path / "run", tmp_path / "texts"
    shutil.copytree(controlled, run)
    source = frozen_settings(run).data.source
    shutil.copytree(source, texts)
    frozen = run / FROZEN
    frozen.write_text(frozen.read_text(encoding="utf-8").replace(source, str(texts)))

    def judged() -> dict[str, Any]:
        return evaluate(["d4"], Host.installed(), run, cache, {}, watcher=Watcher())[0]

    assert "text" not in judged()["notes"]
    (texts / "000.txt").write_text("zebra quokka wombat " * 2000)
    assert "has changed since d4 was trained" in judged()["notes"]["text"]
    learned = load_fast(run / "d4").get_vocab()
    used: list[dict[str, int]] = []
    real = evaluating.prepare

    def spied(*args: Any, **kwargs: Any) -> Any:
        corpus = real(*args, **kwargs)
        used.append(load_fast(corpus.tokenizer_dir).get_vocab())
        return corpus

    monkeypatch.setattr(evaluating, "prepare", spied)
    judged()
    assert used[-1] == learned != used[0]
