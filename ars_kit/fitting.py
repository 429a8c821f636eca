"""Which memory recipe a run takes on its device, and what is said where none fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import get_int_from_env, parse_flag_from_env

from ars_kit.durable import byte_count
from ars_kit.errors import ArsKitError, ConfigError
from ars_kit.footprint import Footprint, Work, footprint
from ars_kit.lora import WHOLE, parse_trainable
from ars_kit.memory import RECIPES, Recipe, RecipeName
from ars_kit.optim import check_loss_only, check_optimizer, make_base, under_recipe
from ars_kit.ranks import require_alone
from ars_kit.records import PLAN_RECORD
from ars_kit.store import RunFolder

if TYPE_CHECKING:
    from ars_kit.host import Host
    from ars_kit.members import MemberPlan
    from ars_kit.plan import RunPlan

PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are; accelerate reads the same."""
PLENTY = 0.25
"""A run whose memory by a rough formula is within this share of the device's is not tried."""


def fitted_plan(plan: RunPlan, host: Host, out: Path, *, look: bool = False) -> RunPlan:
    """Return a plan with its recipe, and with what each recipe takes where that was foreseen.

    Args:
        plan: as laid out.
        host: the installed plugins.
        out: the run folder; a run that has begun there goes on with the recipe it began with.
        look: foresee every recipe, however small the run is.

    Raises:
        ConfigError: the recipe and the optimizer contradict each other.
    """
    wanted, trainable = plan.settings.train.memory, plan.settings.train.trainable
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if wanted not in {"auto", "full"}:
            raise ConfigError(
                f"--memory {wanted} is for devices that hold all weights; FSDP2 shards them, so "
                "leave it out"
            )
        if trainable != WHOLE:
            raise ConfigError(
                f"--trainable {trainable} merges whole weights, which FSDP2 leaves to no process; "
                "use DDP"
            )
        return replace(plan, recipe=RECIPES["full"])  # what a shard takes is not foreseen
    begun = _begun(out) if wanted == "auto" else None
    names: list[RecipeName] = list(RECIPES)
    fixed: RecipeName | None = begun or (wanted if wanted != "auto" else None)
    if fixed is not None:
        _check(plan, host, fixed)
    plan = replace(plan, recipe=RECIPES[fixed or "full"])
    if not look and plan.memory_bytes <= PLENTY * plan.memory_available:
        return plan
    member = max(plan.members, key=lambda m: m.memory_bytes)
    found: dict[RecipeName, Footprint] = {}
    for name in names:
        try:
            _check(plan, host, name)
            found[name] = foreseen(plan, host, member, RECIPES[name])
        except ArsKitError:  # the optimizer has no such recipe, or an extra is not installed
            if name == fixed:
                raise
    if fixed is None:
        room = plan.memory_available
        fitting = (name for name, f in found.items() if f.peak <= room)
        plan = replace(plan, recipe=RECIPES[next(fitting, [*found][-1])])
    return replace(plan, footprints=found)


def foreseen(
    plan: RunPlan, host: Host, member: MemberPlan, recipe: Recipe, accumulation: int | None = None
) -> Footprint:
    """Return what a member takes at its peak under a recipe; nothing is allocated."""
    train = plan.settings.train
    parts = accumulation or train.accumulation
    optimizer = under_recipe(host, plan.settings.optimizer, recipe)
    work = Work(
        sequences=train.batch_size // parts,
        length=plan.settings.data.sequence_length,
        bf16=plan.precision == "bf16",
        accumulated=parts > 1,
        apart=plan.settings.data.document_mask,
        lora=None if member.new_layers is None else parse_trainable(train.trainable),
        new=member.new_layers or 0,
        device=plan.device,
    )
    return footprint(
        member.config,
        recipe=recipe,
        work=work,
        make=lambda groups: make_base(host, optimizer, groups),
    )


def require_fit(plan: RunPlan, host: Host) -> None:
    """Refuse a plan that was foreseen not to fit its device.

    Raises:
        ConfigError: one line that says what would fit.
    """
    if plan.memory_bytes <= plan.memory_available or not plan.footprints:
        return
    member = max(plan.members, key=lambda m: m.memory_bytes)
    takes, has = byte_count(plan.memory_bytes), byte_count(plan.memory_available)
    raise ConfigError(
        f"{member.name} takes {takes} with --memory {plan.recipe.name}, and {plan.device} has "
        f"{has}; {_what_would(plan, host, member)}"
    )


def _what_would(plan: RunPlan, host: Host, member: MemberPlan) -> str:
    room = plan.memory_available
    for name, found in plan.footprints.items():
        if found.peak <= room:
            return f"--memory {name} would take {byte_count(found.peak)}"
    smallest = RECIPES[min(plan.footprints, key=lambda name: plan.footprints[name].peak)]
    for accumulation in _finer(plan):
        found = foreseen(plan, host, member, smallest, accumulation)
        if found.peak <= room:
            return (
                f"--memory {smallest.name} --accumulation {accumulation} would take "
                f"{byte_count(found.peak)}"
            )
    return "no recipe fits; use a shorter --sequence-length or a larger device"


def _finer(plan: RunPlan) -> Iterator[int]:
    """Yield the finer divisions of the batch, each about half as large a micro-batch."""
    train = plan.settings.train
    last = train.accumulation
    for n in range(train.accumulation + 1, train.batch_size + 1):
        if train.batch_size % n == 0 and (n >= 2 * last or n == train.batch_size):
            last = n
            yield n


def _check(plan: RunPlan, host: Host, name: RecipeName) -> None:
    recipe, train = RECIPES[name], plan.settings.train
    if recipe.bf16_weights and train.precision == "fp32":
        raise ConfigError("--memory tiny keeps weights in bf16; leave --precision fp32 out")
    require_alone(recipe, get_int_from_env(PROCESSES, 1))
    optimizer = under_recipe(host, plan.settings.optimizer, recipe)
    check_optimizer(host, optimizer)
    if recipe.in_backward:
        check_loss_only(host, optimizer, recipe)


def _begun(out: Path) -> RecipeName | None:
    """Return the recipe of the run that has begun in a folder, if any has."""
    folder = RunFolder(out)
    record = folder.private / PLAN_RECORD
    if not record.exists() or not folder.holds_work():
        return None
    try:
        name = json.loads(record.read_text("utf-8")).get("memory", "full")
    except ValueError:  # a damaged record is said where the run needs it
        return None
    return name if name in RECIPES else None
