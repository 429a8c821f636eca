"""Settings and plugins in, a frozen plan out: every user error surfaces here, before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch

from ars_kit.adapters import Share, foreseen_share, require_peft, wider
from ars_kit.errors import ConfigError
from ars_kit.footprint import Footprint
from ars_kit.host import Host
from ars_kit.inherit import descents
from ars_kit.judge import require_distinct
from ars_kit.lora import WHOLE, parse_trainable
from ars_kit.measure import probe_device, probe_training
from ars_kit.memory import RECIPES, Recipe, RecipeName
from ars_kit.models import (
    count_parameters,
    flops_per_token,
    load_base_config,
)
from ars_kit.optim import check_optimizer
from ars_kit.roster import Member, parse_roster
from ars_kit.schedule import stable_steps
from ars_kit.schema import Choice, parse_choice
from ars_kit.settings import Settings
from ars_kit.shapes import embedded_config, grown_config
from ars_kit.spec import Phase

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
        start: sequences of its text that its lineage has read before it.
        data: the text it trains on, as it was written.
        before: the other texts that its lineage was trained on, and how many sequences of each.
        position: 0 for the family's first member, 1 for its last.
        trainable_parameters: those that train.
        flops: of its training steps, forward and backward.
        memory_bytes: estimated peak of weights, gradients, two moments and activations, fp32.
        phase: of its parent's training that it continues.
        branch: steps after which its state is kept for heirs of its stable phase; None: not kept.
        teacher_flops: of its parent's forward passes beside it; 0 where the parent does not teach.
        new_layers: blocks that train whole beside adapters; None where everything trains.
        seconds: estimated training time; None before :func:`estimate` has looked at the device.
    """

    name: str
    depth: int
    parent: str | None
    config: PretrainedConfig = field(repr=False)
    parameters: int
    trainable_parameters: int
    steps: int
    tokens: int
    start: int
    position: float
    flops: float
    memory_bytes: int
    phase: Phase = "cooled"
    branch: int | None = None
    teacher_flops: float = 0.0
    data: str = ""
    before: tuple[tuple[str, int], ...] = ()
    new_layers: int | None = None
    seconds: float | None = None

    @property
    def planned_flops(self) -> float:
        """FLOPs of its steps and of a teacher's beside them."""
        return self.flops + self.teacher_flops

    def facts(self) -> dict[str, Any]:
        """Return the plan's figures, JSON-ready."""
        skipped = {"config", "start", "position", "branch", "before", "new_layers"}
        found = {k: v for k, v in asdict(self).items() if k not in skipped}
        return {**found, "width": self.config.hidden_size, "layers": self.config.num_hidden_layers}


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
    members = _members(settings, host)
    memory = _available_memory(device)
    return RunPlan(settings, members, str(device), precision, memory_available=memory)


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
            share = (m.planned_flops / m.steps - first.flops / first.steps) / span
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


def _members(settings: Settings, host: Host) -> tuple[MemberPlan, ...]:
    choice = settings.family.strategy
    strategy: InheritanceStrategy = host.make("strategies", choice)
    roster = parse_roster(settings.family.members)
    configs = [member_config(settings, roster, member) for member in roster]
    train, context = settings.train, settings.data.sequence_length
    with host.blaming("strategies", choice.name, "asked who descends from whom"):
        family = descents(strategy, configs)
    branching = {d.parent for d in family if d.phase == "stable"}
    base = settings.family.base
    found: dict[int, MemberPlan] = {}
    for d in family:
        member, config = roster[d.member], configs[d.member]
        parent = None if d.parent is None else found[d.parent]
        origin = parent.config if parent else (load_base_config(base) if base else None)
        with host.blaming("strategies", choice.name, "asked what it supports"):
            reason = strategy.supports(origin, config) if origin is not None else None
        if reason:
            raise ConfigError(f"{member.name} cannot inherit: {reason}")
        limit = getattr(config, "max_position_embeddings", context)
        if context > limit:
            raise ConfigError(f"data.sequence_length {context} is more than the model's {limit}")
        steps = _steps(settings, member, heir=parent is not None)
        data = member.data or settings.data.source
        read = _read(parent, d.phase, train.batch_size) if parent else {}
        tokens = steps * train.batch_size * context
        parameters = count_parameters(config)
        share = _share(settings, member, origin, config)
        if share is not None and d.phase == "stable":
            raise ConfigError(
                f"strategy {choice.name!r} continues a state from before the learning rate falls, "
                "which with lora holds adapters alone; use --trainable all"
            )
        trainable = share.parameters if share else parameters
        per_token = share.flops if share else flops_per_token(config, context)
        taught = origin if d.taught else None
        found[d.member] = MemberPlan(
            name=member.name,
            depth=member.num_hidden_layers,
            parent=parent.name if parent else base,
            config=config,
            parameters=parameters,
            trainable_parameters=trainable,
            steps=steps,
            tokens=tokens,
            start=read.pop(data, 0),
            position=d.member / (len(roster) - 1) if len(roster) > 1 else 0.0,
            flops=per_token * tokens,
            memory_bytes=_memory(config, parameters, settings, taught)
            - 12 * (parameters - trainable),
            phase=d.phase,
            branch=_branch(settings, steps) if d.member in branching else None,
            teacher_flops=flops_per_token(taught, context) / 3 * tokens if taught else 0.0,
            data=data,
            before=tuple(read.items()),
            new_layers=share.new if share else None,
        )
    members = tuple(found.values())
    if train.trainable != WHOLE and all(m.parent is None for m in members):
        raise ConfigError(
            f"--trainable {train.trainable} puts adapters beside what is inherited, and here no "
            "member inherits; name a --base, or use a strategy that inherits"
        )
    return members


