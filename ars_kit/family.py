"""Births in order: inherit, train, judge, keep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator

from ars_kit.births import Cradle, finished, member_seed, plant
from ars_kit.data import Corpus
from ars_kit.dealing import collected, delivered
from ars_kit.errors import PluginError
from ars_kit.figures import blend_metrics, config_text, member_metrics
from ars_kit.host import Host
from ars_kit.judge import PERPLEXITY, Judged, judge, judges_of, write_files
from ars_kit.ledger import counting
from ars_kit.members import MemberPlan, placed
from ars_kit.models import build, save_member
from ars_kit.outcome import FROZEN, read_metrics
from ars_kit.readying import asides, ready
from ars_kit.report import model_card
from ars_kit.roster import bad_name
from ars_kit.spec import Assessment, Blend, Finishing
from ars_kit.states import HISTORY
from ars_kit.store import RunFolder
from ars_kit.train import seed_everything, train_member
from ars_kit.trainee import Stop, branch_of
from ars_kit.watching import FamilyWatcher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    job, adapters = ready(cradle, member, born, accelerator, family.watcher, family.stop)
    if accelerator.is_main_process:
        family.watcher.born(member.name, born.facts)
        for line in asides(cradle, job, born.seed):
            family.watcher.aside(line)
    train_member(job)
    if adapters is not None:
        adapters.merge(seed=member_seed(settings.family.seed, member.name))
    model = collected(born.model, member.config, accelerator)
    if accelerator.is_main_process:
        quality = _judged(family, member, model)
        metrics = member_metrics(cradle, job.plan, job, born, quality)
        records = _records(family, member.name)
        _commit(family, cradle.relative(member), model, metrics, records, quality)
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # or it would hold on to every member's model
    return read_metrics(family.folder, member.name)


def _judged(family: Family, member: MemberPlan, model: PreTrainedModel) -> Judged:
    """Judge a member on the run's text, and on its own where that is another."""
    host, settings = family.host, family.plan.settings
    found = judge(host, settings, member.name, model, family.corpus)
    own = family.texts[member.data]
    if own is family.corpus:
        return found
    # By the run's own measure, whatever its settings: both losses are read side by side.
    measure = [choice for choice in judges_of(settings) if choice.name == PERPLEXITY.name]
    more = judge(host, settings, member.name, model, own, choices=measure)
    return Judged(
        {**found.figures, **{f"own_{name}": value for name, value in more.figures.items()}},
        {**found.files, **{f"own-{name}": text for name, text in more.files.items()}},
        {**found.notes, **{f"own_{name}": note for name, note in more.notes.items()}},
        {**found.by, **{f"own_{name}": evaluator for name, evaluator in more.by.items()}},
    )


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
        if not isinstance(cast("Any", made), Blend):
            raise PluginError(f"{cradle.who} finished with a {type(made).__name__}, no Blend")
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
