"""Each memory recipe trains what it says, and takes what was foreseen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quiet
from safetensors.torch import load_file
from transformers import Gemma2Config, GraniteConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from ars_kit import fitting, footprint
from ars_kit.errors import ConfigError
from ars_kit.fitting import fitted_plan, foreseen, require_fit
from ars_kit.history import read_history
from ars_kit.host import Host
from ars_kit.live import LiveBytes
from ars_kit.memory import RECIPES, ChunkedLoss, prepare, whole_loss
from ars_kit.models import build
from ars_kit.plan import RunPlan, plan_run
from ars_kit.resolving import resolve
from ars_kit.state import pack, unpack
from ars_kit.store import RunFolder

pytestmark = pytest.mark.usefixtures("undrawn")

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def host() -> Host:
    return Host.installed()


Home = tuple[Host, Path, Path]


@pytest.fixture(scope="module")
def home(host: Host, text_folder: Path, cache: Path) -> Home:
    return host, text_folder, cache


@pytest.fixture(scope="module")
def looked(host: Host, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """A plan in which every recipe was foreseen."""
    shape = {"family.members": "d5", "family.aspect": 25.5, "data.sequence_length": 128}
    plan = planned(host, text_folder, **shape)
    return fitted_plan(plan, host, tmp_path_factory.mktemp("none"), look=True)


def planned(host: Host, text: Path, **flags: Any) -> RunPlan:
    small = {
        "family.members": "d3", "family.vocab_size": 300, "family.aspect": 22.0,
        "train.iterations": (1, 1), "train.batch_size": 4, "data.source": str(text),
        "data.sequence_length": 64, "data.heldout_tokens": 256,
    }  # fmt: skip
    return plan_run(resolve({**small, **flags}, {}), host)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SIZES, tie_word_embeddings=True),
        LlamaConfig(**SIZES, tie_word_embeddings=False),
    ],
    ids=lambda c: c.model_type,
)
def test_a_chunked_loss_has_the_loss_and_the_gradients_of_the_whole_one(
    config: PretrainedConfig,
) -> None:
    window = torch.randint(0, 300, (3, 22), generator=torch.Generator().manual_seed(0))
    found = []
    for chunk in (None, 300 * 10):  # 63 positions, ten at a time
        model = build(config, seed=0)
        loss_of = whole_loss if chunk is None else ChunkedLoss(model, chunk)
        _, loss = loss_of(model, window)
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert model(input_ids=window).logits.shape == (3, 22, 300)  # as if nothing had been


def test_logits_never_stand_whole_where_they_are_chunked() -> None:
    model = build(Qwen2Config(**{**SIZES, "vocab_size": 4000}), seed=0)
    window = torch.zeros((2, 65), dtype=torch.int64)
    peaks = []
    for loss_of in (whole_loss, ChunkedLoss(model, 4000 * 8)):
        with LiveBytes() as live:
            _, loss = loss_of(model, window)
            loss.backward()
        peaks.append(live.peak)
        model.zero_grad()
    whole_logits = 2 * 64 * 4000 * 4
    assert peaks[0] > 2 * whole_logits
    assert peaks[1] < whole_logits


def test_an_architecture_that_bends_its_logits_is_found_out() -> None:
    for straight in (Qwen2Config(**SIZES), GraniteConfig(**SIZES, logits_scaling=9.0)):
        assert ChunkedLoss(build(straight, seed=0)).agrees()
    bent = Gemma2Config(**SIZES, final_logit_softcapping=30.0, head_dim=8)
    assert not ChunkedLoss(build(bent, seed=0)).agrees()


def test_activations_are_computed_again_with_the_same_gradients() -> None:
    window = torch.arange(20)[None]
    found = []
    for name in ("full", "lean"):
        model = build(Qwen2Config(**SIZES), seed=0)
        prepare(model, RECIPES[name])
        model.train()
        _, loss = whole_loss(model, window)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["adamw-8bit", "adamw-4bit"])
def test_moments_of_few_bits_come_back_from_a_saved_state_exactly(host: Host, name: str) -> None:
    from ars_kit.damping import DampedOptimizer
    from ars_kit.schema import Choice

    def made() -> tuple[torch.nn.Parameter, DampedOptimizer]:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 8192).reshape(64, 128).bfloat16())
        group = {"params": [weight], "names": ["w"], "role": "matrix", "lr": 0.01,
                 "weight_decay": 0.1}  # fmt: skip
        base = host.make("optimizers", Choice(name), [group], lr=0.01)
        return weight, DampedOptimizer(base, host.make("wrappers", Choice("ars")))

    def train(weight: torch.nn.Parameter, optimizer: DampedOptimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            weight.grad = torch.randn(64, 128).bfloat16()
            optimizer.step(loss=torch.tensor(1.0 - 0.01 * step))

    weight, optimizer = made()
    train(weight, optimizer, range(3))
    tensors, skeleton = pack(optimizer.state_dict())
    copied = weight.detach().clone()
    again, resumed = made()
    resumed.load_state_dict(unpack({k: v.clone() for k, v in tensors.items()}, skeleton))
    with torch.no_grad():
        again.copy_(copied)
    train(weight, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert torch.equal(weight, again)
    assert not torch.equal(weight, copied)
    assert sum(t.nbytes for t in tensors.values()) < 3 * weight.numel()


def test_a_saved_state_of_an_unknown_kind_is_not_loaded() -> None:
    tree = {"kind": "os:system", "facts": [], "parts": {}}
    tensors, skeleton = pack(tree)
    with pytest.raises(TypeError, match="which is not known here"):
        unpack(tensors, {"quantised": skeleton})


class Measured:
    """The live bytes of a member's training, of which its parameters are part."""

    peak = 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ars_kit import family

        train = family.train_member

        def watched(job: Any) -> None:
            with LiveBytes() as live:
                for parameter in job.model.parameters():
                    live._count(parameter.untyped_storage())
                train(job)
            self.peak = live.peak

        monkeypatch.setattr(family, "train_member", watched)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Measured]:
    return Measured(monkeypatch)


