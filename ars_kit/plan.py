"""Settings and plugins in, a frozen plan out: every user error surfaces here, before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch

from ars_kit.errors import ConfigError
from ars_kit.host import Host
from ars_kit.measure import probe_device, probe_training
from ars_kit.models import (
    count_parameters,
    embedded_config,
    flops_per_token,
    grown_config,
    load_base_config,
)
from ars_kit.optim import check_optimizer
from ars_kit.schema import Choice, parse_choice
from ars_kit.settings import Settings, parse_members

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ars_kit.spec import InheritanceStrategy

PROBE_LIMIT = 50_000_000
"""Members up to this many parameters are timed by a trial step; larger ones by arithmetic."""
PROBE_FLOPS = 5e11
"""And micro-batches up to this many FLOPs: a trial must not take longer than a few seconds."""

HISTORY_ROW = 400
"""Bytes of a step's line in history.jsonl, roughly."""


@dataclass(frozen=True, slots=True)
class MemberPlan:
    """One member before it is born.

    Attributes:
        start: sequences its lineage has read before it.
        position: 0 for the family's first member, 1 for its last.
        flops: of its training steps, forward and backward.
        memory_bytes: estimated peak of weights, gradients, two moments and activations, fp32.
        seconds: estimated training time; None before :func:`estimate` has looked at the device.
    """

    name: str
    depth: int
    parent: str | None
    config: PretrainedConfig = field(repr=False)
    parameters: int
    steps: int
    tokens: int
    start: int
    position: float
    flops: float
    memory_bytes: int
    seconds: float | None = None

    def facts(self) -> dict[str, Any]:
        """Return the plan's figures, JSON-ready."""
        skipped = {"config", "start", "position"}
        found = {k: v for k, v in asdict(self).items() if k not in skipped}
        return {**found, "width": self.config.hidden_size, "layers": self.config.num_hidden_layers}


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A whole run before it starts.

    Attributes:
        speed_source: how the time was estimated.
    """

    settings: Settings
    members: tuple[MemberPlan, ...]
    device: str
    precision: Literal["fp32", "bf16"]
    speed_source: str = "not estimated"
    memory_available: int = 0

    @property
    def seconds(self) -> float | None:
        """Estimated training time of the family."""
        times = [m.seconds for m in self.members]
        return None if None in times else sum(t for t in times if t is not None)

    @property
    def cost(self) -> float | None:
        """Estimated cost in dollars."""
        seconds = self.seconds
        return None if seconds is None else seconds / 3600 * self.settings.run.price_per_hour

    @property
    def memory_bytes(self) -> int:
        """Estimated peak memory of the largest member."""
        return max(m.memory_bytes for m in self.members)

    @property
    def disk_bytes(self) -> int:
        """What the whole run needs on disk."""
        return self.disk_bytes_for(self.members)

    def disk_bytes_for(self, members: Sequence[MemberPlan]) -> int:
        """Return what members still to come need on disk, with the last one's training states."""
        if not members:
            return 0
        states = 2 if self.settings.train.on_instability == "ignore" else 4
        kept = sum(4 * m.parameters + HISTORY_ROW * m.steps for m in members)
        return kept + states * 12 * members[-1].parameters

    def facts(self) -> dict[str, Any]:
        """Return the plan, JSON-ready."""
        return {
            "members": [m.facts() for m in self.members],
            "device": self.device,
            "precision": self.precision,
            "tokens": sum(m.tokens for m in self.members),
            "flops": sum(m.flops for m in self.members),
            "estimated_seconds": self.seconds,
            "estimated_cost": self.cost,
            "estimated_memory_bytes": self.memory_bytes,
            "available_memory_bytes": self.memory_available,
            "estimated_disk_bytes": self.disk_bytes,
            "fits": self.memory_bytes <= self.memory_available,
            "price_per_hour": self.settings.run.price_per_hour,
            "speed_source": self.speed_source,
        }


