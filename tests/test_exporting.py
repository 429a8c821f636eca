"""`arskit export`: the same model in another format, or nothing at all."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from functools import cache as cache_calls
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from served import CONTEXT, make_checkpoint
from transformers import AutoModelForCausalLM

from ars_kit.cli import cli, main
from ars_kit.durable import check_directory
from ars_kit.errors import ArsKitError, ConfigError, ParityError
from ars_kit.host import Host, Plugin
from ars_kit.schema import Choice, parse_choice
from ars_kit.spec import Engine, Offer, Service, hookimpl
from ars_kit_serving.checkpoints import open_checkpoint
from ars_kit_serving.decoder import OnnxExporter
from ars_kit_serving.engines.eager import EagerEngine
from ars_kit_serving.export import Export, export_checkpoint, write_compared
from ars_kit_serving.parity import JUDGED, compare, own_texts
from ars_kit_serving.servers import genai
from ars_kit_serving.servers import onnx as onnx_server

TEXTS = np.random.default_rng(1).integers(0, 320, (4, 80)).tolist()


def service_of(path: Path, **more: Any) -> Service:
    fields = {"context": None, "slots": 3, "say": print, "cache": path.parent / "cache", **more}
    return Service(name=path.name, path=path, digest="d" * 64, **fields)


def export(path: Path, target: Path, form: Choice, host: Host | None = None) -> dict[str, Any]:
    checkpoint = open_checkpoint(str(path), target.parent)
    return export_checkpoint(Export(checkpoint, host or Host.installed(), form, target, TEXTS))


Exported = tuple[Path, Path, dict[str, Any]]
KINDS = {"qwen2": "onnx", "gpt2": "onnx", "qwen3": "genai"}
FLOATING = ("past.", "present.", "logits")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Return the export of a kind of checkpoint, made once."""

    @cache_calls
    def make(kind: str) -> Exported:
        path = make_checkpoint(tmp_path_factory.mktemp("exports") / kind, kind)
        target = path.parent / KINDS[kind]
        return path, target, export(path, target, Choice(KINDS[kind]))

    return make


@pytest.fixture(params=list(KINDS))
def exported(request: pytest.FixtureRequest, exports: Callable[[str], Exported]) -> Exported:
    """A checkpoint of each kind, its export, and what was said of it."""
    return exports(request.param)


def test_an_export_computes_the_same_and_says_what_was_compared(exported: Any) -> None:
    _, target, facts = exported
    assert facts["largest_difference"] <= facts["allowed"] < 0.01
    assert facts["largest_logit"] > 1
    assert facts["compared"]["prompts"] == [1, 5, 17, 33]
    assert facts["compared"]["batches"] == [1, 4]
    assert facts["greedy"]["equal"] + facts["greedy"]["ties"] == 4
    written = json.loads((target / "parity.json").read_text())
    assert written.items() <= facts.items()
    assert check_directory(target) == []
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (target / name).is_file()


def test_the_graph_is_right_by_itself(exported: Any) -> None:
    path, target, facts = exported
    if facts["format"] == "onnx":
        onnx.checker.check_model(str(target / "model.onnx"))
        any_shape_under_left_padding(path, target)
    else:  # it knows no padding; what its own runtime makes of it the page shows
        graph = onnx.load(str(target / "model.onnx"), load_external_data=False).graph
        assert "GroupQueryAttention" in {node.op_type for node in graph.node}


