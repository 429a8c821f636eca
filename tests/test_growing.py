"""`arskit grow`: any checkpoint in, another one out, whole or not at all, the source untouched."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Cli
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from ars_kit import stored
from ars_kit.cli import cli
from ars_kit.durable import check_directory
from ars_kit.errors import ArsKitError, ConfigError
from ars_kit.host import Host, Plugin
from ars_kit.models import build, logits_difference, meta_model, weights_of
from ars_kit.shapes import ARCHITECTURES, embedded_config
from ars_kit.spec import Offer, hookimpl
from ars_kit.stored import fresh_weights, save_weights, stored_weights, streamed_model
from ars_kit_plugins.growth import grow

TOKENS = torch.arange(32)[None]
Call = Callable[..., tuple[int, str, str]]


def config_of(depth: int = 4, **more: Any) -> Any:
    return embedded_config(depth, vocab_size=300, context=32, aspect=8, **more)


def digest(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(folder.iterdir())
    }


def everything(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint whose weights, norms too, are away from their initial values."""
    model = build(config_of(), seed=0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run `arskit grow` in this process; returns exit code, stdout, and what went wrong."""
    monkeypatch.chdir(tmp_path)

    def invoke(*args: Any) -> tuple[int, str, str]:
        done = CliRunner().invoke(cli, ["grow", *map(str, args)])
        error = done.exception
        if error is not None and not isinstance(error, (ArsKitError, SystemExit)):
            raise error
        code = error.exit_code if isinstance(error, ArsKitError) else done.exit_code
        return code, done.stdout, str(error or "")

    return invoke


def offer(monkeypatch: pytest.MonkeyPatch, **makers: Any) -> None:
    host = Host.installed()
    offers = [Offer(name, "for a test", make) for name, make in makers.items()]
    module = SimpleNamespace(arskit_strategies=hookimpl(lambda: offers))
    host.register(module, Plugin("test", "arskit-test", "1"))
    monkeypatch.setattr("ars_kit.cli.growing.make_host", lambda: host)


# --- What comes out ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_grows_into_one_that_plain_transformers_loads(
    tmp_path: Path, call: Call, architecture: str
) -> None:
    parent = build(config_of(architecture=architecture), seed=0).eval()
    parent.save_pretrained(tmp_path / "base")
    before = digest(tmp_path / "base")
    code, printed, message = call("base", "--to", "d6", "--into", "grown", "--json")
    assert code == 0, message
    facts = json.loads(printed)
    assert facts["layers"] == [4, 6]
    assert facts["logits_difference"] <= facts["allowed"]
    child = AutoModelForCausalLM.from_pretrained("grown").eval()
    assert child.config.num_hidden_layers == 6
    assert logits_difference(parent, child, TOKENS) < 1e-5
    assert facts["parameters"][1] == sum(p.numel() for p in child.parameters())
    assert digest(tmp_path / "base") == before
    assert check_directory(tmp_path / "grown") == []
    assert {p.name for p in tmp_path.iterdir()} == {"base", "grown"}


def test_it_says_what_changed(source: Path, call: Call) -> None:
    code, printed, _ = call(source, "--to", "d5")
    assert code == 0
    assert printed.startswith("base-to-d5: layers 4 -> 5, width 32 -> 32, parameters ")
    assert "Largest change of a logit: 0, the largest logit being" in printed
    assert Path("base-to-d5/tokenizer.json").read_text() == "{}"


def test_a_shape_may_be_another_directory_s(source: Path, call: Call, tmp_path: Path) -> None:
    build(config_of(12), seed=3).save_pretrained(tmp_path / "like")
    code, printed, message = call(source, "--to", tmp_path / "like", "--into", "g", "--json")
    assert code == 0, message
    facts = json.loads(printed)
    assert (facts["layers"], facts["width"]) == ([4, 12], [32, 96])
    assert 0 < facts["logits_difference"] <= facts["allowed"] < 1e-2


def test_streamed_growth_is_growth_in_memory(source: Path, call: Call, tmp_path: Path) -> None:
    """Every inherited rectangle is the same; then the result is grown again, and compared again."""
    config_of(12).save_pretrained(tmp_path / "like")
    assert call(source, "--to", tmp_path / "like", "--into", "once")[0] == 0
    old = load_file(source / "model.safetensors")
    fresh = weights_of(build(config_of(12), seed=0))
    expected, provenance = grow(config_of(), old, config_of(12), fresh)
    found = load_file("once/model.safetensors")
    assert found.keys() == expected.keys()
    for name, blocks in provenance.items():
        for block in blocks:
            assert torch.equal(found[name][block.target], expected[name][block.target])
    assert call("once", "--to", "d15", "--into", "twice")[0] == 0
    models = [AutoModelForCausalLM.from_pretrained(p).eval() for p in (source, "twice")]
    assert logits_difference(*models, TOKENS) < 1e-4


def test_a_seed_repeats_it_and_another_does_not(source: Path, call: Call) -> None:
    for seed, into in ((0, "a"), (0, "b"), (1, "c")):
        assert call(source, "--to", "d6", "--seed", seed, "--into", into)[0] == 0
    a, b, c = (load_file(f"{n}/model.safetensors") for n in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    differ = [n for n in a if not torch.equal(a[n], c[n])]
    assert differ
    assert len(differ) < len(a)


@pytest.mark.parametrize(("to", "exact"), [("d6", True), ("wider", False)])
def test_half_precision_stays_half_precision(
    source: Path, call: Call, tmp_path: Path, to: str, exact: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    config_of(6, sizes={"hidden_size": 48}).save_pretrained(tmp_path / "wider")
    code, printed, message = call("half", "--to", to, "--into", "g", "--json")
    assert code == 0, message
    facts = json.loads(printed)
    assert {t.dtype for t in load_file("g/model.safetensors").values()} == {torch.bfloat16}
    assert facts["dtype"] == json.loads(Path("g/config.json").read_text())["dtype"] == "bfloat16"
    assert (facts["logits_difference"] == 0) is exact
    assert facts["logits_difference"] <= facts["allowed"]


def test_what_promises_nothing_is_compared_and_said(source: Path, call: Call) -> None:
    code, printed, _ = call(source, "--to", "d6", "--strategy", "stack", "--json")
    facts = json.loads(printed)
    assert code == 0
    assert facts["preserves"] == "none"
    assert facts["inherited_share"] == 1
    assert facts["logits_difference"] > facts["allowed"]


def test_a_member_grows_as_its_family_would(tiny: list[str], arskit: Cli, tmp_path: Path) -> None:
    assert arskit("run", *tiny, "--members", "d2").returncode == 0
    done = arskit("grow", "d2", "--to", "d8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["width"] == [8, 32]  # 8 * ceil(4 * 8 / 8), as in the family
    judged = arskit("evaluate", "d2", str(tmp_path / "d2-to-d8"), "--json")
    before, after = (m["heldout_loss"] for m in json.loads(judged.stdout))
    assert after == pytest.approx(before, abs=1e-5)


# --- What does not come out --------------------------------------------------------------------


class Liar:
    inherits = True

    def supports(self, parent: Any, child: Any) -> None:
        return None

    def inherit(self, parent: Any, birth: Any) -> Any:
        progressive = Host.installed().listing("strategies", "progressive").offer.make()
        seed = progressive.inherit(parent, birth)
        weights = {n: seed.weights[n] for n in seed.weights}
        weights["model.norm.weight"] += 1
        return replace(seed, weights=weights)


class Short(Liar):
    def inherit(self, parent: Any, birth: Any) -> Any:
        seed = super().inherit(parent, birth)
        return replace(seed, weights={n: seed.weights[n] for n in list(seed.weights)[1:]})


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("liar", "(arskit-test 1) promised that base-to-d5 computes what base does, but a logit"),
        ("short", "made weights that do not fit: model.embed_tokens.weight"),
    ],
)
def test_a_broken_promise_leaves_nothing(
    source: Path, call: Call, monkeypatch: pytest.MonkeyPatch, strategy: str, message: str
) -> None:
    offer(monkeypatch, liar=Liar, short=Short)
    before = everything(source.parent)
    code, printed, complaint = call(source, "--to", "d5", "--strategy", strategy)
    assert code == 4
    assert message in complaint
    assert not printed
    assert everything(source.parent) == before


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "no space")


@pytest.mark.parametrize("error", [full, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_nothing(
    source: Path, call: Call, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    monkeypatch.setattr(stored, "SHARD_BYTES", 1)
    save, calls = stored.save_file, []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            error() if error is full else (_ for _ in ()).throw(error)
        save(*args, **kwargs)

    monkeypatch.setattr(stored, "save_file", failing)
    before = everything(source.parent)
    if error is KeyboardInterrupt:
        assert CliRunner().invoke(cli, ["grow", str(source), "--to", "d5"]).exit_code != 0
    else:
        code, _, message = call(source, "--to", "d5")
        assert code == 1
        assert "no space left to write" in message
    assert len(calls) == 5
    assert everything(source.parent) == before


def test_what_a_killed_growth_left_goes_with_the_next(source: Path, call: Call) -> None:
    left = source.parent / ".arskit-dead"
    (left / "tmp-1-abc").mkdir(parents=True)
    (left / "workbench.lock").write_text("process 1 of nobody")
    before = {name for name in everything(source.parent) if not name.startswith(left.name)}
    assert call(source, "--to", "d5")[0] == 0
    made = {f"base-to-d5/{name}" for name in everything(source.parent / "base-to-d5")}
    assert everything(source.parent) == {*before, "base-to-d5", *made}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["base", "--to", "x"], 3, "write d14 for 14 layers"),
        (["base", "--to", "d5..d6"], 3, "write d14 for 14 layers"),
        (["base", "--to", "d3"], 3, "a grown member cannot have 3"),
        (["base", "--to", "d5", "--into", "base"], 3, "already exists"),
        (["base", "--to", "d5", "--into", "base/config.json/x"], 3, "choose another --into"),
        (["base", "--to", "d99999999999"], 3, "cannot grow to 'd99999999999'"),
        (["nothing", "--to", "d5"], 3, "no member 'nothing'"),
        (["base", "--to", "d5", "--strategy", "progresive"], 4, "did you mean 'progressive'"),
        (["base", "--to", "d5", "--strategy", "ewc"], 3, "ewc measures on training text"),
        (["base", "--to", "d5", "--strategy", "prune"], 3, "pruning is growth backwards"),
    ],
)
def test_bad_input_gets_one_line(
    source: Path, call: Call, arguments: list[str], code: int, message: str
) -> None:
    before = everything(source.parent)
    found, _, complaint = call(*arguments)
    assert found == code
    assert message in complaint
    assert "\n" not in complaint
    assert everything(source.parent) == before


def test_what_reads_ahead_does_not_grow_into_its_own_shape_either(
    tmp_path: Path, call: Call
) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    for name, both_ways in (("decoder", False), ("encoder", True)):
        config = GemmaConfig(**sizes, use_bidirectional_attention=both_ways)
        GemmaForCausalLM(config).save_pretrained(tmp_path / name)
    assert call("decoder", "--to", "d1")[0] == 0
    before = everything(tmp_path)
    code, _, message = call("encoder", "--to", "d1")
    assert (code, "tokens that come later" in message) == (3, True), message
    assert everything(tmp_path) == before


def test_any_number_is_a_seed(source: Path, call: Call) -> None:
    for seed in (-1, 10**25):
        assert call(source, "--to", "d5", "--seed", seed, "--into", f"grown{seed}")[0] == 0
    assert digest(source.parent / "grown-1") != digest(source.parent / f"grown{10**25}")


def test_damaged_weights_are_named(source: Path, call: Call) -> None:
    file = source / "model.safetensors"
    whole = load_file(file)
    save_file({n: t for n, t in whole.items() if "norm" not in n}, file, metadata={"format": "pt"})
    assert "lack model.layers.0.input_layernorm.weight (9 in all)" in call("base", "--to", "d5")[2]
    wrong = {**whole, "model.norm.weight": torch.ones(3)}
    save_file(wrong, file, metadata={"format": "pt"})
    assert "model.norm.weight in base has shape (3,)" in call("base", "--to", "d5")[2]
    file.write_bytes(file.read_bytes()[:-8])
    code, _, message = call("base", "--to", "d5")
    assert (code, "cannot read weights" in message) == (3, True)
    file.rename(source / "pytorch_model.bin")
    assert "weights in other formats are not read" in call("base", "--to", "d5")[2]


# --- Reading and writing a tensor at a time ----------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shards_go_out_and_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, tied: bool
) -> None:
    config = config_of(architecture=architecture, sizes={"hidden_size": 24})
    config.tie_word_embeddings = tied
    model = build(config, seed=0).eval()
    monkeypatch.setattr(stored, "SHARD_BYTES", 20_000)
    save_weights(weights_of(model), tmp_path)
    config.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert logits_difference(model, plain, TOKENS) == 0
    read = stored_weights(tmp_path, config)
    assert {n: t.shape for n, t in read.like.items()} == {
        n: t.shape for n, t in weights_of(model).items()
    }
    assert all(torch.equal(read[n], t) for n, t in weights_of(model).items())
    with torch.no_grad():
        streamed = streamed_model(config, read)(input_ids=TOKENS, use_cache=False).logits
        assert torch.equal(streamed, model(input_ids=TOKENS).logits)


def test_changing_what_was_read_changes_no_file(source: Path) -> None:
    before = digest(source)
    weights = stored_weights(source, config_of())
    weights["model.norm.weight"].zero_()
    assert weights["model.norm.weight"].abs().sum() > 0
    assert digest(source) == before


def test_an_index_that_is_damaged_is_named(source: Path) -> None:
    (source / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"index\.json is damaged"):
        stored_weights(source, config_of())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fresh_weights_are_those_of_a_fresh_model(architecture: str, tied: bool) -> None:
    config = config_of(16, architecture=architecture)
    config.tie_word_embeddings = tied
    model = weights_of(build(config, seed=0))
    state = torch.get_rng_state()
    fresh = fresh_weights(config, seed=0, dtype=torch.float32)
    assert list(fresh) == list(model)
    for name in reversed(list(fresh)):
        made, usual = fresh[name], model[name]
        assert (made.shape, made.dtype) == (usual.shape, usual.dtype)
        assert torch.equal(made, fresh[name])
        assert float(made.mean()) == pytest.approx(float(usual.mean()), abs=0.01)
        assert float(made.std()) == pytest.approx(float(usual.std()), rel=0.1, abs=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    other = fresh_weights(config, seed=1, dtype=torch.bfloat16)
    name = "model.layers.3.mlp.up_proj.weight"
    assert other[name].dtype == torch.bfloat16
    assert not torch.equal(other[name].float(), fresh[name])
    assert not torch.equal(fresh[name], fresh[name.replace(".3.", ".4.")])
    assert all(p.is_meta for p in meta_model(config).parameters())
