"""What each member of a family will be: its shape, its parent, its steps, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ars_kit.adapters import Share, foreseen_share, require_peft, wider
from ars_kit.errors import ConfigError
from ars_kit.host import Host
from ars_kit.inherit import descents, objection
from ars_kit.lora import WHOLE, parse_trainable
from ars_kit.models import count_parameters, flops_per_token, load_base_config
from ars_kit.roster import Member, parse_roster
from ars_kit.schedule import stable_steps
from ars_kit.settings import Settings
from ars_kit.shapes import embedded_config, grown_config
from ars_kit.spec import Phase

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ars_kit.spec import InheritanceStrategy


@dataclass(frozen=True, slots=True)
class MemberPlan:
    """One member before it is born.

    Attributes:
        start: sequences of its text that its lineage will have read before it; see :func:`placed`.
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


def plan_members(settings: Settings, host: Host) -> tuple[MemberPlan, ...]:
    """Lay out the members, in the order of their birth.

    Raises:
        ConfigError: settings contradict each other, or a member cannot inherit.
        PluginError: the strategy failed.
    """
    choice = settings.family.strategy
    strategy: InheritanceStrategy = host.make("strategies", choice)
    roster = parse_roster(settings.family.members)
    _require_free(roster, strategy, choice.name)
    configs = [member_config(settings, roster, member) for member in roster]
    train, context = settings.train, settings.data.sequence_length
    with host.blaming("strategies", choice.name, "asked who descends from whom"):
        family = descents(strategy, configs)
    branching = {d.parent for d in family if d.phase == "stable"}
    base = _distinct(settings.family.base, roster)
    found: dict[int, MemberPlan] = {}
    for d in family:
        member, config = roster[d.member], configs[d.member]
        parent = None if d.parent is None else found[d.parent]
        origin = parent.config if parent else (load_base_config(base) if base else None)
        with host.blaming("strategies", choice.name, "asked what it supports"):
            reason = None if origin is None else objection(strategy, origin, config)
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


def _distinct(base: str | None, roster: Sequence[Member]) -> str | None:
    """Return how a base is called beside members: by another name than any of them.

    Raises:
        ConfigError: it has the name of a member, and is no directory.
    """
    if base not in {member.name for member in roster}:
        return base
    if not Path(base).is_dir():
        raise ConfigError(f"member {base!r} has the name of the base; name it otherwise")
    return f"./{base}"


def _require_free(roster: Sequence[Member], strategy: InheritanceStrategy, chosen: str) -> None:
    """Refuse members that are called what the strategy will call one that it makes in the end.

    Raises:
        ConfigError: one is.
    """
    made = getattr(strategy, "makes", ())
    if taken := [member.name for member in roster if member.name in made]:
        raise ConfigError(
            f"member {taken[0]!r} has the name of what strategy {chosen!r} makes of the finished "
            "members; name it otherwise"
        )


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


def placed(
    member: MemberPlan,
    family: Sequence[MemberPlan],
    batch_size: int,
    known: Callable[[str], Mapping[str, Any]],
) -> MemberPlan:
    """Return a member that goes on reading where its lineage really stopped.

    No plan can know that: a member that went back has passed over batches, which no heir is to read
    after all, and one that read old texts again has read so much less of its own.

    Args:
        member: as it was planned.
        family: all members, as they were planned.
        batch_size: sequences of a step.
        known: returns a committed member's metrics.
    """
    parent = next((m for m in family if m.name == member.parent and m is not member), None)
    if parent is None:
        return member
    parent, metrics = placed(parent, family, batch_size, known), known(parent.name)
    branch = parent.branch if member.phase == "stable" else None
    passed_over = sum(
        event["batches"]
        for event in metrics["rollbacks"]
        if branch is None or event["back_to"] < branch  # else it left the branch as it was
    )
    sequences = ((parent.steps if branch is None else branch) + passed_over) * batch_size
    sequences -= int(sequences * metrics["birth"].get("replay", 0.0))
    read = {parent.data: parent.start + sequences, **dict(parent.before)}
    return replace(member, start=read.pop(member.data, 0), before=tuple(read.items()))


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