def any_shape_under_left_padding(path: Path, target: Path) -> None:
    """Read the graph by ONNX Runtime alone, as somebody else would."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        target / "model.onnx", providers=["CPUExecutionProvider"]
    )
    past = [node for node in session.get_inputs() if node.name.startswith("past")]
    model = AutoModelForCausalLM.from_pretrained(path)
    draw = np.random.default_rng(2)
    for rows, width in ((1, 1), (3, 11), (5, 2)):
        ids = draw.integers(1, 320, (rows, width + 3))
        mask = (np.arange(width + 3) >= (np.arange(rows) % width)[:, None]).astype(np.int64)
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        cache = [np.zeros((rows, n.shape[1], 0, n.shape[3]), np.float32) for n in past]
        for start, end in ((0, width), (width, width + 2), (width + 2, width + 3)):
            logits, *cache = session.run(
                None,
                {
                    "input_ids": ids[:, start:end],
                    "attention_mask": mask[:, :end],
                    "position_ids": positions[:, start:end],
                    **{n.name: c for n, c in zip(past, cache, strict=True)},
                },
            )
        with torch.no_grad():
            wanted = model(
                torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                position_ids=torch.tensor(positions),
            ).logits[:, -1]
        assert np.abs(logits[:, -1] - wanted.numpy()).max() < 1e-4


class Wrong:
    """An exporter whose model is another one's, or the same in other words."""

    def __init__(self, tolerance: float | None, change: float) -> None:
        self.tolerance, self.change = tolerance, change

    def export(self, source: Path, target: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + self.change)
        model.save_pretrained(target)

    def open(self, target: Path, *, context: int, slots: int) -> Engine:
        return EagerEngine(service_of(target, context=context, slots=slots))


def offering(exporter: Any) -> Host:
    class Module:
        @staticmethod
        @hookimpl
        def arskit_exporters() -> list[Offer[Any]]:
            return [Offer("wrong", "for tests", lambda: exporter)]

    host = Host()
    host.register(Module, Plugin("wrong", "arskit-wrong", "1"))
    return host


@pytest.mark.parametrize(
    ("tolerance", "change", "message"),
    [
        (1e-4, 0.01, "logits differ by"),
        (1e-4, float("nan"), "logits differ by nan"),
        (None, 0.9, "nats per token"),
    ],
)
def test_a_model_that_computes_something_else_is_not_written(
    checkpoint: Path, tmp_path: Path, tolerance: float | None, change: float, message: str
) -> None:
    with pytest.raises(ParityError, match=message):
        export(checkpoint, tmp_path / "x", Choice("wrong"), offering(Wrong(tolerance, change)))
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_rounds_is_judged_by_loss_and_agreement(
    checkpoint: Path, tmp_path: Path
) -> None:
    facts = export(checkpoint, tmp_path / "x", Choice("wrong"), offering(Wrong(None, 1e-4)))
    assert facts["loss"] == pytest.approx(facts["loss_of_the_model"], abs=0.01)
    assert facts["agreement"] > 0.95
    assert facts["compared"]["tokens"] == 4 * 79


