"""The peak memory of training steps, foreseen from a configuration alone.

Two real steps are taken on fake tensors, which have shapes and no memory: the model, the loss, the
backward pass and the optimizer are those of the run, and every storage that they make is counted
from its birth to its end. So nothing here is a formula, but for the depth: of a deep model three
and four layers are tried and each phase of the step is continued in a straight line. And of a loss
in many chunks the logits of a few are made: those of one stand at a time, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ars_kit import memory
from ars_kit.adapters import Adapters, last_blocks
from ars_kit.live import LiveBytes, steps_of
from ars_kit.models import build, parameter_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PretrainedConfig, PreTrainedModel

    from ars_kit.lora import Lora
    from ars_kit.memory import Recipe

TRIED = (3, 4)
"""Layers that stand in for a deeper model's."""
CHUNKS = 16
"""Chunks of a loss whose logits are made; one more, without logits, stands in for all others."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes at the peak of a training step.

    Attributes:
        peak: all of them.
        weights: of them, the parameters'.
        gradients: of all parameters together; of the largest alone where each is freed as soon as
            it is used.
        states: the optimizer's.
        rest: what of the peak is none of these: activations, logits, temporaries. Where the peak
            comes before the last gradient, some gradients are not there yet, and it is negative
            by less than they are.
    """

    peak: int
    weights: int
    gradients: int
    states: int

    @property
    def rest(self) -> int:
        """What is none of weights, gradients and states."""
        return self.peak - self.weights - self.gradients - self.states

    def facts(self) -> dict[str, int]:
        """Return the figures, JSON-ready."""
        return {**asdict(self), "rest": self.rest}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a training step computes.

    Attributes:
        sequences: of a micro-batch.
        length: tokens of one.
        bf16: whether fp32 weights compute in bf16 (autocast).
        accumulated: whether a micro-batch finds the gradients of those before it.
        apart: whether the documents of a sequence are kept apart.
        lora: the adapters of what is inherited; None: everything trains.
        new: blocks that are not inherited, and train whole beside adapters.
        device: elsewhere than on the CPU torch's and torchao's fused or compiled optimizers are
            taken to need no memory beside their states.
    """

    sequences: int
    length: int
    bf16: bool = False
    accumulated: bool = False
    apart: bool = False
    lora: Lora | None = None
    new: int = 0
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class _Phases:
    """The peak of each phase, and what stands between steps."""

    forward: int
    top: int  # backward through the head and the last layer
    below: int
    bottom: int  # and through the embedding
    step: int
    weights: int
    gradients: int
    states: int


def footprint(
    config: PretrainedConfig,
    *,
    recipe: Recipe,
    work: Work,
    make: Callable[[list[dict[str, Any]]], Optimizer],
) -> Footprint:
    """Return what a training step takes at its peak; nothing is allocated.

    Args:
        config: the member's.
        recipe: for the device's memory.
        work: what a step computes.
        make: the base optimizer over parameter groups.
    """

    def tried(layers: int, new: int) -> dict[str, int]:
        found = _shallow(config, layers)
        return asdict(_simulate(found, recipe, replace(work, new=new), make))

    depth = getattr(config, "num_hidden_layers", 0)
    if depth <= TRIED[1] + 1 or config.get_text_config() is not config:
        p = _simulate(config, recipe, work, make)
    else:
        low, high = (tried(n, 0) for n in TRIED)
        more = tried(TRIED[1], 1) if work.new else high
        p = _Phases(
            **{
                k: low[k] + (high[k] - low[k]) * (depth - TRIED[0]) + (more[k] - high[k]) * work.new
                for k in low
            }
        )
    peak = max(p.forward, p.top, p.below, p.bottom, p.step)
    return Footprint(peak, p.weights, p.gradients, p.states)


def _shallow(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    tree = config.to_dict()
    tree["num_hidden_layers"] = layers
    if tree.get("layer_types"):
        tree["layer_types"] = tree["layer_types"][:layers]
    return type(config).from_dict(tree)


def _simulate(
    config: PretrainedConfig,
    recipe: Recipe,
    work: Work,
    make: Callable[[list[dict[str, Any]]], Optimizer],
) -> _Phases:
    with FakeTensorMode(), LiveBytes() as live:
        model = build(config, seed=0)
        memory.prepare(model, recipe)
        if work.lora is not None:
            Adapters(model, work.lora, whole=last_blocks(model, work.new))
        model.train()
        weights = live.now
        groups = parameter_groups(model, lr=1e-3, weight_decay=0.0, lr_width=None, lr_vectors=1e-3)
        optimizer = make(groups)
        loss_of = _FewChunks(model) if recipe.chunked else memory.whole_loss
        window = torch.zeros((work.sequences, work.length + 1), dtype=torch.int64)
        positions = torch.zeros_like(window[:, 1:]) if work.apart else None
        _take_gradients(model)
        gradients = live.now - weights
        steps = steps_of(optimizer, live, work.device)
        steps.first()
        optimizer.zero_grad()
        states = live.now - weights
        if work.accumulated:
            _take_gradients(model)
        elif recipe.in_backward:
            gradients = max(p.nbytes for group in groups for p in group["params"])
        if recipe.in_backward:
            steps.follow_gradients()
        peaks = dict.fromkeys(("forward", "top", "below", "bottom", "step"), 0)

        def phase(name: str) -> None:
            peaks[name] = live.peak
            live.peak = live.now

        live.peak = live.now
        passed = _second_last_output(model, config)
        embedded = _embedded(model)
        bf16 = work.bf16 and not recipe.bf16_weights
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits, loss = loss_of(model, window, positions)
        del logits
        phase("forward")
        for output, name in [*((o, "top") for o in passed[:1]), *((o, "below") for o in embedded)]:
            output.register_hook(lambda _, name=name: phase(name))
        loss.backward()
        phase("bottom")
        if work.device == "cpu" and not recipe.in_backward:
            steps.next()
        phase("step")
    return _Phases(**peaks, weights=weights, gradients=gradients, states=states)


class _FewChunks(memory.ChunkedLoss):
    """A chunked loss whose peak is that of all chunks, and whose work does not grow with them."""

    def _of_hidden(self, logits: Tensor, labels: Tensor, *rest: Any, **options: Any) -> Tensor:
        hidden, tried = logits.flatten(0, 1), CHUNKS * self.rows
        if len(hidden) <= tried:
            return super()._of_hidden(logits, labels, *rest, **options)
        parts = hidden.split([self.rows] * CHUNKS + [len(hidden) - tried])
        total = hidden.new_zeros((), dtype=torch.float32)
        for h, t in zip(parts, labels.flatten()[:tried].split(self.rows), strict=False):
            total = total + self.of_chunk(h, t)
        # The last is the first of the backward pass, so its gradient is there when logits are.
        without: Tensor = _Without.apply(parts[-1])  # type: ignore[no-untyped-call]
        return (total + without) / len(hidden)


class _Without(torch.autograd.Function):
    """Nothing is made of the input; it gets a gradient all the same."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.like = hidden.shape, hidden.dtype
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        shape, dtype = ctx.like
        return grad.new_zeros(shape, dtype=dtype)


def _embedded(model: PreTrainedModel) -> Sequence[Tensor]:
    """Return a list that the forward pass puts the embedded tokens into, if they have gradients."""
    found: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        if not found and output.requires_grad:
            found.append(output)

    model.get_input_embeddings().register_forward_hook(note)
    return found


def _take_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def _second_last_output(model: nn.Module, config: PretrainedConfig) -> Sequence[Tensor]:
    """Return a list that the forward pass puts the second last layer's output into."""
    passed: list[Tensor] = []
    depth = config.num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]

    def note(_: nn.Module, __: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if not passed and tensor.requires_grad:
            passed.append(tensor)

    if stacks and depth > 1:
        stacks[0][depth - 2].register_forward_hook(note)
    return passed
