"""A member's figures, as ``metrics.json`` keeps them; docs/metrics.md defines each."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ars_kit.durable import MANIFEST, sha256
from ars_kit.errors import PluginError
from ars_kit.history import read_history
from ars_kit.losses import convergence_step, final_loss
from ars_kit.models import count_parameters
from ars_kit.optim import under_recipe
from ars_kit.outcome import read_metrics
from ars_kit.settings import to_toml

if TYPE_CHECKING:
    from ars_kit.births import Cradle, Newborn
    from ars_kit.judge import Judged
    from ars_kit.members import MemberPlan
    from ars_kit.settings import Settings
    from ars_kit.spec import Assessment, Blend
    from ars_kit.trainee import Trainee


def member_metrics(
    cradle: Cradle,
    member: MemberPlan,
    job: Trainee,
    born: Newborn,
    quality: Judged,
) -> dict[str, Any]:
    """Return the figures of a member that was trained.

    Raises:
        PluginError: an evaluator returned one that the run measures itself.
    """
    settings, meter = cradle.plan.settings, job.meter
    rows = read_history(cradle.folder.history_path(member.name))
    taken = [row for row in rows if not row["skipped"] and row["loss"] is not None]
    losses = [row["loss"] for row in taken]
    summary = job.optimizer.summary()
    converged = _converged(taken)
    steps_per_iteration = settings.train.steps_per_iteration
    flops = _flops(member, job)
    total = flops + born.facts["setup_flops"] + meter.loss_flops
    head = {
        "model_id": member.name,
        "parent_model": member.parent,
        "training_time": meter.seconds,
        "final_loss": final_loss(losses),
        "convergence_iterations": converged and -(-converged // steps_per_iteration),
        "ars_damping_avg": summary["damping"],
        "vram_usage_peak": None if meter.peak_vram is None else meter.peak_vram / 1e9,
        "timestamp": _now(),
    }
    rest = {
        "convergence_steps": converged,
        "steps": member.steps,
        "tokens": meter.tokens,
        "flops": flops,
        "setup_flops": born.facts["setup_flops"],
        "loss_flops": meter.loss_flops,
        "total_flops": total,
        "lineage_flops": born.flops + total,
        "lineage_tokens": born.tokens + meter.tokens,
        "parameters": member.parameters,
        "trainable_parameters": member.trainable_parameters,
        "tokens_per_second": meter.tokens / meter.seconds if meter.seconds else None,
        "peak_rss": meter.peak_rss,
        "skipped_steps": summary["skipped"],
        "rollbacks": job.recovery.events,
        "accumulation": job.accumulation,
        "decay_fraction": job.cooling if settings.train.schedule == "wsd" else None,
        "gates": summary["gates"],
        "cost": meter.seconds / 3600 * settings.run.price_per_hour,
        "price_per_hour": settings.run.price_per_hour,
        "birth": born.facts,
        "heldout_curve": _curve(cradle, member, job),
        **_run(cradle, cradle.relative(member)),
        "data": member.data,
        "data_hash": cradle.texts[member.data].facts.data_hash,
        "device": device_name(job.accelerator.device),
        "processes": job.accelerator.num_processes,
    }
    clash = quality.figures.keys() & (head.keys() | rest.keys() | {"notes"})
    if clash:
        name = quality.by[min(clash)]
        plugin = cradle.host.listing("evaluators", name).plugin
        theirs = sorted(figure for figure in clash if quality.by[figure] == name)
        raise PluginError(
            f"evaluator {name!r} of plugin {plugin} returned {', '.join(theirs)}, which the run "
            f"measures itself; {member.name} is trained and kept as a training state: run again "
            "without that evaluator"
        )
    return {**head, **quality.figures, "notes": dict(quality.notes), **rest}


def _converged(taken: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the step, counted from 1, at which the losses of the steps taken have converged.

    Those that were skipped in between are steps too: it took the text and the time of them.
    """
    place = convergence_step([row["loss"] for row in taken])
    return None if place is None else int(taken[place - 1]["step"]) + 1