def test_what_is_rounded_for_a_server_is_judged_on_what_the_model_makes_up(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    texts = own_texts(model, 33)
    assert texts == own_texts(model, 33)
    assert np.shape(texts) == (32, 33)  # 32 tokens follow each first one: 1,024 in all
    seen = {}
    for name, given in (("own", None), ("random", TEXTS)):
        exporter, facts = Wrong(None, 1e-4), dict[str, Any](format="x", source_sha256="d")
        write_compared(exporter, checkpoint, tmp_path / name, given, facts)
        seen[name] = facts
    assert seen["own"]["compared"]["tokens"] == JUDGED
    # A model is surprised by its own text as much as it is unsure, and by any other more.
    assert seen["own"]["loss_of_the_model"] < seen["random"]["loss_of_the_model"] - 0.05


def test_padding_that_is_ignored_is_noticed(checkpoint: Path) -> None:
    """Alone every sequence is right; only a batch of different lengths shows the mistake."""

    class Careless(EagerEngine):
        def run(self, tokens: Any, mask: Any, positions: Any, past: Any) -> Any:
            return super().run(tokens, np.ones_like(mask), positions, past)

    engine = Careless(service_of(checkpoint, slots=4))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for texts in (TEXTS, [text[:9] for text in TEXTS], [TEXTS[0][:3]]):  # short windows as well
        with pytest.raises(ParityError, match="logits differ"):
            compare(model, engine, texts, 1e-4)


@pytest.mark.parametrize("context", [2, 8, 33, CONTEXT])
def test_nothing_is_compared_beyond_the_context(checkpoint: Path, context: int) -> None:
    class Bounded(EagerEngine):
        longest = 0

        def run(self, tokens: Any, mask: Any, positions: Any, past: Any) -> Any:
            self.longest = max(self.longest, mask.shape[1])
            return super().run(tokens, mask, positions, past)

    engine = Bounded(service_of(checkpoint, slots=4, context=context))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    facts = compare(model, engine, TEXTS, 1e-4)
    assert engine.longest <= context
    assert facts["compared"]["tokens_through_the_cache"] == min(8, context // 2)
    assert facts["greedy"] == {
        "tokens": min(24, context // 2), "prompts": 4, "equal": 4, "ties": 0,
    }  # fmt: skip


def test_a_wrong_text_is_noticed_where_the_logits_are_within_bounds(checkpoint: Path) -> None:
    class Sly(EagerEngine):
        steps = 0

        def decode(self, tokens: Any) -> Any:
            self.steps += 1
            logits = super().decode(tokens)
            return -logits if self.steps > 40 else logits

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ParityError, match="greedy text differs"):
        compare(model, Sly(service_of(checkpoint, slots=4)), TEXTS, 1e-4)


def test_what_cannot_be_exported_says_why(checkpoint: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=64, hidden_size=24, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=3, num_key_value_heads=3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(odd)
    with pytest.raises(ConfigError, match="multiple of 16 dimensions, this model's have 8"):
        export(odd, tmp_path / "x", Choice("genai"))
    from transformers import MambaConfig, MistralConfig

    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    shape |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
    # A window that no compared text is as long as.
    for other in (MistralConfig(**shape, **heads, sliding_window=1024), MambaConfig(**shape)):
        AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / other.model_type)
        for form in ("genai", "onnx"):
            with pytest.raises(ConfigError, match=f"{form} cannot export {other.model_type}: its"):
                export(tmp_path / other.model_type, tmp_path / "x", Choice(form))
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        export(checkpoint, tmp_path / "taken", Choice("onnx"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*file/x: .*; choose another place"):
        export(checkpoint, tmp_path / "file" / "x", Choice("onnx"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("what", ["auto_map", "code", "pickle", "decoy", "named"])
def test_a_checkpoint_with_code_of_its_own_is_refused(
    checkpoint: Path, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "theirs"
    shutil.copytree(checkpoint, path)
    if what == "auto_map":
        config = json.loads((path / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling.Mine"}
        (path / "config.json").write_text(json.dumps(config))
    elif what == "code":
        (path / "modeling.py").write_text("raise SystemExit")
    elif what == "named":  # transformers would read it though there is a model.safetensors
        config = json.loads((path / "config.json").read_text())
        config["transformers_weights"] = "adapter_model.bin"
        (path / "config.json").write_text(json.dumps(config))
        (path / "adapter_model.bin").touch()
    else:
        (path / "model.safetensors").rename(path / "pytorch_model.bin")
        if what == "decoy":
            (path / "notes.safetensors").touch()
    with pytest.raises(ConfigError, match=r"code of its own|no safetensors"):
        open_checkpoint(str(path), tmp_path)


def test_a_derived_engine_is_made_once_and_made_anew_when_damaged(
    exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    path, target, facts = exported
    maker = {"onnx": onnx_server, "genai": genai}[facts["format"]]
    service = service_of(path, cache=tmp_path / "cache")
    calls = []

    def copying(self: Any, source: Path, into: Path) -> None:  # what takes long was done above
        calls.append(source)
        for file in target.glob("*"):
            if file.name not in {"manifest.json", "parity.json"}:
                shutil.copyfile(file, into / file.name)

    from ars_kit_serving.genai import GenaiExporter

    monkeypatch.setattr(OnnxExporter, "export", copying)
    monkeypatch.setattr(GenaiExporter, "export", copying)

    def serve_once() -> str:
        engine = maker(service)
        assert (engine.context, engine.slots) == (CONTEXT, 3)
        assert engine.prefill(0, [1, 2, 3]).shape == (320,)
        engine.close()
        return capsys.readouterr().out

    assert "this is done once" in serve_once()
    assert serve_once() == ""
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "model.onnx").write_bytes(b"rot")
    assert "is damaged; made anew" in serve_once()
    assert len(calls) == 2


def test_rows_come_and_go_in_any_order(exported: Any, tmp_path: Path) -> None:
    """What a sequence gets does not depend on who else is there."""
    path, target, facts = exported
    exporter: Any = Host.installed().make("exporters", Choice(facts["format"]))
    engine = exporter.open(target, context=CONTEXT, slots=3)
    model = AutoModelForCausalLM.from_pretrained(path)
    texts: dict[int, list[int]] = {}

    def check(slot: int, row: Any) -> None:
        with torch.no_grad():
            wanted = model(torch.tensor([texts[slot]])).logits[0, -1].numpy()
        assert np.abs(row[: len(wanted)] - wanted).max() < 1e-3

    draw = np.random.default_rng(3)
    for move in (
        "+0",
        "+1",
        "=",
        "+2",
        "=",
        "-0",
        "=",
        "+0",
        "=",
        "-1",
        "=",
        "-2",
        "=",
        "-0",
        "+1",
        "=",
    ):
        slot = int(move[1:] or 0)
        if move[0] == "+":
            texts[slot] = draw.integers(1, 320, int(draw.integers(1, 20))).tolist()
            check(slot, engine.prefill(slot, texts[slot]))
        elif move[0] == "-":
            engine.release(slot)
            del texts[slot]
        else:
            order = list(texts)[::-1]
            tokens = {s: int(draw.integers(1, 320)) for s in order}
            for s, token in tokens.items():
                texts[s].append(token)
            for s, row in zip(order, engine.decode(tokens), strict=True):
                check(s, row)
    engine.close()


def test_the_command_says_what_it_found(
    checkpoint: Path, text_folder: Path, cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def copying(self: Any, source: Path, into: Path) -> None:
        Wrong(1e-4, 0.0).export(source, into)

    monkeypatch.setattr(OnnxExporter, "export", copying)
    monkeypatch.setattr(OnnxExporter, "open", lambda _, t, **k: Wrong(1e-4, 0).open(t, **k))
    monkeypatch.setenv("ARSKIT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["export", str(checkpoint), "--data", str(text_folder)])
    assert done.exception is None, done.exception
    assert done.stdout.startswith("tiny-onnx: ")
    assert "greedy text from 4 of 4 prompts is equal" in done.stdout
    assert (tmp_path / "tiny-onnx" / "parity.json").is_file()
    again = CliRunner().invoke(cli, ["export", str(checkpoint), "--data", str(text_folder)])
    assert isinstance(again.exception, ArsKitError)
    assert "already exists" in str(again.exception)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("command", ["export", "serve --engine=onnx --port=0"])
def test_nothing_is_left_of_an_export_that_is_told_to_stop(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: Any,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(self: Any, source: Path, into: Path) -> None:
        (into / "model.onnx").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(OnnxExporter, "export", told)
    monkeypatch.setattr("ars_kit.evaluating.heldout_text", lambda *_: iter(np.ones((1, 64), int)))
    monkeypatch.setenv("ARSKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["arskit", *command.split(), str(checkpoint)])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        main()
    assert capsys.readouterr().err.splitlines()[-1] == "arskit: interrupted"
    assert signal.getsignal(signal.SIGTERM) is before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_snippets_of_the_page_run(
    exports: Callable[[str], Exported], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
    checkpoint, onnx_target, _ = exports("qwen2")
    shutil.copytree(checkpoint, tmp_path / "checkpoints" / "d18")
    shutil.copytree(onnx_target, tmp_path / "d18-onnx")
    shutil.copytree(exports("qwen3")[1], tmp_path / "d18-genai")
    monkeypatch.chdir(tmp_path)
    codes = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    printed = []
    for code in codes:
        exec(compile(code, "docs/export.md", "exec"), {})
        printed.append(capsys.readouterr().out.strip())
    assert len(printed) == 3
    assert all(printed)
    # The same model in two formats, the shorter prompt padded: the same text.
    assert ast.literal_eval(printed[1])[0] == printed[0]


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Return the export of a kind of checkpoint whose weights count as large, made once."""

    @cache_calls
    def make(kind: str) -> Exported:
        path = make_checkpoint(tmp_path_factory.mktemp("beside") / kind, kind)
        target = path.parent / "onnx"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ars_kit_serving.decoder.BIG", 1000)
            return path, target, export(path, target, Choice("onnx"))

    return make


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("llama", marks=pytest.mark.slow)])
def test_large_weights_lie_beside_the_graph_and_the_model_computes_the_same(
    beside: Callable[[str], Exported], tmp_path: Path, kind: str
) -> None:
    path, made, facts = beside(kind)
    target = tmp_path / "onnx"
    shutil.copytree(made, target)
    assert facts["largest_difference"] <= facts["allowed"]
    assert facts["greedy"]["equal"] + facts["greedy"]["ties"] == 4
    graph, large = target / "model.onnx", target / "model.onnx.data"
    weights = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(path).parameters())
    assert large.stat().st_size > 0.9 * weights  # the smallest stay in the graph
    assert facts["bytes"] == graph.stat().st_size + large.stat().st_size
    assert check_directory(target) == []
    large.write_bytes(b"rot")
    assert "model.onnx.data" in " ".join(check_directory(target))


def floats(target: Path) -> tuple[set[int], list[int]]:
    """Return the kinds of an export's matrices, and of each float that goes in or out."""
    graph = onnx.load(str(target / "model.onnx")).graph
    fed = [node for node in (*graph.input, *graph.output) if node.name.startswith(FLOATING)]
    return (
        {weight.data_type for weight in graph.initializer if len(weight.dims) == 2},
        [node.type.tensor_type.elem_type for node in fed],
    )


IN_AND_OUT = 4 + 4 + 1
"""Keys and values of two layers, in and out, and the logits."""


def test_qwen3_stays_within_the_bound_of_fp32(beside: Callable[[str], Exported]) -> None:
    _, target, facts = beside("qwen3")
    assert facts["largest_difference"] <= facts["allowed"] == 1e-4 * facts["largest_logit"]
    kind = onnx.TensorProto.FLOAT
    assert floats(target) == ({kind}, [kind] * IN_AND_OUT)


@pytest.mark.slow
def test_qwen3_stays_within_the_bound_of_fp16(tmp_path: Path) -> None:
    path, target = make_checkpoint(tmp_path / "qwen3", "qwen3"), tmp_path / "out"
    facts = export(path, target, Choice("onnx", {"precision": "fp16"}))
    assert 1e-4 <= facts["largest_difference"] <= facts["allowed"] == 0.02 * facts["largest_logit"]
    assert facts["greedy"]["equal"] + facts["greedy"]["ties"] == 4
    kind = onnx.TensorProto.FLOAT16
    assert floats(target) == ({kind}, [kind] * IN_AND_OUT)


def test_weights_in_eight_bits_are_judged_by_the_loss(checkpoint: Path, tmp_path: Path) -> None:
    facts = export(checkpoint, tmp_path / "out", Choice("genai", {"precision": "int8"}))
    assert 0 < abs(facts["loss"] - facts["loss_of_the_model"]) <= 0.05
    assert facts["agreement"] >= facts["allowed_agreement"] == 0.9
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
    rounded = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert {a.i for node in rounded for a in node.attribute if a.name == "bits"} == {8}
    assert "MatMul" not in {node.op_type for node in graph.node}


@pytest.mark.parametrize(
    ("form", "offered"),
    [
        ("onnx:precision=bf16", "fp32, fp16"),
        ("genai:precision=fp16", "fp32, int8, int4"),
        ("genai:precision=bf16", "fp32, int8, int4"),
    ],
)
def test_a_precision_that_the_target_cannot_run_is_refused_before_anything_is_made(
    checkpoint: Path, tmp_path: Path, form: str, offered: str
) -> None:
    wanted = form.partition("=")[2]
    with pytest.raises(ConfigError, match=f"precision must be one of {offered}, not '{wanted}'"):
        export(checkpoint, tmp_path / "x", parse_choice(form))
    assert list(tmp_path.iterdir()) == []
