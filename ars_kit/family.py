"""Births in order: inherit, train, judge, keep."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator

from ars_kit.data import Corpus
from ars_kit.errors import PluginError
from ars_kit.host import Host
from ars_kit.inherit import derive_opt_state, inherited_share, load_named_state
from ars_kit.judge import judge
from ars_kit.measure import convergence_step, final_loss
from ars_kit.models import (
    build,
    load_base,
    load_member,
    logits_difference,
    parameter_groups,
    save_member,
    set_weights,
    weights_of,
)
from ars_kit.optim import build_optimizer
from ars_kit.outcome import read_metrics
from ars_kit.recovery import Recovery
from ars_kit.report import model_card
from ars_kit.spec import Birth, InheritanceStrategy, Parent, Seed
from ars_kit.store import RunFolder, read_history
from ars_kit.tokens import Batches, heldout_windows
from ars_kit.train import (
    Stop,
    Trainee,
    Watcher,
    mean_over_ranks,
    remember_peaks,
    seed_everything,
    train_member,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ars_kit.plan import MemberPlan, RunPlan

EXACT = 1e-4
"""Largest change of a logit, against the largest logit, that still counts as exact in float32."""


class FamilyWatcher(Watcher, Protocol):
    """Told what happens to the family."""

    def born(self, member: str, facts: Mapping[str, Any]) -> None:
        """Hear that a member starts (or goes on) training."""
        ...

    def finished(self, metrics: Mapping[str, Any]) -> None:
        """Hear a committed member's metrics."""
        ...


@dataclass(slots=True)
class Family:
    """What every birth of one run shares."""

    plan: RunPlan
    host: Host
    folder: RunFolder
    corpus: Corpus
    watcher: FamilyWatcher
    stop: Stop
    accelerator: Accelerator

    @property
    def strategy(self) -> InheritanceStrategy:
        """The chosen strategy, made afresh."""
        made: InheritanceStrategy = self.host.make("strategies", self.plan.settings.family.strategy)
        return made


def make_accelerator(plan: RunPlan) -> Accelerator:
    """Return the accelerator the plan asks for; under ``torchrun`` it joins the others."""
    return Accelerator(
        cpu=plan.device == "cpu",
        mixed_precision="bf16" if plan.precision == "bf16" else "no",
    )


def run_family(family: Family) -> list[dict[str, Any]]:
    """Train every member that is not committed yet; returns all members' metrics in order.

    Raises:
        Preempted: a signal came; the state is saved.
        DivergedError: training produced nothing but non-finite steps.
        IntegrityError: a parent on disk is not what was committed.
        PluginError: a plugin broke its promise.
    """
    for member in family.plan.members:
        if family.folder.has(member.name):
            if family.accelerator.is_main_process:
                family.folder.heal_lineage(member.name, _relative(family, member))
            metrics = read_metrics(family.folder, member.name)
        else:
            metrics = raise_member(family, member)
        if family.accelerator.is_main_process:
            family.watcher.finished(metrics)
        parent = _relative(family, member)
        if parent and family.accelerator.is_main_process:
            family.folder.drop_state(parent)
    if family.accelerator.is_main_process:
        family.folder.drop_state(family.plan.members[-1].name)
    return [read_metrics(family.folder, m.name) for m in family.plan.members]