def _share(
    settings: Settings, member: Member, origin: PretrainedConfig | None, config: PretrainedConfig
) -> Share | None:
    """Return what of a member trains; None where all of it does.

    Raises:
        ConfigError: adapters cannot train it.
    """
    lora = parse_trainable(settings.train.trainable)
    if lora is None:
        return None
    require_peft()
    if origin is None:
        return None
    if more := wider(origin, config):
        raise ConfigError(
            f"{member.name} is wider than its parent ({more}), and with lora what is new in a "
            "matrix would stay as it was made; use --trainable all, or members that are only deeper"
        )
    new = max(0, config.num_hidden_layers - origin.num_hidden_layers)
    return foreseen_share(config, settings.data.sequence_length, lora, new)


def _read(parent: MemberPlan, phase: Phase, batch_size: int) -> dict[str, int]:
    """Return how many sequences of each text an heir's lineage has read when it is born."""
    taken = parent.branch if phase == "stable" and parent.branch else parent.steps
    return {parent.data: parent.start + taken * batch_size, **dict(parent.before)}


def _steps(settings: Settings, member: Member, *, heir: bool) -> int:
    train = settings.train
    tokens = member.tokens or train.tokens
    if tokens:
        return max(1, round(tokens / (train.batch_size * settings.data.sequence_length)))
    return train.iterations[1 if heir else 0] * train.steps_per_iteration


def _branch(settings: Settings, steps: int) -> int:
    """Return after how many steps a member's heir leaves it, when it inherits the stable phase."""
    train = settings.train
    if train.schedule != "wsd":
        raise ConfigError(
            f"strategy {settings.family.strategy.name!r} inherits from before the learning rate "
            f"falls, which only train.schedule = wsd tells; it is {train.schedule}"
        )
    return stable_steps(steps, train.decay_fraction)


def member_config(settings: Settings, roster: Sequence[Member], member: Member) -> PretrainedConfig:
    """Return the configuration that a run gives a member.

    Args:
        settings: the run's.
        roster: all of its members.
        member: any, of the roster or not.

    Raises:
        ConfigError: such a member cannot be.
    """
    family = settings.family
    sizes = {k: v for k, v in member.shape().items() if v is not None}
    try:
        if family.base is None:
            if family.depth == "depth":
                sizes = {"hidden_size": family.width, **sizes}
            return embedded_config(
                member.num_hidden_layers,
                vocab_size=family.vocab_size,
                context=settings.data.sequence_length,
                aspect=family.aspect,
                head_dim=family.head_dim,
                architecture=family.architecture,
                init=family.init,
                sizes=sizes,
            )
        base = load_base_config(family.base)
        if family.depth == "same":
            _require_shape_of(base, sizes if ":" in family.members else {})
            return base
        if ":" in family.members:
            return grown_config(base, member.num_hidden_layers, sizes)
        # The first has the base's layers; each later one is deeper by what its number says.
        deeper = member.num_hidden_layers - roster[0].num_hidden_layers
        return grown_config(base, base.num_hidden_layers + deeper)
    except ConfigError as error:
        raise ConfigError(f"{member.name}: {error}") from error


def _require_shape_of(base: PretrainedConfig, sizes: Mapping[str, int]) -> None:
    heads = base.num_attention_heads
    for key, wanted in sizes.items():
        own = getattr(base, key, None)
        if key == "head_dim":
            own = own or base.hidden_size // heads
        if own != wanted:
            raise ConfigError(
                f"it was given {key} {wanted}, and under --depth same it has the base's, {own}; "
                "use --depth grow, or leave that out"
            )


def _memory(
    config: PretrainedConfig, parameters: int, settings: Settings, teacher: PretrainedConfig | None
) -> int:
    """Estimate the peak in bytes: 16 a parameter (weight, gradient, two moments, all fp32),
    activations at 68 x width a token and layer (34 in 16 bits: Korthikanti et al., 2205.05198,
    without the attention matrix), and logits with their gradient; 4 a parameter of a teacher and
    its logits.
    """  # noqa: D205 -- one formula in one breath
    train = settings.train
    tokens = train.batch_size // train.accumulation * settings.data.sequence_length
    activations = 68 * config.hidden_size * config.num_hidden_layers * tokens
    taught = 4 * count_parameters(teacher) + 4 * config.vocab_size * tokens if teacher else 0
    return int(16 * parameters + activations + 12 * config.vocab_size * tokens + taught)


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
