"""``--trainable lora``: adapters train beside what is inherited, and are merged at the commit."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Quiet
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from ars_kit import adapters as adapters_module
from ars_kit.adapters import Adapters, last_blocks, share_of
from ars_kit.backward import InBackward
from ars_kit.cli import cli
from ars_kit.compiling import compiled
from ars_kit.controls import plan_controls
from ars_kit.errors import ConfigError, Preempted
from ars_kit.fitting import fitted_plan, foreseen
from ars_kit.host import Host
from ars_kit.ledger import counting
from ars_kit.live import LiveBytes
from ars_kit.lora import Lora, parse_trainable
from ars_kit.memory import RECIPES, ChunkedLoss, prepare, whole_loss
from ars_kit.models import build, load_base, parameter_groups, trained_weights, weights_of
from ars_kit.optim import make_base, under_recipe
from ars_kit.plan import RunPlan, plan_run
from ars_kit.resolving import resolve
from ars_kit.runs import execute
from ars_kit.schema import parse_choice
from ars_kit.store import RunFolder

pytestmark = pytest.mark.usefixtures("undrawn")

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gpt2": GPT2Config(
        vocab_size=300,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    ),
}
WINDOW = torch.randint(1, 300, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def host() -> Host:
    return Host.installed()


def adapted(config: Any, lora: Lora | None = None, new: int = 0) -> tuple[Any, Adapters]:
    model = build(config, seed=0)
    rng = torch.Generator().manual_seed(1)
    made = Adapters(model, lora or Lora(r=4), whole=last_blocks(model, new), rng=rng)
    return model.train(), made


def moved(model: Any) -> None:
    """Let adapters say something."""
    draw = torch.Generator().manual_seed(2)
    for parameter in trained_weights(model).values():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


# --- Adapters in a model -----------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_change_nothing_at_first_and_are_merged_exactly(config: Any) -> None:
    plain = build(config, seed=0).eval()
    model, made = adapted(config)
    known = vars(model).keys() - vars(plain).keys()
    with torch.no_grad():
        assert torch.equal(model.eval()(WINDOW).logits, plain(WINDOW).logits)
        moved(model)
        before = model(WINDOW).logits
        live = {name: tensor.clone() for name, tensor in made.weights().items()}
        made.merge()
        torch.testing.assert_close(model(WINDOW).logits, before, rtol=0, atol=1e-5)
    assert (before - plain(WINDOW).logits).abs().max() > 0.01
    merged = weights_of(model)
    assert list(merged) == list(weights_of(plain)) == list(live)
    assert all(torch.equal(merged[name], live[name]) for name in merged)
    assert all(p.requires_grad for p in model.parameters())
    assert vars(model).keys() - vars(plain).keys() <= known - {"peft_config"}


def test_what_small_adapters_learn_survives_a_merge_into_bf16() -> None:
    """Rounded to the nearest, a change of less than half a unit would be gone."""
    model, made = adapted(CONFIGS["qwen2"])
    prepare(model, replace(RECIPES["tiny"], recompute=False))
    moved(model)
    exact = {n: t.detach().float() for n, t in made.weights().items() if n in made._layers}
    plain = {n: t.clone() for n, t in made._plain.items()}
    made.merge(seed=0)
    merged = weights_of(model)
    assert all(t.dtype == torch.bfloat16 for t in merged.values())
    delta = torch.cat([(exact[n] - plain[n].float()).flatten() for n in exact])
    found = torch.cat([(merged[n].float() - plain[n].float()).flatten() for n in exact])
    assert (found * delta).sum() / (delta * delta).sum() == pytest.approx(1, abs=0.1)


def test_a_name_that_is_no_linear_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="no linear layer w_proj; it has: down_proj, gate_proj"):
        adapted(CONFIGS["llama"], Lora(targets=("q_proj", "w_proj")))
    _, made = adapted(CONFIGS["llama"], Lora(targets=("q_proj", "v_proj")))
    assert len(made._layers) == 4


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lora:r=0", "r must be 1 or more"),
        ("lora:rank=4", "'lora' has no setting 'rank'"),
        ("lora:dropout=1", "dropout must lie in"),
        ("lora:alpha=-1", "alpha must be greater than 0"),
        ("lra", r"not 'lra' \(did you mean 'lora'\?\)"),
        ("all:r=4", "'all' has no settings"),
    ],
)
def test_what_no_adapter_can_have_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        resolve({"train.trainable": text}, {})


@pytest.mark.parametrize(("new", "config"), [(0, "qwen2"), (0, "llama"), (1, "qwen3")])
def test_the_ledger_is_what_torch_counts(new: int, config: str) -> None:
    """All but the gradient of the first layer's input, which nobody needs and nobody computes."""
    lora = Lora(r=4)
    model = build(CONFIGS[config], seed=0)
    share = share_of(model, 16, lora, whole=last_blocks(model, new))
    model, _ = adapted(CONFIGS[config], lora, new)
    assert sum(p.numel() for p in trained_weights(model).values()) == share.parameters
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        _, loss = whole_loss(model, WINDOW)
        loss.backward()
    first = model.model.layers[0].self_attn
    unneeded = sum(2 * p.weight.numel() for p in (first.q_proj, first.k_proj, first.v_proj))
    unneeded += sum(
        2 * p.lora_A["default"].weight.numel() for p in (first.q_proj, first.k_proj, first.v_proj)
    )
    assert counter.get_total_flops() == pytest.approx(32 * (share.flops - unneeded), rel=5e-4)
    assert share.flops < adapters_module.flops_per_token(CONFIGS[config], 16)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_chain_compiles_no_layer_twice() -> None:
    """One program for the layer whose input needs no gradient, and one for all others."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    for depth in (2, 2, 4):
        model, made = adapted(Qwen2Config(**{**SIZES, "num_hidden_layers": depth}))
        with compiled(model, backend="eager"):
            _, loss = whole_loss(model, WINDOW)
            loss.backward()
        made.merge()
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_and_chunked_and_recomputed_the_gradients_are_the_same() -> None:
    def gradients(name: Any, *, compile_: bool = False) -> Any:
        model = build(CONFIGS["qwen2"], seed=0)
        recipe = RECIPES[name]
        prepare(model, recipe)
        rng = torch.Generator().manual_seed(1)
        Adapters(model, Lora(r=4), whole=last_blocks(model, 1), rng=rng)
        moved(model.train())
        loss_of = ChunkedLoss(model, 300 * 5) if recipe.chunked else whole_loss
        if compile_:
            with compiled(model, backend="eager"):
                _, loss = loss_of(model, WINDOW)
        else:
            _, loss = loss_of(model, WINDOW)
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients("full")
    assert all(grad is not None for grad in plain.values())
    torch.testing.assert_close(gradients("lean"), plain, rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()
    torch.testing.assert_close(gradients("full", compile_=True), plain, rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()


# --- Plans -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, text_folder: Path, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("base")
    flags = {
        "family.members": "d2", "family.vocab_size": 300, "family.aspect": 6.0,
        "train.iterations": (20, 1), "train.batch_size": 4, "data.source": str(text_folder),
        "data.sequence_length": 32, "data.heldout_tokens": 256, "train.steps_per_iteration": 1,
    }  # fmt: skip
    execute(plan_run(resolve(flags, {}), Host.installed()), Host.installed(), out, cache,
            watcher=Quiet())  # fmt: skip
    return out / "d2"


def flags_of(base: Path | None, text: Path, **more: Any) -> dict[str, Any]:
    own = {"family.base": str(base)} if base else {"family.vocab_size": 300, "family.width": 16}
    return {
        "family.members": "d2,d3", "train.iterations": (4, 4), "train.batch_size": 4,
        "data.source": str(text), "data.sequence_length": 32, "data.heldout_tokens": 256,
        "train.trainable": "lora:r=4", "train.lr": 1e-2, "run.save_every": 2,
        **own, **more,
    }  # fmt: skip


def planned(base: Path | None, text: Path, **more: Any) -> RunPlan:
    return plan_run(resolve(flags_of(base, text, **more), {}), Host.installed())


def test_what_adapters_cannot_train_is_refused_before_anything(
    base: Path, text_folder: Path, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {
        "d11 is wider than its parent (hidden_size 24 after 16)": {"family.members": "d10,d11"},
        "here no member inherits": {"family.strategy": "scratch"},
        "which with lora holds adapters alone": {"family.strategy": "trunk",
                                                  "family.depth": "depth"},
    }  # fmt: skip
    for complaint, more in refused.items():
        with pytest.raises(ConfigError) as found:
            planned(None, text_folder, **more)
        assert complaint in str(found.value)
    plan = planned(base, text_folder)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="use DDP"):
        fitted_plan(plan, host, tmp_path)
    monkeypatch.setattr(adapters_module, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'ars-kit\[lora\]'"):
        planned(base, text_folder)


def test_a_base_s_adapters_have_a_rate_of_their_own(base: Path) -> None:
    for trainable, rate in (("all", 1e-5), ("lora", 1e-4)):
        settings = resolve({"family.base": str(base), "train.trainable": trainable}, {})
        assert settings.train.lr == rate
    assert parse_trainable(parse_choice("lora:targets=q_proj,v_proj,r=2")) == Lora(
        r=2, targets=("q_proj", "v_proj")
    )


@pytest.mark.parametrize(("name", "new"), [("full", 0), ("full", 2), ("tiny", 1)])
def test_the_memory_is_foreseen(text_folder: Path, host: Host, name: Any, new: int) -> None:
    """Of six layers by three and four, with blocks that train whole and without."""
    plan = planned(None, text_folder, **{
        "family.depth": "depth", "family.width": 64, "family.head_dim": 16,
        "family.members": "d4,d6", "train.trainable": "lora:r=4,targets=q_proj,down_proj",
    })  # fmt: skip
    assert plan.members[1].new_layers == 2
    member, recipe = replace(plan.members[1], new_layers=new), RECIPES[name]
    expected = foreseen(plan, host, member, recipe)
    with LiveBytes() as live:
        model = build(member.config, seed=0)
        prepare(model, recipe)
        lora = parse_trainable(plan.settings.train.trainable)
        assert lora is not None
        Adapters(model, lora, whole=last_blocks(model, new))
        model.train()
        groups = parameter_groups(model, lr=1e-3, weight_decay=0.0, lr_width=None, lr_vectors=1e-3)
        optimizer = make_base(host, under_recipe(host, plan.settings.optimizer, recipe), groups)
        within = recipe.in_backward
        optimizer = InBackward(optimizer, {}) if within else optimizer
        loss_of = ChunkedLoss(model) if recipe.chunked else whole_loss
        for _ in range(2):
            logits, loss = loss_of(model, torch.zeros((4, 33), dtype=torch.int64))
            del logits
            with optimizer.in_backward() if within else nullcontext():
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert expected.peak == pytest.approx(live.peak, rel=0.1)
    if name == "full":
        whole = foreseen(plan, host, replace(member, new_layers=None), recipe)
        assert expected.gradients < 0.5 * whole.gradients
        assert expected.peak < whole.peak


def test_controls_that_inherit_nothing_train_whole(text_folder: Path, host: Host) -> None:
    plan = planned(None, text_folder, **{
        "family.depth": "depth", "run.controls": "scratch,one-long-run,no-growth,no-ars",
    })  # fmt: skip
    first, heir = plan.members
    assert first.trainable_parameters == first.parameters
    assert heir.trainable_parameters < heir.parameters
    controls = {c.name: c for c in plan_controls(plan, host)}
    for name in ("scratch", "one-long-run", "no-growth"):
        assert all(m.trainable_parameters == m.parameters for m in controls[name].plan.members)
    alone = controls["one-long-run"]
    member = alone.plan.members[0]
    assert member.flops == pytest.approx(alone.budget, rel=1 / member.steps)
    assert controls["no-ars"].plan.members[1].trainable_parameters == heir.trainable_parameters


# --- Runs --------------------------------------------------------------------------------------


class Stopping(Quiet):
    """Asks the run to end after a step of a member."""

    def __init__(self, member: str, step: int) -> None:
        self.at = (member, step)

    def steps(self, *told: Any) -> None:
        if told[:2] == self.at:
            signal.raise_signal(signal.SIGTERM)


def run(plan: RunPlan, out: Path, cache: Path, watcher: Any = None) -> list[dict[str, Any]]:
    metrics, _ = execute(plan, Host.installed(), out, cache, watcher=watcher or Quiet())
    return metrics


def test_a_point_of_the_curve_costs_a_whole_forward_pass(
    base: Path, text_folder: Path, cache: Path, tmp_path: Path
) -> None:
    """Whatever is frozen: judging multiplies by every weight, and by the adapters."""
    plan = planned(base, text_folder, **{"family.members": "d2", "run.heldout_every": 4})
    (metrics,) = run(plan, tmp_path, cache)
    drawn = metrics["heldout_curve"]
    assert drawn["points"] == 2
    model = load_base(str(base))
    lora = parse_trainable(plan.settings.train.trainable)
    assert lora is not None
    Adapters(model, lora)
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    with counting() as account, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    per_token = account.flops / tokens.numel()
    assert drawn["flops"] / (2 * drawn["tokens"]) == pytest.approx(per_token, rel=0.01)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_chain_of_adapters_ends_in_plain_members_however_often_it_stops(
    base: Path, text_folder: Path, cache: Path, tmp_path: Path
) -> None:
    plan = planned(base, text_folder, **{
        "train.trainable": "lora:r=1,dropout=0.1", "run.log_every": 1,
    })  # fmt: skip
    whole, halting = tmp_path / "whole", tmp_path / "halting"
    metrics = run(plan, whole, cache)
    for member, step in (("d2", 1), ("d3", 1)):
        with pytest.raises(Preempted):
            run(plan, halting, cache, Stopping(member, step))
    tree = RunFolder(halting).states("d3").load()[1]  # type: ignore[index]
    assert all("lora_" in name for name in tree["weights"])
    assert run(plan, halting, cache)[1]["heldout_loss"] == metrics[1]["heldout_loss"]
    before = weights_in(base)
    for name in ("d2", "d3"):
        after = weights_in(whole / name)
        other = weights_in(halting / name)
        assert before.keys() == after.keys() == other.keys()
        assert all(torch.equal(after[k], other[k]) for k in after)
        moved = {k for k in after if not torch.equal(before[k], after[k])}
        assert moved == {k for k in after if k.endswith("_proj.weight")}
        before = after
        AutoModelForCausalLM.from_pretrained(whole / name)
    first, heir = metrics
    assert first["trainable_parameters"] == heir["trainable_parameters"] < heir["parameters"]
    assert first["flops"] < 0.85 * first["tokens"] * adapters_module.flops_per_token(
        plan.members[0].config, 32
    )
    assert heir["birth"]["optimizer_state"] == "fresh"
    assert heir["birth"]["birth_logits_difference"] == 0
    assert heir["lineage_flops"] == first["flops"] + heir["flops"]


def test_what_is_new_in_a_deeper_heir_trains_whole(
    base: Path, text_folder: Path, cache: Path, tmp_path: Path
) -> None:
    plan = planned(base, text_folder, **{"family.depth": "grow", "train.trainable": "lora:r=1"})
    _, heir = run(plan, tmp_path, cache)
    parent, child = weights_in(tmp_path / "d2"), weights_in(tmp_path / "d3")
    new = [k for k in child if k.endswith("input_layernorm.weight")]
    norms = [child[k] for k in new]
    kept = [any(torch.equal(n, parent[k]) for k in parent if k in new) for n in norms]
    assert sum(kept) == 2  # of three: that of the new block has moved
    block = new[kept.index(False)].rpartition("input_layernorm")[0]
    assert torch.linalg.matrix_rank(child[f"{block}self_attn.o_proj.weight"]) > 1
    assert heir["trainable_parameters"] == plan.members[1].trainable_parameters
    assert heir["flops"] == pytest.approx(plan.members[1].flops)


@pytest.mark.parametrize("strategy", ["distill", "prune"])
def test_strategies_bear_heirs_that_train_by_adapters(
    strategy: str, text_folder: Path, cache: Path, tmp_path: Path
) -> None:
    plan = planned(None, text_folder, **{"family.depth": "depth", "family.strategy": strategy})
    metrics = run(plan, tmp_path, cache)
    born = {m["model_id"]: m for m in metrics}
    first, heir = ("d3", "d2") if strategy == "prune" else ("d2", "d3")
    assert born[first]["trainable_parameters"] == born[first]["parameters"]
    assert born[heir]["trainable_parameters"] < born[heir]["parameters"]
    if strategy == "prune":  # nothing is new, so nothing trains whole
        layers = plan.members[1].config.num_hidden_layers
        assert born[heir]["trainable_parameters"] == layers * 4 * (4 * 32 + 3 * 64)
    assert born[heir]["heldout_loss"] > 0


def test_what_holds_weights_sees_them_as_they_will_be_merged(
    base: Path, text_folder: Path, cache: Path, tmp_path: Path
) -> None:
    """A penalty of EWC that outweighs the loss keeps an heir near what it inherited."""
    distances = []
    for strength in ("0", "1e9"):
        strategy = f"ewc:strength={strength},gamma=0,sequences=2"
        plan = planned(base, text_folder, **{
            "family.members": "d2", "family.strategy": strategy, "train.schedule": "constant",
            "train.lr": 1e-3, "train.weight_decay": 0.0, "train.iterations": (8, 8),
        })  # fmt: skip
        run(plan, tmp_path / strength, cache)
        before, after = weights_in(base), weights_in(tmp_path / strength / "d2")
        distances.append(sum(float((after[k] - before[k]).square().sum()) for k in before))
    assert distances[1] < 0.5 * distances[0]


def test_the_tiny_recipe_keeps_what_is_frozen_in_bf16(
    base: Path, text_folder: Path, cache: Path, tmp_path: Path
) -> None:
    plan = planned(base, text_folder, **{"train.memory": "tiny"})
    plan = fitted_plan(plan, Host.installed(), tmp_path)
    metrics = run(plan, tmp_path, cache)
    assert metrics[1]["memory"] == "tiny"
    after, before = weights_in(tmp_path / "d3"), weights_in(tmp_path / "d2")
    assert all(t.dtype == torch.bfloat16 for t in after.values())
    assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"],
                           before["model.layers.0.mlp.up_proj.weight"])  # fmt: skip


def test_the_command_line_says_what_trains(base: Path, text_folder: Path, cache: Path) -> None:
    options = ["--base", str(base), "--members", "d2", "--sequence-length", "32",
               "--data", str(text_folder), "--trainable", "lora:r=2"]  # fmt: skip
    env = {"ARSKIT_CACHE": str(cache), "COLUMNS": "200"}
    done = CliRunner().invoke(cli, ["plan", *options], env=env)
    assert "parameters train (lora:r=2)" in done.output, done.exception
