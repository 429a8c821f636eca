"""Births in order: inherit, train, judge, keep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from ars_kit import memory, packing
from ars_kit.adapters import Adapters, new_tensors, share_of
from ars_kit.births import Cradle, Newborn, finished, member_seed, plant
from ars_kit.curve import Curve
from ars_kit.data import Corpus
from ars_kit.dealing import collected, delivered
from ars_kit.errors import ConfigError, PluginError
from ars_kit.figures import blend_metrics, config_text, member_metrics
from ars_kit.host import Host
from ars_kit.inherit import load_named_state
from ars_kit.judge import PERPLEXITY, judge, judges_of, write_files
from ars_kit.ledger import counting
from ars_kit.lora import WHOLE, parse_trainable
from ars_kit.members import MemberPlan, placed
from ars_kit.models import (
    build,
    flops_per_token,
    parameter_groups,
    save_member,
    weights_of,
)
from ars_kit.optim import build_optimizer, under_recipe
from ars_kit.outcome import FROZEN, read_metrics
from ars_kit.ranks import mean_over_ranks
from ars_kit.recovery import Recovery
from ars_kit.report import model_card
from ars_kit.roster import bad_name
from ars_kit.sharding import dealt, is_sharded, scattered
from ars_kit.spec import Assessment, Finishing, Seed
from ars_kit.states import HISTORY
from ars_kit.store import RunFolder
from ars_kit.teaching import Teaching, hinted
from ars_kit.tokens import Batches, Replayed
from ars_kit.train import remember_peaks, seed_everything, train_member
from ars_kit.trainee import Stop, Trainee, branch_of
from ars_kit.watching import FamilyWatcher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ars_kit.damping import DampedOptimizer
    from ars_kit.plan import RunPlan


@dataclass(slots=True)
class Family:
    """What every birth of one run shares; see :class:`Cradle`."""

    plan: RunPlan
    host: Host
    folder: RunFolder
    corpus: Corpus
    texts: Mapping[str, Corpus]
    watcher: FamilyWatcher
    stop: Stop
    accelerator: Accelerator

    @property
    def cradle(self) -> Cradle:
        """What a birth needs, with the strategy made afresh."""
        strategy = self.host.make("strategies", self.plan.settings.family.strategy)
        device = self.accelerator.device
        return Cradle(self.plan, self.host, self.folder, self.corpus, self.texts, strategy, device)


def run_family(family: Family) -> list[dict[str, Any]]:
    """Train every member that is not committed yet; returns all members' metrics in order.

    Raises:
        Preempted: a signal came; the state is saved.
        DivergedError: training produced nothing but non-finite steps.
        IntegrityError: a parent on disk is not what was committed.
        PluginError: a plugin broke its promise.
    """
    main = family.accelerator.is_main_process
    for member in family.plan.members:
        if family.folder.has(member.name):
            if main:
                family.folder.heal_lineage(member.name, family.cradle.relative(member))
            metrics = read_metrics(family.folder, member.name)
        else:
            metrics = raise_member(family, member)
        if main:
            family.watcher.finished(metrics)
            _forget(family)
    blends = blend(family) if isinstance(family.cradle.strategy, Finishing) else []
    return [read_metrics(family.folder, m.name) for m in family.plan.members] + blends


def _forget(family: Family) -> None:
    """Drop the training states that no member still to be born will take moments from."""
    folder, members = family.folder, family.plan.members
    for member in members:
        family_of = [member.name, *(m.name for m in members if m.parent == member.name)]
        if all(map(folder.holds, family_of)):
            folder.states(member.name).drop()
            folder.states(branch_of(member.name)).drop()


def raise_member(family: Family, member: MemberPlan) -> dict[str, Any]:
    """Bear, train, judge and commit one member."""
    settings, accelerator = family.plan.settings, family.accelerator
    seed_everything(member_seed(settings.family.seed, member.name))
    cradle = family.cradle
    known = partial(read_metrics, family.folder)
    member = placed(member, family.plan.members, settings.train.batch_size, known)
    born = delivered(cradle, member, accelerator)
    model, seed = born.model, born.seed
    member, adapters = _adapted(family, member, born, cradle.who)
    train = settings.train
    optimizer = _optimizer(family, member, born)
    # Judging multiplies by all weights, also where most are frozen.
    forward = flops_per_token(member.config, settings.data.sequence_length) / 3
    forward += adapters.forward_flops if adapters else 0.0
    job = Trainee(
        plan=member,
        settings=settings,
        model=model,
        optimizer=optimizer,
        batches=_batches(family, member, seed.replay),
        accelerator=accelerator,
        folder=family.folder,
        watcher=family.watcher,
        stop=family.stop,
        warmup=train.warmup_steps if seed.rewarm_steps is None else seed.rewarm_steps,
        recovery=Recovery.of(train),
        teaching=_teaching(
            family, cradle.who, born, taught=member.teacher_flops > 0, adapters=adapters
        ),
        start_lr=seed.start_lr,
        decay_fraction=seed.decay_fraction,
        branch=member.branch,
        curve=Curve.of(settings, family.corpus, forward),
        loss=_loss(family, member.name, born),
        accumulation=_parents_accumulation(family, member),
    )
    if accelerator.is_main_process:
        family.watcher.born(member.name, born.facts)
        for line in _asides(family, member, job, seed):
            family.watcher.aside(line)
    train_member(job)
    if adapters is not None:
        adapters.merge(seed=member_seed(settings.family.seed, member.name))
    model = collected(model, member.config, accelerator)
    if accelerator.is_main_process:
        quality = _judged(family, member, model)
        metrics = member_metrics(cradle, member, job, born, quality)
        records = _records(family, member.name)
        _commit(family, cradle.relative(member), model, metrics, records, quality)
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # or it would hold on to every member's model
    return read_metrics(family.folder, member.name)


def _optimizer(family: Family, member: MemberPlan, born: Newborn) -> DampedOptimizer:
    """Return a newborn's optimizer; the moments it inherits are in it, and gone from ``born``."""
    settings, recipe, model = family.plan.settings, family.plan.recipe, born.model
    train = settings.train
    groups = parameter_groups(
        model,
        lr=train.lr,
        weight_decay=train.weight_decay,
        lr_width=train.lr_width,
        lr_vectors=train.lr_vectors,
    )
    optimizer = build_optimizer(
        family.host,
        under_recipe(family.host, settings.optimizer, recipe),
        hinted(groups, born.seed.hints),
        lr=train.lr,
        position=member.position,
        reduce=mean_over_ranks(family.accelerator),
        in_backward=recipe.in_backward,
    )
    remember_peaks(optimizer)
    if born.opt_state:
        deal = scattered if is_sharded(model) else dealt
        load_named_state(optimizer.base, born.opt_state, deal=deal)
        born.opt_state = None
    return optimizer


