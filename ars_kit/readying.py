"""A newborn made ready to train: its optimizer, batches, loss, teacher and adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from ars_kit import memory, packing
from ars_kit.adapters import Adapters, new_tensors, share_of
from ars_kit.births import Cradle, Newborn, member_seed
from ars_kit.curve import Curve
from ars_kit.errors import ConfigError
from ars_kit.inherit import load_named_state
from ars_kit.lora import WHOLE, parse_trainable
from ars_kit.members import MemberPlan
from ars_kit.models import flops_per_token, parameter_groups, weights_of
from ars_kit.optim import build_optimizer, under_recipe
from ars_kit.outcome import read_metrics
from ars_kit.ranks import mean_over_ranks
from ars_kit.recovery import Recovery
from ars_kit.sharding import dealt, is_sharded, scattered
from ars_kit.spec import Seed
from ars_kit.teaching import Teaching, hinted
from ars_kit.tokens import Batches, Replayed
from ars_kit.train import remember_peaks
from ars_kit.trainee import Stop, Trainee
from ars_kit.watching import FamilyWatcher

if TYPE_CHECKING:
    from ars_kit.damping import DampedOptimizer


def ready(
    cradle: Cradle,
    member: MemberPlan,
    born: Newborn,
    accelerator: Accelerator,
    watcher: FamilyWatcher,
    stop: Stop,
) -> tuple[Trainee, Adapters | None]:
    """Return what is to be trained, and its adapters if it trains such.

    The moments that it inherits are in its optimizer then, and gone from ``born``.

    Raises:
        ConfigError: its strategy changes weights that would be frozen.
    """
    settings, train = cradle.plan.settings, cradle.plan.settings.train
    told = watcher.aside if accelerator.is_main_process else _nobody
    member, adapters = _adapted(cradle, member, born, told)
    optimizer = _optimizer(cradle, member, born, accelerator)
    # Judging multiplies by all weights, also where most are frozen.
    forward = flops_per_token(member.config, settings.data.sequence_length) / 3
    forward += adapters.forward_flops if adapters else 0.0
    seed = born.seed
    job = Trainee(
        plan=member,
        settings=settings,
        model=born.model,
        optimizer=optimizer,
        batches=_batches(cradle, member, seed.replay, accelerator),
        accelerator=accelerator,
        folder=cradle.folder,
        watcher=watcher,
        stop=stop,
        warmup=train.warmup_steps if seed.rewarm_steps is None else seed.rewarm_steps,
        recovery=Recovery.of(train),
        teaching=_teaching(
            cradle, born, accelerator, taught=member.teacher_flops > 0, adapters=adapters
        ),
        start_lr=seed.start_lr,
        decay_fraction=seed.decay_fraction,
        branch=member.branch,
        curve=Curve.of(settings, cradle.corpus, forward),
        loss=_loss(cradle, member.name, born, told),
        accumulation=_parents_accumulation(cradle, member),
    )
    return job, adapters


def _nobody(line: str) -> None:
    """Tell nobody: the main process says it."""


def asides(cradle: Cradle, job: Trainee, seed: Seed) -> Iterator[str]:
    """Yield what a member does otherwise than it was asked for."""
    member = job.plan
    if cradle.plan.recipe.in_backward and job.accumulation > 1:
        yield (
            f"{member.name}: with --accumulation {job.accumulation} gradients stand until the "
            "last part of a batch; they are freed as they come with --accumulation 1"
        )
    if job.decay_fraction is not None and job.settings.train.schedule == "wsd":
        share, whose = job.cooling, cradle.strategy_name
        since = "from birth on" if share == 1 else f"in the last {share:.0%} of its steps"
        yield f"{member.name}: its learning rate falls {since}, as strategy {whose} has it"
    parent = cradle.relative(member)
    inherits = seed.opt_state == "derive" and cradle.plan.settings.train.trainable == WHOLE
    # A finished parent's state is dropped once its heir is there: one that was removed since is
    # born again without it.
    if parent is not None and inherits and not cradle.folder.states(parent).steps():
        yield (
            f"{member.name}: the training state of {parent} is gone, so its moments begin at zero; "
            "it will not be to the bit what it would have been"
        )


def _optimizer(
    cradle: Cradle, member: MemberPlan, born: Newborn, accelerator: Accelerator
) -> DampedOptimizer:
    """Return a newborn's optimizer; the moments it inherits are in it, and gone from ``born``."""
    settings, recipe, model = cradle.plan.settings, cradle.plan.recipe, born.model
    train = settings.train
    groups = parameter_groups(
        model,
        lr=train.lr,
        weight_decay=train.weight_decay,
        lr_width=train.lr_width,
        lr_vectors=train.lr_vectors,
    )
    optimizer = build_optimizer(
        cradle.host,
        under_recipe(cradle.host, settings.optimizer, recipe),
        hinted(groups, born.seed.hints),
        lr=train.lr,
        position=member.position,
        reduce=mean_over_ranks(accelerator),
        in_backward=recipe.in_backward,
    )
    remember_peaks(optimizer)
    if born.opt_state:
        deal = scattered if is_sharded(model) else dealt
        load_named_state(optimizer.base, born.opt_state, deal=deal)
        born.opt_state = None
    return optimizer