def plan_run(settings: Settings, host: Host) -> RunPlan:
    """Check every choice and lay out the family.

    Raises:
        ConfigError: settings contradict each other or the device.
        PluginError: a name nobody offers.
    """
    check_optimizer(host, settings.optimizer)
    host.check("data_sources", parse_source(settings.data.source, host))
    for evaluator in settings.run.evaluators:
        host.make("evaluators", evaluator)
    strategy: InheritanceStrategy = host.make("strategies", settings.family.strategy)
    device = pick_device(settings.train.device)
    precision = _precision(settings.train.precision, device)

    def refusal(parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
        with host.blaming("strategies", settings.family.strategy.name, "asked what it supports"):
            return strategy.supports(parent, child)

    members = _members(settings, bool(strategy.inherits), refusal)
    memory = _available_memory(device)
    return RunPlan(settings, members, str(device), precision, memory_available=memory)


def estimate(plan: RunPlan) -> RunPlan:
    """Add estimated times, from trial steps of the first and the last member on this device."""
    device = torch.device(plan.device)
    train, data = plan.settings.train, plan.settings.data
    first, last = plan.members[0], plan.members[-1]
    per_micro_batch = last.flops / last.steps / train.accumulation
    if last.parameters > PROBE_LIMIT or per_micro_batch > PROBE_FLOPS:
        speed = probe_device(device)
        times = [m.flops / speed.flops_per_second for m in plan.members]
        source = speed.source
    else:
        micro = train.batch_size // train.accumulation
        low, high = (
            probe_training(
                m.config, sequence_length=data.sequence_length, micro_batch=micro, device=device
            )
            for m in (first, last)
        )
        span = (last.flops / last.steps - first.flops / first.steps) or 1.0
        times = []
        for m in plan.members:
            share = (m.flops / m.steps - first.flops / first.steps) / span
            times.append(m.steps * train.accumulation * (low + (high - low) * share))
        source = f"trial steps of {first.name} and {last.name} on {device}"
    return _replaced(plan, times, source)


def parse_source(text: str, host: Host) -> Choice:
    """Read ``--data``: a source's name, ``hf:owner/name``, ``NAME:key=value``, or a path."""
    name, colon, rest = text.partition(":")
    if name not in host.shelves["data_sources"]:
        return Choice("files", {"path": text})
    if colon and rest and "=" not in rest.partition(",")[0]:
        return Choice(name, {"name" if name != "files" else "path": rest})
    return parse_choice(text)


def pick_device(wanted: str) -> torch.device:
    """Return the device to train on.

    Raises:
        ConfigError: it was asked for and is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return torch.device(next(name for name, here in there.items() if here))
    if not there[wanted]:
        have = ", ".join(name for name, here in there.items() if here)
        raise ConfigError(f"device {wanted!r} is not available here; there is: {have}")
    return torch.device(wanted)


def _precision(wanted: str, device: torch.device) -> Literal["fp32", "bf16"]:
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if wanted == "auto":
        return "bf16" if supported else "fp32"
    return "bf16" if wanted == "bf16" else "fp32"


def _members(
    settings: Settings,
    inherits: bool,
    refusal: Callable[[PretrainedConfig, PretrainedConfig], str | None],
) -> tuple[MemberPlan, ...]:
    depths = parse_members(settings.family.members)
    configs = _configs(settings, depths)
    train, data = settings.train, settings.data
    context = data.sequence_length
    members: list[MemberPlan] = []
    base = settings.family.base
    for i, (depth, config) in enumerate(zip(depths, configs, strict=True)):
        previous = members[-1] if members and inherits else None
        origin = previous.config if previous else (load_base_config(base) if base else None)
        reason = refusal(origin, config) if origin is not None else None
        if reason:
            raise ConfigError(f"d{depth} cannot inherit: {reason}")
        limit = getattr(config, "max_position_embeddings", context)
        if context > limit:
            raise ConfigError(f"data.sequence_length {context} is more than the model's {limit}")
        heir = i > 0 and inherits
        iterations = train.iterations[1] if heir else train.iterations[0]
        per_step = train.batch_size * context
        steps = (
            max(1, round(train.tokens / per_step))
            if train.tokens
            else iterations * train.steps_per_iteration
        )
        parameters = count_parameters(config)
        flops = flops_per_token(config, context)
        members.append(
            MemberPlan(
                name=f"d{depth}",
                depth=depth,
                parent=previous.name if previous else base,
                config=config,
                parameters=parameters,
                steps=steps,
                tokens=steps * per_step,
                start=previous.start + previous.steps * train.batch_size if previous else 0,
                position=i / (len(depths) - 1) if len(depths) > 1 else 0.0,
                flops=flops * steps * per_step,
                memory_bytes=_memory(config, parameters, settings),
            )
        )
    return tuple(members)


def _configs(settings: Settings, depths: tuple[int, ...]) -> list[PretrainedConfig]:
    family = settings.family
    if family.base is None:
        return [
            embedded_config(
                depth,
                vocab_size=family.vocab_size,
                context=settings.data.sequence_length,
                aspect=family.aspect,
                head_dim=family.head_dim,
            )
            for depth in depths
        ]
    base = load_base_config(family.base)
    if family.depth == "same":
        return [base for _ in depths]
    # The first member has the base's layers; each later one is deeper by what its number says.
    return [grown_config(base, base.num_hidden_layers + d - depths[0]) for d in depths]


def _memory(config: PretrainedConfig, parameters: int, settings: Settings) -> int:
    """Estimate the peak in bytes: 16 a parameter (weight, gradient, two moments, all fp32),
    activations at 68 x width a token and layer (34 in 16 bits: Korthikanti et al., 2205.05198,
    without the attention matrix), and logits with their gradient.
    """  # noqa: D205 -- one formula in one breath
    train = settings.train
    tokens = train.batch_size // train.accumulation * settings.data.sequence_length
    activations = 68 * config.hidden_size * config.num_hidden_layers * tokens
    return int(16 * parameters + activations + 12 * config.vocab_size * tokens)


def _available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return total
    return int(psutil.virtual_memory().available)


def _replaced(plan: RunPlan, times: list[float], source: str) -> RunPlan:
    members = tuple(replace(m, seconds=t) for m, t in zip(plan.members, times, strict=True))
    return replace(plan, members=members, speed_source=source)


def require_batch(settings: Settings) -> tuple[int, int]:
    """Return the training and held-out tokens a run cannot do without.

    Two windows at least: each epoch reads them from another offset.
    """
    length = settings.data.sequence_length
    return max(2, settings.train.batch_size) * length + 1, length + 1