def _asides(family: Family, member: MemberPlan, job: Trainee, seed: Seed) -> Iterator[str]:
    """Yield what a member does otherwise than it was asked for."""
    if family.plan.recipe.in_backward and job.accumulation > 1:
        yield (
            f"{member.name}: with --accumulation {job.accumulation} gradients stand until the "
            "last part of a batch; they are freed as they come with --accumulation 1"
        )
    if job.decay_fraction is not None and job.settings.train.schedule == "wsd":
        share, whose = job.cooling, family.cradle.strategy_name
        since = "from birth on" if share == 1 else f"in the last {share:.0%} of its steps"
        yield f"{member.name}: its learning rate falls {since}, as strategy {whose} has it"
    parent = family.cradle.relative(member)
    inherits = seed.opt_state == "derive" and family.plan.settings.train.trainable == WHOLE
    # A finished parent's state is dropped once its heir is there: one that was removed since is
    # born again without it.
    if parent is not None and inherits and not family.folder.states(parent).steps():
        yield (
            f"{member.name}: the training state of {parent} is gone, so its moments begin at zero; "
            "it will not be to the bit what it would have been"
        )


def _parents_accumulation(family: Family, member: MemberPlan) -> int:
    """Return how finely a member's parent had to read its batches: an heir is no smaller."""
    parent = member.parent
    if parent is None or not family.folder.holds(parent):
        return 0
    return int(read_metrics(family.folder, parent).get("accumulation", 0))


def _adapted(
    family: Family, member: MemberPlan, born: Newborn, who: str
) -> tuple[MemberPlan, Adapters | None]:
    """Put adapters into a newborn, where the run trains such; what it costs is known from then on.

    Raises:
        ConfigError: its strategy changes weights that would be frozen, or nothing was inherited.
    """
    settings = family.plan.settings
    lora = parse_trainable(settings.train.trainable)
    if lora is None:
        return member, None
    if member.parent is None:
        if family.accelerator.is_main_process:
            family.watcher.aside(f"{member.name}: it inherits nothing, so all of it trains")
        return member, None
    if born.seed.on_step is not None:
        raise ConfigError(
            f"{who} changes weights between steps, which --trainable {settings.train.trainable} "
            "leaves frozen; use --trainable all"
        )
    whole = new_tensors(weights_of(born.model), born.seed.provenance)
    share = share_of(born.model, settings.data.sequence_length, lora, whole=whole)
    number = member_seed(settings.family.seed, member.name)
    rng = torch.Generator().manual_seed(number)
    adapters = Adapters(born.model, lora, whole=whole, rng=rng)
    flops = share.flops * member.tokens
    return replace(member, trainable_parameters=share.parameters, flops=flops), adapters


def _loss(family: Family, name: str, born: Newborn) -> Any:
    """Return how the loss is made; logits stand whole where a strategy or the head needs them."""
    if not family.plan.recipe.chunked or born.seed.loss is not None:
        return memory.whole_loss
    chunked = memory.ChunkedLoss(born.model)
    if chunked.agrees():
        return chunked
    if family.accelerator.is_main_process:
        family.watcher.aside(
            f"{name}: a {born.model.config.model_type} does something to its logits behind the "
            "head, so they stand whole"
        )
    return memory.whole_loss