def _curve(cradle: Cradle, member: MemberPlan, job: Trainee) -> dict[str, Any] | None:
    """Return what the held-out curve was judged on and cost; None without one."""
    path = cradle.folder.curve_path(member.name)
    if job.curve is None or not path.exists():
        return None
    rows = read_history(path)
    return {
        "every": job.curve.every,
        "points": len(rows),
        "tokens": rows[-1]["judged_tokens"],
        "seconds": sum(row["judging_seconds"] for row in rows),
        "flops": sum(row["judging_flops"] for row in rows),
    }


def _flops(member: MemberPlan, job: Trainee) -> float:
    """Return what training took, steps that were undone included."""
    undone = job.meter.tokens != member.tokens
    return member.flops * job.meter.tokens / member.tokens if undone else member.flops


def blend_metrics(cradle: Cradle, made: Blend, flops: float, quality: Assessment) -> dict[str, Any]:
    """Return the figures of a member that was made of others, without training.

    Args:
        cradle: the run.
        made: the member.
        flops: that its making cost.
        quality: what the evaluators found.
    """
    ancestors = [read_metrics(cradle.folder, name) for name in _ancestors(cradle, made)]
    price = cradle.plan.settings.run.price_per_hour
    return {
        "model_id": made.name,
        "parent_model": made.sources[-1],
        "training_time": 0.0,
        "final_loss": None,
        "convergence_iterations": None,
        "ars_damping_avg": None,
        "vram_usage_peak": None,
        "timestamp": _now(),
        **quality.figures,
        "notes": dict(quality.notes),
        "convergence_steps": None,
        "steps": 0,
        "tokens": 0,
        "flops": 0.0,
        "setup_flops": flops,
        "loss_flops": 0.0,
        "total_flops": flops,
        "lineage_flops": sum(m["total_flops"] for m in ancestors) + flops,
        "lineage_tokens": sum(m["tokens"] for m in ancestors),
        "parameters": count_parameters(made.config),
        "trainable_parameters": 0,
        "tokens_per_second": None,
        "peak_rss": None,
        "skipped_steps": 0,
        "rollbacks": [],
        "gates": {},
        "cost": 0.0,
        "price_per_hour": price,
        "birth": {"parent": made.sources[-1], "sources": list(made.sources), "note": made.note},
        "heldout_curve": None,
        **_run(cradle, made.sources[-1]),
        "device": device_name(cradle.device),
        "processes": 1,
    }


def _ancestors(cradle: Cradle, made: Blend) -> list[str]:
    """Return everything that a blend descends from, each once."""
    parents = {e.member: e.parent for e in cradle.folder.lineage()}
    found: dict[str, None] = {}
    for source in made.sources:
        name: str | None = source
        while name is not None:
            found[name] = None
            name = parents[name]
    return list(found)


def _run(cradle: Cradle, parent: str | None) -> dict[str, Any]:
    """Return what a member's figures are traced back by."""
    settings, facts = cradle.plan.settings, cradle.corpus.facts
    manifest = None if parent is None else sha256(cradle.folder.path / parent / MANIFEST)
    optimizer = under_recipe(cradle.host, settings.optimizer, cradle.plan.recipe)
    return {
        "parent_manifest": manifest,
        "config_hash": hashlib.sha256(config_text(settings).encode()).hexdigest(),
        "source_hash": source_hash(),
        "strategy": str(settings.family.strategy),
        "optimizer": str(settings.optimizer.name),
        "base_optimizer": str(optimizer.base),
        "seed": settings.family.seed,
        "data_hash": facts.data_hash,
        "tokenizer_hash": facts.tokenizer_hash,
        "precision": cradle.plan.precision,
        "memory": cradle.plan.recipe.name,
        "versions": _versions(),
    }


def config_text(settings: Settings) -> str:
    """Return the settings as a member keeps them beside its figures, ``run.toml``."""
    return to_toml(settings, comments=False)


@cache
def source_hash() -> str:
    """Return the sha256 over the names and contents of this package's and its built-ins' modules.

    A version number does not change with every edit; this does.
    """
    digest = hashlib.sha256()
    for package in ("ars_kit", "ars_kit_plugins"):
        spec = find_spec(package)
        root = Path(spec.origin or "").parent if spec else Path()
        for file in sorted(root.rglob("*.py")) if spec else ():
            digest.update(f"{package}/{file.relative_to(root).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    """Return the device as a person knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    packages = ("ars-kit", "torch", "transformers", "accelerate", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}
