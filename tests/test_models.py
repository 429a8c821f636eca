"""A member's shape, its life as a Hugging Face directory, and what it costs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    pipeline,
)

from ars_kit.errors import ConfigError, IntegrityError
from ars_kit.models import (
    build,
    count_parameters,
    flops_per_token,
    load_base,
    load_base_config,
    load_member,
    logits_difference,
    parameter_groups,
    save_member,
    set_weights,
    weights_of,
)
from ars_kit.shapes import embedded_config, grown_config

TOKENS = torch.randint(0, 60, (2, 17), generator=torch.Generator().manual_seed(0))
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config_of(cls: Any = Qwen2Config, **more: Any) -> Any:
    return cls(**{**SHAPE, **more})


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    alphabet = "abcdefghij"
    words = {"<|end|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    raw = Tokenizer(models.BPE(words, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    folder = tmp_path / "tokenizer"
    fast.save_pretrained(folder)
    return folder


# --- Shapes ------------------------------------------------------------------------------------


def test_one_knob_sets_the_shape() -> None:
    widths = {d: embedded_config(d, vocab_size=60, context=32).hidden_size for d in range(10, 19)}
    assert widths == {10: 16, **dict.fromkeys(range(11, 16), 24), **dict.fromkeys((16, 17, 18), 32)}
    config = embedded_config(18, vocab_size=60, context=2048)
    assert (config.num_hidden_layers, config.num_attention_heads) == (18, 4)
    assert config.max_position_embeddings == 2048
    model = build(config, seed=0)
    assert model.model.embed_tokens.padding_idx is None  # or the end token would never learn
    std = model.model.layers[0].mlp.gate_proj.weight.std().item()
    assert std == pytest.approx(0.5 / math.sqrt(32), rel=0.05)


@pytest.mark.parametrize("aspect", [1e9, math.inf, math.nan])
def test_a_width_beyond_all_use_is_refused(aspect: float) -> None:
    with pytest.raises(ConfigError, match=r"family\.aspect .* of 10 layers wider than 1,048,576"):
        embedded_config(10, vocab_size=60, context=32, aspect=aspect)


def test_grown_config_changes_the_depth_alone() -> None:
    base = config_of(Qwen3Config, head_dim=8, rope_parameters={"rope_theta": 77.0})
    grown = grown_config(base, 5)
    changed = {k for k, v in grown.to_dict().items() if base.to_dict().get(k) != v}
    assert changed == {"num_hidden_layers", "layer_types"}
    assert base.num_hidden_layers == 3
    assert build(grown, seed=0).config.num_hidden_layers == 5
    with pytest.raises(ConfigError, match="has 3 layers"):
        grown_config(base, 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cls", [Qwen2Config, LlamaConfig, Qwen3Config, GPT2Config])
def test_counted_flops_match_torch(cls: Any, tied: bool) -> None:
    """Within one percent of what FlopCounterMode sees in a real forward and backward."""
    if cls is GPT2Config:
        config: Any = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        config.tie_word_embeddings = tied
    else:
        config = config_of(cls, head_dim=8, tie_word_embeddings=tied)
    config._attn_implementation = "eager"  # its two products are what the formula counts
    model = build(config, seed=0)
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    expected = flops_per_token(config, 32) * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())


def test_a_sliding_window_bounds_the_attention() -> None:
    full = config_of()
    sliding = config_of(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    saved = flops_per_token(full, 32) - flops_per_token(sliding, 32)
    assert saved == 12 * 4 * 8 * 2 * (32 - 8)


# --- Weights -----------------------------------------------------------------------------------


def test_building_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (build(config_of(), seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert logits_difference(first, second, TOKENS) == 0
    assert logits_difference(first, other, TOKENS) > 0
    assert build(config_of(), seed=0, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_weights_go_out_and_in_again(tied: bool) -> None:
    model = build(config_of(tie_word_embeddings=tied), seed=0)
    weights = weights_of(model)
    assert ("lm_head.weight" in weights) is not tied
    assert not any(t.requires_grad for t in weights.values())
    other = build(config_of(tie_word_embeddings=tied), seed=1)
    set_weights(other, weights)
    assert logits_difference(model, other, TOKENS) == 0
    head, embedding = other.lm_head.weight, other.model.embed_tokens.weight
    assert (head is embedding) is tied


def test_weights_that_do_not_fit_are_refused_and_nothing_is_copied() -> None:
    model = build(config_of(), seed=0)
    weights = weights_of(model)
    before = {n: t.clone() for n, t in weights.items()}
    with pytest.raises(ValueError, match="missing"):
        set_weights(model, {k: v for k, v in weights.items() if "norm" not in k})
    with pytest.raises(ValueError, match="unknown"):
        set_weights(model, {**weights, "more": torch.ones(1)})
    changed = {n: t + 1 for n, t in weights.items()}
    with pytest.raises(ValueError, match="has shape"):
        set_weights(model, {**changed, "model.norm.weight": torch.ones(3)})
    assert all(torch.equal(before[n], t) for n, t in weights_of(model).items())


def test_the_logits_difference_restores_modes_and_sees_the_shared_vocabulary() -> None:
    small, large = build(config_of(), seed=0), build(config_of(vocab_size=70), seed=0)
    small.train()
    large.eval()
    with torch.no_grad():
        large.model.embed_tokens.weight[:60] = small.model.embed_tokens.weight
        large.lm_head.weight[:60] = small.lm_head.weight
        for name, p in large.named_parameters():
            if p.shape[0] != 70:
                p.copy_(small.get_parameter(name))
        assert logits_difference(small, large, TOKENS) == 0
        large.lm_head.weight[60:] += 1
        assert logits_difference(small, large, TOKENS) == 0
        large.lm_head.weight[3] += 1
        assert logits_difference(small, large, TOKENS) > 0
    assert small.training
    assert not large.training


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_groups_scale_matrices_alone(tied: bool) -> None:
    model = build(config_of(tie_word_embeddings=tied), seed=0)
    groups = parameter_groups(model, lr=0.1, weight_decay=0.2, lr_width=64, lr_vectors=0.3)
    found = {g["role"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert found == {"matrix": (0.2, 0.2), "embedding": (0.3, 0.0), "vector": (0.3, 0.0)}
    names = {g["role"]: g["names"] for g in groups}
    assert names["embedding"] == ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied)
    assert all("norm" in n or "bias" in n for n in names["vector"])
    every = [n for g in groups for n in g["names"]]
    assert sorted(every) == sorted(n for n, _ in model.named_parameters())
    for group in groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            assert model.get_parameter(name) is p


def test_without_a_reference_width_one_rate_serves_all() -> None:
    model = build(config_of(), seed=0)
    groups = parameter_groups(model, lr=0.1, weight_decay=0.2, lr_width=None, lr_vectors=0.3)
    assert {g["lr"] for g in groups} == {0.1}


# --- Directories -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_member_is_what_plain_transformers_loads(
    tmp_path: Path, tokenizer_dir: Path, tied: bool
) -> None:
    config = config_of(tie_word_embeddings=tied, vocab_size=11, eos_token_id=0, bos_token_id=0)
    model = build(config, seed=0).eval()
    (tokenizer_dir / "model.safetensors").write_bytes(b"not a tokenizer's")
    save_member(model, tokenizer_dir, tmp_path / "d3")
    files = {p.name for p in (tmp_path / "d3").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json"} <= files
    assert not [name for name in files if "index" in name or name.endswith(".bin")]
    assert ("lm_head.weight" in load_file(tmp_path / "d3" / "model.safetensors")) is not tied
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "d3"))
    tokens = TOKENS % 11
    assert logits_difference(model, plain, tokens) == 0
    assert logits_difference(model, load_member(tmp_path / "d3"), tokens) == 0
    assert plain.generation_config.pad_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "d3"))
    assert tokenizer("abc")["input_ids"] == [1, 2, 3]
    assert tokenizer.decode([1, 2, 3]) == "abc"
    writer = pipeline("text-generation", model=str(tmp_path / "d3"), device="cpu")
    # max_length is set by transformers' own default for the pipeline.
    written = writer("ab", max_new_tokens=3, max_length=None, do_sample=False)
    assert written[0]["generated_text"].startswith("ab")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build(config_of(), seed=0).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_local_base_loads_in_the_precision_asked_for(saved: Path) -> None:
    assert load_base_config(str(saved)).hidden_size == 32
    base = load_base(str(saved), torch.bfloat16)
    assert base.dtype == torch.bfloat16
    assert not base.training
    assert logits_difference(build(config_of(), seed=0), load_base(str(saved)), TOKENS) == 0


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_code_of_a_base_is_never_run(saved: Path) -> None:
    (saved / "code.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    edit(saved, auto_map=auto_map)
    config = load_base(str(saved)).config  # transformers has a class of its own for it
    assert not hasattr(config, "auto_map")
    assert not hasattr(load_base_config(str(saved)), "auto_map")
    edit(saved, model_type="unheard-of")
    with pytest.raises(ConfigError, match="code of its own, which is never run"):
        load_base_config(str(saved))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/nowhere/at/all", "does not exist"),
        ("./nowhere", "does not exist"),
        ("./" + "a" * 300, "does not exist"),
        ("~nobody-at-all/model", "does not exist"),
        ("nobody/nothing", "HF_HUB_OFFLINE"),
        ("no such model!", "no hub id"),
    ],
)
def test_a_base_that_is_not_there_is_explained_in_one_line(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        load_base_config(name)
    assert "\n" not in str(caught.value)
    assert repr(name) in str(caught.value)


def test_a_directory_that_is_no_base_is_explained_in_one_line(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_base_config(str(tmp_path))
    edit(saved, model_type="vit")
    with pytest.raises(ConfigError, match="no causal language model"):
        load_base_config(str(saved))
    edit(saved, model_type="unheard-of")
    with pytest.raises(ConfigError, match="does not know its architecture"):
        load_base_config(str(saved))
    (saved / "config.json").write_text("{")
    with pytest.raises(ConfigError) as caught:
        load_base_config(str(saved))
    assert "\n" not in str(caught.value)


def test_a_base_without_all_its_weights_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    weights = load_file(path)
    gone = {k: v for k, v in weights.items() if "layers.1.mlp" not in k}
    save_file(gone, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack model\.layers\.1\.mlp\.down_proj\.weight.*3 in"):
        load_base(str(saved))
    with pytest.raises(IntegrityError, match="lack"):
        load_member(saved)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="damaged"):
        load_base(str(saved))
    path.unlink()
    with pytest.raises(ConfigError) as caught:
        load_base(str(saved))
    assert "\n" not in str(caught.value)