@pytest.mark.parametrize("recipe", ["full", "lean", "tiny"])
@pytest.mark.parametrize(
    "shape",
    [
        {"data.sequence_length": 128, "train.batch_size": 2},
        {"family.members": "d7", "family.aspect": 9.0, "train.accumulation": 2},
    ],
    ids=["shallow", "deep"],
)
def test_a_run_takes_the_memory_that_was_foreseen(
    home: Home, tmp_path: Path, measured: Measured, recipe: str, shape: dict[str, Any]
) -> None:
    from ars_kit.runs import execute

    host, text_folder, cache = home
    # The first step makes the optimizer's states, the second takes what all others do.
    more = {"train.memory": recipe, "train.steps_per_iteration": 2}
    plan = planned(host, text_folder, **{**shape, **more})
    plan = fitted_plan(plan, host, tmp_path / "run")
    expected = foreseen(plan, host, plan.members[0], RECIPES[recipe]).peak
    metrics, _ = execute(plan, host, tmp_path / "run", cache, watcher=Quiet())
    assert metrics[0]["memory"] == recipe
    assert expected == pytest.approx(measured.peak, rel=0.1)


def test_an_heir_takes_on_moments_of_few_bits_and_tiny_weights_are_bf16(
    host: Host, text_folder: Path, cache: Path, tmp_path: Path
) -> None:
    from ars_kit.runs import execute

    flags = {"train.memory": "tiny", "family.members": "d3,d4", "train.iterations": (4, 2)}
    plan = fitted_plan(planned(host, text_folder, **flags), host, tmp_path / "run")
    metrics, _ = execute(plan, host, tmp_path / "run", cache, watcher=Quiet())
    assert [m["birth"].get("optimizer_state") for m in metrics] == [None, "carried"]
    assert {m["base_optimizer"] for m in metrics} == {"adamw-8bit"}
    assert metrics[1]["final_loss"] < metrics[0]["final_loss"]
    weights = load_file(tmp_path / "run" / "d4" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}


