"""What transformers loads as a causal language model, and is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from ars_kit.errors import ConfigError
from ars_kit.host import Host, Plugin
from ars_kit.models import load_base, load_base_config
from ars_kit.schema import Choice
from ars_kit.spec import Offer, Service, hookimpl
from ars_kit_serving.serve import AUTO, Serving, choose

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 32}  # fmt: skip
BART = {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32, "max_position_embeddings": 32}  # fmt: skip
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


def saved(path: Path, cls: Any, config: Any) -> str:
    torch.manual_seed(0)
    cls(config).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("cls", "config", "kind"),
    [
        (BartForConditionalGeneration, BartConfig(**BART), "an encoder-decoder"),
        (BertForMaskedLM, BertConfig(**SIZES), "a BertForMaskedLM"),
        (GPT2ForSequenceClassification, GPT2Config(**GPT2), "a GPT2ForSequenceClassification"),
    ],
)
def test_a_checkpoint_of_another_task_is_refused_by_its_configuration(
    tmp_path: Path, cls: Any, config: Any, kind: str
) -> None:
    with pytest.raises(ConfigError, match=f"no causal language model: it is {kind}$"):
        load_base_config(saved(tmp_path, cls, config))


@pytest.mark.parametrize(
    ("cls", "config", "mend"),
    [
        (BertLMHeadModel, BertConfig(**SIZES), 'set "is_decoder": true'),
        (XLNetLMHeadModel, XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=32),
         "use a decoder$"),
        (XLMWithLMHeadModel, XLMConfig(vocab_size=60, emb_dim=16, n_layers=1, n_heads=2),
         "use a decoder$"),
        (GemmaForCausalLM,
         GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8, use_bidirectional_attention=True),
         "use a decoder$"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_reads_ahead_is_refused(
    tmp_path: Path, cls: Any, config: Any, mend: str
) -> None:
    with pytest.raises(ConfigError, match=f"tokens that come later.*{mend}") as caught:
        load_base(saved(tmp_path, cls, config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (BartForCausalLM, BartConfig(**BART)),
        (BertLMHeadModel, BertConfig(**SIZES, is_decoder=True)),
        (XLMWithLMHeadModel,
         XLMConfig(vocab_size=60, emb_dim=16, n_layers=1, n_heads=2, causal=True)),
        (GPT2LMHeadModel, GPT2Config(**GPT2)),
        (GPT2Model, GPT2Config(**GPT2)),  # its embeddings are its head
    ],
)  # fmt: skip
def test_a_decoder_is_a_base(tmp_path: Path, cls: Any, config: Any, dtype: torch.dtype) -> None:
    assert load_base(saved(tmp_path, cls, config), dtype).dtype == dtype


def test_auto_asks_no_other_engine_for_what_is_no_decoder(tmp_path: Path) -> None:
    bert = saved(tmp_path, BertLMHeadModel, BertConfig(**SIZES))
    asked: list[str] = []

    def maker(name: str) -> Any:
        def make(service: Service) -> Any:
            asked.append(name)
            return load_base(str(service.path))

        return make

    class Module:
        @staticmethod
        @hookimpl
        def arskit_servers() -> list[Offer[Any]]:
            return [Offer(name, "for tests", maker(name)) for name in AUTO]

    host = Host()
    host.register(Module, Plugin("mine", "arskit-mine", "1"))
    here = Path()
    serving = Serving(
        names=["m"], out=here, host=host, engine=Choice("auto"), cache=here, address="127.0.0.1",
        port=0, key=None, origins=(), context=None, slots=1, queue=1, seconds=1, drain_seconds=1,
        say=print,
    )  # fmt: skip
    service = Service(
        name="m", path=Path(bert), digest="", cache=here, context=None, slots=1, say=print,
        environment={},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^base .* is no causal language model"):
        choose(service, serving)
    assert asked == [AUTO[0]]