def raise_member(family: Family, member: MemberPlan) -> dict[str, Any]:
    """Bear, train, judge and commit one member."""
    settings, accelerator = family.plan.settings, family.accelerator
    seed_everything(member_seed(settings.family.seed, member.name))
    model, seed, facts, opt_state = bear(family, member)
    model.to(accelerator.device)
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
        settings.optimizer,
        groups,
        lr=train.lr,
        position=member.position,
        reduce=mean_over_ranks(accelerator),
    )
    remember_peaks(optimizer)
    if opt_state:
        load_named_state(optimizer.base, opt_state)
    batches = Batches(
        family.corpus.train,
        sequence_length=settings.data.sequence_length,
        batch_size=train.batch_size,
        seed=settings.family.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start=member.start,
    )
    rewarm = seed.rewarm_steps if seed else None
    job = Trainee(
        plan=member,
        settings=settings,
        model=model,
        optimizer=optimizer,
        batches=batches,
        accelerator=accelerator,
        folder=family.folder,
        watcher=family.watcher,
        stop=family.stop,
        warmup=train.warmup_steps if rewarm is None else rewarm,
        recovery=Recovery.of(train),
    )
    if accelerator.is_main_process:
        family.watcher.born(member.name, facts)
    train_member(job)
    if accelerator.is_main_process:
        quality = judge(family.host, settings, member.name, model, family.corpus)
        metrics = _metrics(family, member, job, facts, quality)
        _commit(family, member, model, metrics)
    accelerator.wait_for_everyone()
    return read_metrics(family.folder, member.name)


def bear(
    family: Family, member: MemberPlan
) -> tuple[PreTrainedModel, Seed | None, dict[str, Any], Mapping[str, Any] | None]:
    """Return the newborn model, its seed, what is known of the birth, and its first moments.

    The result depends on the committed parent and the run's seed alone, so a member that was
    interrupted before its first training state is born the same again.
    """
    seed_number = member_seed(family.plan.settings.family.seed, member.name)
    model = build(member.config, seed=seed_number)
    facts: dict[str, Any] = {"parent": member.parent, "inherited_share": 0.0}
    if member.parent is None:
        return model, None, facts, None
    parent, parent_model = _parent(family, member)
    fresh = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    rng = torch.Generator().manual_seed(seed_number)
    birth = Birth(member.name, member.config, fresh, rng)
    name = family.plan.settings.family.strategy.name
    strategy = family.strategy
    with family.host.blaming("strategies", name, f"at the birth of {member.name}"):
        seed = strategy.inherit(parent, birth)
    if not isinstance(seed, Seed):
        raise PluginError(f"inheritance strategy {name!r} bore a {type(seed).__name__}, no Seed")
    try:
        set_weights(model, seed.weights)
    except ValueError as error:
        raise PluginError(
            f"inheritance strategy {name!r} bore a bad {member.name}: {error}"
        ) from error
    probe = torch.stack([_probe(family)])
    change = logits_difference(parent_model, model, probe)
    with torch.no_grad():
        scale = float(parent_model(input_ids=probe).logits.abs().max())
    bound = EXACT * max(1.0, scale)
    if seed.preserves == "exact" and not change <= bound:
        raise PluginError(
            f"inheritance strategy {name!r} promised that {member.name} computes what "
            f"{member.parent} does, but a logit differs by {change:.3g} (allowed: {bound:.3g})"
        )
    shapes = {name: tensor.shape for name, tensor in fresh.items()}
    facts |= {
        "preserves": seed.preserves,
        "birth_logits_difference": change,
        "inherited_share": inherited_share(seed.provenance, shapes),
    }
    opt_state = None
    if seed.opt_state == "derive" and parent.opt_state:
        opt_state = derive_opt_state(parent.opt_state, seed.provenance, shapes)
    facts["optimizer_state"] = "carried" if opt_state else "fresh"
    return model, seed, facts, opt_state


def member_seed(seed: int, name: str) -> int:
    """Return the seed of one member's draws, so that no two members' fresh weights are alike."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits without a sign


def _probe(family: Family) -> torch.Tensor:
    length = min(64, family.plan.settings.data.sequence_length)
    window = next(heldout_windows(family.corpus.heldout, length))
    return torch.from_numpy(window[:length])


def _relative(family: Family, member: MemberPlan) -> str | None:
    """Return the parent's name where it is a member, not a pretrained base."""
    names = {m.name for m in family.plan.members}
    return member.parent if member.parent in names else None


