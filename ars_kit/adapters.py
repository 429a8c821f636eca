"""LoRA by peft: adapters put beside a member's frozen weights, and merged into them in the end.

What a member inherited is frozen and adapted. What is new in it, the blocks of a deeper heir,
trains whole: adapters beside a frozen block of zeros would leave it random features of rank r.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.pytorch_utils import Conv1D

from ars_kit.compiling import layers_of
from ars_kit.errors import ConfigError
from ars_kit.models import flops_per_token, meta_model
from ars_kit.spec import LazyWeights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ars_kit.lora import Lora
    from ars_kit.spec import Block

ADAPTER = "default"
WIDTHS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "head_dim",
)  # fmt: skip
"""Sizes of a configuration that make matrices larger."""


@dataclass(frozen=True, slots=True)
class Share:
    """What of a member trains.

    Attributes:
        parameters: how many: the adapters', and those of what is new.
        flops: of forward and backward, per trained token.
        new: blocks that train whole.
    """

    parameters: int
    flops: float
    new: int = 0


def require_peft() -> None:
    """Refuse adapters where peft is not installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("peft") is None:
        raise ConfigError(
            "--trainable lora needs an extra; install it: pip install 'ars-kit[lora]'"
        )


def wider(parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
    """Say by which size a child is wider than its parent; None where it is not."""
    for key in WIDTHS:
        before, after = (getattr(c.get_text_config(), key, None) or 0 for c in (parent, child))
        if before and after > before:
            return f"{key} {after} after {before}"
    return None


def foreseen_share(config: PretrainedConfig, context: int, lora: Lora, new: int) -> Share:
    """Return what of a member will train.

    Args:
        config: the member's.
        context: tokens of a sequence.
        lora: its adapters.
        new: blocks that it has and its parent has not.

    Raises:
        ConfigError: it has no linear layers of those names.
    """
    model = meta_model(config)
    share = share_of(model, context, lora, whole=last_blocks(model, new))
    return replace(share, new=new)


def share_of(model: PreTrainedModel, context: int, lora: Lora, *, whole: Collection[str]) -> Share:
    """Return what of a model will train, before adapters are put into it.

    Of 6 FLOPs for each weight that a token is multiplied by, a frozen one takes 4: forward, and
    the gradient of its input. That the first adapted layer's input needs none is not counted.
    Activations that are computed again are not counted either, as for every member.

    Args:
        model: it may be of the meta device.
        context: tokens of a sequence.
        lora: its adapters.
        whole: names of the parameters that train as they are.
    """
    adapted = targets_of(model, lora, whole)
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    frozen = sum(m.weight.numel() for name, m in linear if f"{name}.weight" not in whole)
    added = sum(lora.r * sum(m.weight.shape) for name, m in linear if name in adapted)
    trained = added + sum(p.numel() for name, p in model.named_parameters() if name in whole)
    flops = flops_per_token(model.config, context) - 2 * frozen + 6 * added
    return Share(trained, flops)


def last_blocks(model: nn.Module, count: int) -> frozenset[str]:
    """Return the names of the parameters of as many of the last blocks."""
    last = {id(p) for block in layers_of(model)[-count:] for p in block.parameters()}
    return frozenset(n for n, p in model.named_parameters() if count and id(p) in last)


def new_tensors(
    names: Collection[str], provenance: Mapping[str, Sequence[Block]]
) -> frozenset[str]:
    """Return the names of the tensors of which nothing was inherited."""
    return frozenset(name for name in names if not provenance.get(name))


def targets_of(model: PreTrainedModel, lora: Lora, whole: Collection[str]) -> list[str]:
    """Return the names of the linear layers that get adapters.

    Args:
        model: before there are any.
        lora: the adapters.
        whole: names of the parameters that train as they are.

    Raises:
        ConfigError: there are none of the names asked for.
    """
    head = model.get_output_embeddings()
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    kinds = sorted({name.rpartition(".")[2] for name in found})
    unknown = [kind for kind in lora.targets if kind not in kinds]
    if unknown or not found:
        raise ConfigError(
            f"lora: a {model.config.model_type} has no linear layer {', '.join(unknown)}; "
            f"it has: {', '.join(kinds) or 'none'}"
        )
    wanted = lora.targets or kinds
    return [n for n in found if n.rpartition(".")[2] in wanted and f"{n}.weight" not in whole]


class Adapters:
    """Adapters in a model, for as long as it trains.

    They are float32, whatever precision the frozen weights have, and compute nothing at first.

    Args:
        model: gets them in place; all else of it is frozen.
        lora: what they are like.
        whole: names of the parameters that train as they are.
        rng: draws the first matrices, on the CPU; None for the default one.

    Raises:
        ConfigError: peft is not installed, or there is nothing to adapt.

    Attributes:
        forward_flops: of their own products, per token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lora: Lora,
        *,
        whole: Collection[str] = (),
        rng: torch.Generator | None = None,
    ) -> None:
        require_peft()
        self._plain = dict(model.named_parameters())
        targets = targets_of(model, lora, whole)
        if not targets:
            raise ConfigError("lora: nothing that was inherited is a linear layer")
        self._tuner = _tuner(model, lora, targets)
        self._layers = {f"{name}.weight": model.get_submodule(name) for name in targets}
        for name, parameter in self._plain.items():
            parameter.requires_grad_(name in whole)
        for layer in self._layers.values():
            self._begin(layer, rng)
        shapes = [self._plain[name].shape for name in self._layers]
        self.forward_flops = 2.0 * lora.r * sum(map(sum, shapes))

    def _begin(self, layer: Any, rng: torch.Generator | None) -> None:
        """Give an adapter its first matrices: A drawn as torch.nn.Linear's, B of zeros."""
        device = layer.get_base_layer().weight.device
        a, b = (part[ADAPTER] for part in (layer.lora_A, layer.lora_B))
        drawn = torch.empty(a.weight.shape).uniform_(-1, 1, generator=rng)
        a.weight = nn.Parameter((drawn / a.in_features**0.5).to(device))
        b.weight = nn.Parameter(torch.zeros(b.weight.shape, device=device))

    def weights(self) -> Mapping[str, Tensor]:
        """Return the member's weights as they will be merged, by Hugging Face name, on demand.

        Those with adapters have the adapters' graph.
        """

        def read(name: str) -> Tensor:
            plain = self._plain[name]
            layer: Any = self._layers.get(name)
            return plain if layer is None else plain + layer.get_delta_weight(ADAPTER)

        return LazyWeights(self._plain, read)

    def merge(self, *, seed: int = 0) -> None:
        """Add the adapters to the weights, in place, and take them out of the model.

        To weights in bf16 they are added with stochastic rounding: most of what a small adapter
        changes is less than half a unit in the last place, and would be rounded away.

        Args:
            seed: of that rounding.
        """
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, layer in self._layers.items():
                plain, delta = self._plain[name], layer.get_delta_weight(ADAPTER)  # type: ignore[operator]
                plain.copy_(_rounded(plain.float() + delta, plain.dtype))
        self._tuner.unload()
        vars(self._tuner.model).pop("peft_config", None)
        for parameter in self._plain.values():
            parameter.requires_grad_()


def _tuner(model: PreTrainedModel, lora: Lora, targets: list[str]) -> Any:
    """Let peft put adapters in, without memory of their own so far."""
    # peft looks at torchao, which tells at import of each kernel for other devices and torches.
    talkers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in talkers]
    for logger in talkers:
        logger.setLevel(logging.ERROR)
    try:
        from peft import LoraConfig  # noqa: PLC0415 -- an extra, and slow to import
        from peft.tuners.lora import LoraModel  # noqa: PLC0415 -- likewise

        alpha: Any = lora.alpha  # peft says int, and takes any number
        config = LoraConfig(
            r=lora.r,
            lora_alpha=alpha,
            fan_in_fan_out=all(isinstance(model.get_submodule(n), Conv1D) for n in targets),
            lora_dropout=lora.dropout,
            target_modules=targets,
        )
        with unset_fake_temporarily():  # among fake tensors peft could not put them aside
            return LoraModel(model, config, ADAPTER, low_cpu_mem_usage=True)
    finally:
        for logger, level in zip(talkers, levels, strict=True):
            logger.setLevel(level)


def _rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.bfloat16:
        return exact.to(dtype)
    from torchao.optim.quant_utils import _fp32_to_bf16_sr  # noqa: PLC0415 -- an extra, and slow

    rounded: Tensor = _fp32_to_bf16_sr(exact)
    return rounded