def _batches(family: Family, member: MemberPlan, replay: float) -> Batches:
    settings, accelerator = family.plan.settings, family.accelerator

    def read(data: str, start: int) -> Batches:
        return Batches(
            family.texts[data].train,
            sequence_length=settings.data.sequence_length,
            batch_size=settings.train.batch_size,
            seed=settings.family.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            start=start,
            ends=family.texts[data].train_ends,
        )

    own = read(member.data, member.start)
    old = [(read(data, 0), sequences) for data, sequences in member.before]
    return Replayed(own, old, replay) if old and replay else own


def _judged(family: Family, member: MemberPlan, model: PreTrainedModel) -> Assessment:
    """Judge a member on the run's text, and on its own where that is another."""
    host, settings = family.host, family.plan.settings
    found = judge(host, settings, member.name, model, family.corpus)
    own = family.texts[member.data]
    if own is family.corpus:
        return found
    # By the run's own measure, whatever its settings: both losses are read side by side.
    measure = [choice for choice in judges_of(settings) if choice.name == PERPLEXITY.name]
    more = judge(host, settings, member.name, model, own, choices=measure)
    return Assessment(
        {**found.figures, **{f"own_{name}": value for name, value in more.figures.items()}},
        {**found.files, **{f"own-{name}": text for name, text in more.files.items()}},
        {**found.notes, **{f"own_{name}": note for name, note in more.notes.items()}},
    )


def _teaching(
    family: Family, strategy: str, born: Newborn, *, taught: bool, adapters: Adapters | None
) -> Teaching:
    weights = adapters.weights() if adapters else dict(born.model.named_parameters())
    teaching = Teaching(strategy, born.seed.loss, born.seed.on_step, weights)
    if taught and born.parent is not None:
        parent = born.parent.to(family.accelerator.device).requires_grad_(False)
        wrapped = family.accelerator.prepare_model(parent, evaluation_mode=True).eval()
        context = family.plan.settings.data.sequence_length
        teaching.teacher = lambda *taken: packing.forward(wrapped, *taken).logits
        teaching.teacher_flops = flops_per_token(parent.config, context) / 3
    return teaching


def blend(family: Family) -> list[dict[str, Any]]:
    """Commit what the strategy makes of the finished members; returns the metrics.

    Raises:
        PluginError: it fails, or makes what does not fit, or takes a member's name.
    """
    cradle, folder = family.cradle, family.folder
    assert isinstance(cradle.strategy, Finishing)  # noqa: S101 -- the caller has looked
    names = [m.name for m in family.plan.members]
    cooled = [finished(cradle, m) for m in family.plan.members]
    found: list[dict[str, Any]] = []
    with family.host.blaming("strategies", cradle.strategy_name, "finishing the family"):
        blends = list(cradle.strategy.finish(cooled))
    for made in blends:
        taken = [*names, *(m["model_id"] for m in found)]
        if made.name in taken or not made.sources or not {*made.sources} <= {*names}:
            raise PluginError(
                f"{cradle.who} cannot make {made.name!r} of "
                f"{', '.join(made.sources)}: there are {', '.join(taken)}"
            )
        if bad := bad_name(made.name):
            raise PluginError(f"{cradle.who}: {bad}")
        main = family.accelerator.is_main_process
        if folder.has(made.name):
            if main:
                folder.heal_lineage(made.name, made.sources[-1])
        elif main:
            model = build(made.config, seed=0)
            with counting() as account:
                plant(model, made.weights, cradle.who, made.name)
            model.to(family.accelerator.device)
            settings = family.plan.settings
            quality = judge(family.host, settings, made.name, model, family.corpus)
            metrics = blend_metrics(cradle, made, account.flops, quality)
            _commit(family, made.sources[-1], model, metrics, {HISTORY: b""}, quality)
        family.accelerator.wait_for_everyone()
        found.append(read_metrics(folder, made.name))
        if main:
            family.watcher.finished(found[-1])
    return found


def _records(family: Family, name: str) -> dict[str, bytes]:
    """Return what a member recorded of its training."""
    paths = (family.folder.history_path(name), family.folder.curve_path(name))
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def _commit(
    family: Family,
    parent: str | None,
    model: PreTrainedModel,
    metrics: Mapping[str, Any],
    records: Mapping[str, bytes],
    quality: Assessment,
) -> None:
    def files(folder: Path) -> None:
        save_member(model, family.corpus.tokenizer_dir, folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
        (folder / FROZEN).write_text(config_text(family.plan.settings), "utf-8")
        for record, content in records.items():
            (folder / record).write_bytes(content)
        write_files(quality, folder)
        (folder / "README.md").write_text(model_card(metrics, model.config), "utf-8")

    family.folder.commit_member(
        metrics["model_id"],
        files,
        parent=parent,
        facts={"data_hash": metrics["data_hash"], "base": family.plan.settings.family.base},
    )