def _parent(family: Family, member: MemberPlan) -> tuple[Parent, PreTrainedModel]:
    assert member.parent is not None  # noqa: S101 -- the caller asked
    if _relative(family, member) is None:
        model = load_base(member.parent)
        return Parent(member.parent, model.config, weights_of(model)), model
    model = load_member(family.folder.open_member(member.parent))
    metrics = read_metrics(family.folder, member.parent)
    state = family.folder.load_state(member.parent)
    opt_state = _by_name(state[1]["optimizer"]) if state else None
    parent = Parent(
        member.parent, model.config, weights_of(model), opt_state, metrics.get("heldout_loss")
    )
    return parent, model


def _by_name(optimizer: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Return a saved optimizer's tensors by parameter name."""
    found = {}
    for group in optimizer["param_groups"]:
        for name, index in zip(group["names"], group["params"], strict=True):
            entry = optimizer["state"].get(index, {})
            found[name] = {k: v for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return found


def _metrics(
    family: Family,
    member: MemberPlan,
    job: Trainee,
    facts: Mapping[str, Any],
    quality: Mapping[str, float | None],
) -> dict[str, Any]:
    """Put together ``metrics.json``; docs/metrics.md defines each figure."""
    settings, meter = family.plan.settings, job.meter
    rows = read_history(family.folder.history_path(member.name))
    losses = [row["loss"] for row in rows if not row["skipped"] and row["loss"] is not None]
    summary = job.optimizer.summary()
    converged = convergence_step(losses)
    steps_per_iteration = settings.train.steps_per_iteration
    head = {
        "model_id": member.name,
        "parent_model": member.parent,
        "training_time": meter.seconds,
        "final_loss": final_loss(losses),
        "convergence_iterations": converged and -(-converged // steps_per_iteration),
        "ars_damping_avg": summary["damping"],
        "vram_usage_peak": None if meter.peak_vram is None else meter.peak_vram / 1e9,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rest = {
        "convergence_steps": converged,
        "steps": member.steps,
        "tokens": meter.tokens,
        "flops": _flops(member, job),
        "parameters": member.parameters,
        "tokens_per_second": meter.tokens / meter.seconds if meter.seconds else None,
        "peak_rss": meter.peak_rss,
        "skipped_steps": summary["skipped"],
        "rollbacks": job.recovery.events,
        "gates": summary["gates"],
        "cost": meter.seconds / 3600 * settings.run.price_per_hour,
        "price_per_hour": settings.run.price_per_hour,
        "birth": dict(facts),
        "strategy": str(settings.family.strategy),
        "optimizer": str(settings.optimizer.name),
        "base_optimizer": str(settings.optimizer.base),
        "seed": settings.family.seed,
        "data_hash": family.corpus.facts.data_hash,
        "tokenizer_hash": family.corpus.facts.tokenizer_hash,
        "device": _device_name(family.accelerator.device),
        "precision": family.plan.precision,
        "processes": family.accelerator.num_processes,
        "versions": _versions(),
    }
    clash = quality.keys() & (head.keys() | rest.keys())
    if clash:
        raise PluginError(
            f"an evaluator returned {', '.join(sorted(clash))}, which the run measures itself; the "
            "member is trained and kept as a training state: run again without it"
        )
    return {**head, **quality, **rest}


def _flops(member: MemberPlan, job: Trainee) -> float:
    """Return what training took, steps that were undone included."""
    undone = bool(job.recovery.events)
    return member.flops * job.meter.tokens / member.tokens if undone else member.flops


def _commit(
    family: Family, member: MemberPlan, model: PreTrainedModel, metrics: Mapping[str, Any]
) -> None:
    history = family.folder.history_path(member.name)

    def files(folder: Path) -> None:
        save_member(model, family.corpus.tokenizer_dir, folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
        (folder / "history.jsonl").write_bytes(history.read_bytes())
        (folder / "README.md").write_text(model_card(metrics, member.config), "utf-8")

    family.folder.commit_member(
        member.name,
        files,
        parent=_relative(family, member),
        facts={"data_hash": metrics["data_hash"], "base": family.plan.settings.family.base},
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _versions() -> dict[str, str]:
    packages = ("ars-kit", "torch", "transformers", "accelerate", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}
