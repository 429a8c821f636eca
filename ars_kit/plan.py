"""Settings and plugins in, a frozen plan out: every user error surfaces here, before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch

from ars_kit.errors import ConfigError
from ars_kit.footprint import Footprint
from ars_kit.host import Host
from ars_kit.hub import pinned
from ars_kit.judge import require_distinct
from ars_kit.measure import probe_device, probe_training
from ars_kit.members import MemberPlan, plan_members
from ars_kit.memory import RECIPES, Recipe, RecipeName
from ars_kit.models import (
    flops_per_token,
)
from ars_kit.optim import check_optimizer
from ars_kit.settings import Settings
from ars_kit.source import parse_source

if TYPE_CHECKING:
    pass

PROBE_LIMIT = 50_000_000
"""Members up to this many parameters are timed by a trial step; larger ones by arithmetic."""
PROBE_FLOPS = 5e11
"""And micro-batches up to this many FLOPs: a trial must not take longer than a few seconds."""

HISTORY_ROW = 400
"""Bytes of a step's line in history.jsonl, roughly."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A whole run before it starts.

    Attributes:
        recipe: for the device's memory.
        footprints: what the largest member takes under each recipe, where it was foreseen.
        speed_source: how the time was estimated.
    """

    settings: Settings
    members: tuple[MemberPlan, ...]
    device: str
    precision: Literal["fp32", "bf16"]
    recipe: Recipe = RECIPES["full"]
    speed_source: str = "not estimated"
    memory_available: int = 0
    footprints: Mapping[RecipeName, Footprint] = field(default_factory=dict)

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
        """Estimated peak memory of the largest member: foreseen, or by a rough formula."""
        if self.recipe.name in self.footprints:
            return self.footprints[self.recipe.name].peak
        return max(m.memory_bytes for m in self.members)

    @property
    def disk_bytes(self) -> int:
        """What the whole run needs on disk."""
        return self.disk_bytes_for(self.members)

    def disk_bytes_for(self, members: Sequence[MemberPlan]) -> int:
        """Return what members still to come need on disk, training states beside them included.

        Two of the largest: the new one is whole before the old one goes. One more where heirs
        continue a stable phase, two where a run may go back.
        """
        if not members:
            return 0
        states = 2 if self.settings.train.on_instability == "ignore" else 4
        kept = sum(4 * m.parameters + HISTORY_ROW * m.steps for m in members)
        states += 1 if any(m.branch for m in self.members) else 0
        return kept + states * 12 * max(m.trainable_parameters for m in members)

    def facts(self) -> dict[str, Any]:
        """Return the plan, JSON-ready."""
        return {
            "members": [m.facts() for m in self.members],
            "device": self.device,
            "precision": self.precision,
            "memory": self.recipe.name,
            "tokens": sum(m.tokens for m in self.members),
            "flops": sum(m.planned_flops for m in self.members),
            "estimated_seconds": self.seconds,
            "estimated_cost": self.cost,
            "estimated_memory_bytes": self.memory_bytes,
            "memory_by_recipe": {name: f.facts() for name, f in self.footprints.items()},
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
    require_distinct(settings.run.evaluators)
    for evaluator in settings.run.evaluators:
        host.make("evaluators", evaluator)
    for tracker in settings.run.trackers:
        host.make("trackers", tracker)
    device = pick_device(settings.train.device)
    precision = _precision(settings.train.precision, device)
    settings = _with_commit(settings)
    members = plan_members(settings, host)
    memory = _available_memory(device)
    return RunPlan(settings, members, str(device), precision, memory_available=memory)


def _with_commit(settings: Settings) -> Settings:
    """Name the commit of a base that comes from the hub; other settings stay as they are."""
    base = settings.family.base
    if base is None:
        return settings
    return replace(settings, family=replace(settings.family, base=pinned(base)))


def estimate(plan: RunPlan) -> RunPlan:
    """Add estimated times, from trial steps of the first and the last member on this device."""
    device = torch.device(plan.device)
    train, data = plan.settings.train, plan.settings.data
    by_step = sorted(plan.members, key=lambda m: m.flops / m.steps)
    first, last = by_step[0], by_step[-1]
    per_micro_batch = last.flops / last.steps / train.accumulation
    if last.parameters > PROBE_LIMIT or per_micro_batch > PROBE_FLOPS:
        speed = probe_device(device)
        times = [m.planned_flops / speed.flops_per_second for m in plan.members]
        source = speed.source
    else:
        micro = train.batch_size // train.accumulation
        low, high = (
            probe_training(
                m.config, sequence_length=data.sequence_length, micro_batch=micro, device=device
            )
            * (m.flops / (flops_per_token(m.config, data.sequence_length) * m.tokens))  # if frozen
            for m in (first, last)
        )
        span = (last.flops / last.steps - first.flops / first.steps) or 1.0
        times = []
        for m in plan.members:
            share = (m.flops / m.steps - first.flops / first.steps) / span
            step = train.accumulation * (low + (high - low) * share)
            # A teacher beside it was not tried; its passes are as fast as the member's own.
            times.append(m.steps * step * m.planned_flops / m.flops)
        source = f"trial steps of {first.name} and {last.name} on {device}"
    return _replaced(plan, times, source)


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


def _available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
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