def _parents_accumulation(cradle: Cradle, member: MemberPlan) -> int:
    """Return how finely a member's parent had to read its batches: an heir is no smaller."""
    parent = member.parent
    if parent is None or not cradle.folder.holds(parent):
        return 0
    return int(read_metrics(cradle.folder, parent).get("accumulation", 0))


def _adapted(
    cradle: Cradle, member: MemberPlan, born: Newborn, told: Callable[[str], None]
) -> tuple[MemberPlan, Adapters | None]:
    """Put adapters into a newborn, where the run trains such; what it costs is known from then on.

    Raises:
        ConfigError: its strategy changes weights that would be frozen, or nothing was inherited.
    """
    settings = cradle.plan.settings
    lora = parse_trainable(settings.train.trainable)
    if lora is None:
        return member, None
    if member.parent is None:
        told(f"{member.name}: it inherits nothing, so all of it trains")
        return member, None
    if born.seed.on_step is not None:
        raise ConfigError(
            f"{cradle.who} changes weights between steps, which --trainable "
            f"{settings.train.trainable} leaves frozen; use --trainable all"
        )
    whole = new_tensors(weights_of(born.model), born.seed.provenance)
    share = share_of(born.model, settings.data.sequence_length, lora, whole=whole)
    number = member_seed(settings.family.seed, member.name)
    rng = torch.Generator().manual_seed(number)
    adapters = Adapters(born.model, lora, whole=whole, rng=rng)
    flops = share.flops * member.tokens
    return replace(member, trainable_parameters=share.parameters, flops=flops), adapters


def _loss(cradle: Cradle, name: str, born: Newborn, told: Callable[[str], None]) -> Any:
    """Return how the loss is made; logits stand whole where a strategy or the head needs them."""
    if not cradle.plan.recipe.chunked or born.seed.loss is not None:
        return memory.whole_loss
    chunked = memory.ChunkedLoss(born.model)
    if chunked.agrees():
        return chunked
    told(
        f"{name}: a {born.model.config.model_type} does something to its logits behind the head, "
        "so they stand whole"
    )
    return memory.whole_loss


def _batches(
    cradle: Cradle, member: MemberPlan, replay: float, accelerator: Accelerator
) -> Batches:
    settings = cradle.plan.settings

    def read(data: str, start: int) -> Batches:
        return Batches(
            cradle.texts[data].train,
            sequence_length=settings.data.sequence_length,
            batch_size=settings.train.batch_size,
            seed=settings.family.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            start=start,
            ends=cradle.texts[data].train_ends,
        )

    own = read(member.data, member.start)
    old = [(read(data, 0), sequences) for data, sequences in member.before]
    return Replayed(own, old, replay) if old and replay else own


def _teaching(
    cradle: Cradle,
    born: Newborn,
    accelerator: Accelerator,
    *,
    taught: bool,
    adapters: Adapters | None,
) -> Teaching:
    weights = adapters.weights() if adapters else dict(born.model.named_parameters())
    teaching = Teaching(cradle.who, born.seed.loss, born.seed.on_step, weights)
    if taught and born.parent is not None:
        parent = born.parent.to(accelerator.device).requires_grad_(False)
        wrapped = accelerator.prepare_model(parent, evaluation_mode=True).eval()
        context = cradle.plan.settings.data.sequence_length
        teaching.teacher = lambda *taken: packing.forward(wrapped, *taken).logits
        teaching.teacher_flops = flops_per_token(parent.config, context) / 3
    return teaching