def test_auto_takes_the_first_recipe_that_fits(
    host: Host, looked: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert looked.recipe.name == "full"
    assert list(looked.footprints) == ["full", "lean", "tiny"]
    full, lean, tiny = (f.peak for f in looked.footprints.values())
    assert full > lean > tiny
    known = looked.footprints
    monkeypatch.setattr(fitting, "foreseen", lambda *args: known[args[3].name])
    for room, name in ((full, "full"), (lean, "lean"), (tiny - 1, "tiny")):
        tight = replace(looked, memory_available=room, footprints={})
        assert fitted_plan(tight, host, tmp_path).recipe.name == name


def test_a_run_goes_on_with_the_recipe_it_began_with(
    host: Host, looked: RunPlan, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.private.mkdir(parents=True)
    folder.states("d5").save({"weights": {}}, step=1, keep=[])
    (folder.private / "plan.json").write_text('{"memory": "lean"}')
    assert fitted_plan(looked, host, tmp_path).recipe.name == "lean"


def test_a_batch_too_large_is_refused_with_what_would_fit(host: Host, looked: RunPlan) -> None:
    lean, smallest = looked.footprints["lean"].peak, min(f.peak for f in looked.footprints.values())
    for room, hint in (
        (lean, "--memory lean would take"),
        (smallest - 1, "--accumulation [24] would take"),
        (1000, "no recipe fits"),
    ):
        with pytest.raises(ConfigError, match=hint) as refusal:
            require_fit(replace(looked, memory_available=room), host)
        assert "\n" not in str(refusal.value)
    require_fit(looked, host)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train.precision": "fp32"}, "keeps weights in bf16; leave --precision fp32 out"),
        ({"optimizer.base": "sgd"}, "which base optimizer 'sgd' cannot"),
        ({"optimizer.name": "sgd"}, "which base optimizer 'sgd' cannot"),
        ({"optimizer.gates": "clip"}, "'clip' looks at all gradients together.*--no-gate clip"),
        ({"optimizer.gates": "norm-memory"}, "'norm-memory' looks at all gradients together"),
        ({"optimizer.name": "adamw", "optimizer.gates": "clip"}, "'clip' looks at all gradients"),
        ({"optimizer.name": "ars:norm_memory=true"}, "loss_only rules out"),
        ({"optimizer.name": "ars:loss_only=false"}, "'norm-memory' looks at all gradients"),
    ],
)
def test_what_contradicts_tiny_is_refused_before_training(
    host: Host, text_folder: Path, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    plan = planned(host, text_folder, **{"train.memory": "tiny", **flags})
    with pytest.raises(ConfigError, match=message):
        fitted_plan(plan, host, tmp_path)


def test_several_processes_are_refused_tiny_and_auto_does_not_take_it(
    host: Host, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use --memory lean, or one process"):
        fitted_plan(planned(host, text_folder, **{"train.memory": "tiny"}), host, tmp_path)
    plan = replace(planned(host, text_folder), memory_available=1000)
    assert fitted_plan(plan, host, tmp_path).recipe.name == "lean"


def test_auto_does_not_take_tiny_where_a_gate_looks_at_gradients(
    host: Host, text_folder: Path, tmp_path: Path
) -> None:
    plan = planned(host, text_folder, **{"optimizer.gates": "clip"})
    found = fitted_plan(replace(plan, memory_available=1000), host, tmp_path)
    assert found.recipe.name == "lean"
    assert list(found.footprints) == ["full", "lean"]


def test_stepping_within_the_backward_pass_is_foreseen_to_save_the_gradients(
    host: Host, looked: RunPlan
) -> None:
    member, tiny = looked.members[0], RECIPES["tiny"]
    plan = replace(looked, device="cuda")  # where an optimizer's own temporaries do not count
    usual = foreseen(plan, host, member, replace(tiny, in_backward=False))
    within = foreseen(plan, host, member, tiny)
    assert within.gradients < 0.3 * usual.gradients  # of the largest tensor alone
    saved = usual.peak - within.peak
    assert 0.3 * usual.gradients < saved < usual.gradients
    parts = foreseen(plan, host, member, tiny, 2)
    # Of two micro-batches the gradients of the first stand.
    assert parts.gradients == pytest.approx(usual.gradients, rel=0.01)


def test_what_many_chunks_take_is_foreseen_from_a_few(
    host: Host, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a text as long as ten chunks, of which three or all are tried; and of a longer one."""
    peaks = []
    for most in (99, 3):
        monkeypatch.setattr(footprint, "CHUNKS", most)
        long = {"data.sequence_length": 2**16, "train.batch_size": 16}
        plan = planned(host, text_folder, **long)
        found = foreseen(plan, host, plan.members[0], RECIPES["lean"])
        peaks.append(found)
    assert peaks[1].peak == pytest.approx(peaks[0].peak, rel=1e-3)
    assert peaks[1].gradients == peaks[0].gradients


def test_the_work_of_foreseeing_does_not_grow_with_the_text(
    host: Host, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    part = ChunkedLoss._part
    monkeypatch.setattr(
        ChunkedLoss, "_part", lambda self, h, t: (made.append(len(h)), part(self, h, t))[1]
    )
    plan = planned(host, text_folder, **{"data.sequence_length": 10**6, "train.batch_size": 32})
    found = foreseen(plan, host, plan.members[0], RECIPES["lean"])
    assert found.peak > 32 * 10**6 * 66 * 4  # the hidden states alone
    assert len(made) == 2 * footprint.CHUNKS  # once forward, once backward


def test_tiny_without_ars_judges_the_loss_and_each_gradient(home: Home, tmp_path: Path) -> None:
    from ars_kit.runs import execute

    host, text_folder, cache = home
    flags = {"train.memory": "tiny", "optimizer.name": "adamw", "train.iterations": (4, 2)}
    plan = fitted_plan(planned(host, text_folder, **flags), host, tmp_path / "run")
    metrics, _ = execute(plan, host, tmp_path / "run", cache, watcher=Quiet())
    assert list(metrics[0]["gates"]) == ["guard"]
    rows = read_history(tmp_path / "run" / "d3" / "history.jsonl")
    assert [row["dropped"] for row in rows] == [0.0] * 12
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_where_weights_are_sharded_nothing_is_foreseen_and_other_recipes_are_refused(
    host: Host, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plan = fitted_plan(planned(host, text_folder), host, tmp_path, look=True)
    assert (plan.recipe.name, dict(plan.footprints)) == ("full", {})
    with pytest.raises(ConfigError, match="FSDP2 shards them"):
        fitted_plan(planned(host, text_folder, **{"train.memory": "lean"}), host, tmp_path)
