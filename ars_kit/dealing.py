"""A newborn brought to where it trains, and back: whole, or by FSDP2 each process its part.

Under FSDP2 the main process alone bears the member. The others make its modules without memory and
are sent their parts of each weight, so the hosts hold one parent and one child between them.
"""

from __future__ import annotations

import pickle  # between the processes of one run, as torch sends any object
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ars_kit import memory, packing
from ars_kit.births import Cradle, Newborn, bear
from ars_kit.errors import ConfigError, PluginError
from ars_kit.models import skeleton, weights_of
from ars_kit.ranks import from_main, shard
from ars_kit.sharding import gathered, is_sharded, materialise, receive_weights
from ars_kit.spec import Seed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PretrainedConfig, PreTrainedModel

    from ars_kit.members import MemberPlan

OptState = Mapping[str, Mapping[str, Tensor]]


def delivered(cradle: Cradle, member: MemberPlan, accelerator: Accelerator) -> Newborn:
    """Return a member at its birth, its weights where they train; every process must call this.

    Of a sharded one the first moments are meta tensors on all processes but the main one, to be
    loaded by :func:`ars_kit.sharding.scattered`.

    Raises:
        ConfigError: it cannot be trained as the run asks.
        PluginError: its strategy failed, or broke its promise.
        IntegrityError: its parent on disk is not what was committed.
    """
    if accelerator.is_fsdp2:
        return _sharded(cradle, member, accelerator)
    born = bear(cradle, member)
    born.facts["setup_flops"] *= accelerator.num_processes  # each of them bears it
    _require_apart(cradle, born.model)
    # First: weights in fp32 may be more than the device holds.
    memory.prepare(born.model, cradle.plan.recipe)
    born.model.to(accelerator.device)
    return born


def collected(
    model: PreTrainedModel, config: PretrainedConfig, accelerator: Accelerator
) -> PreTrainedModel:
    """Return a trained model with all of its weights, on the main process; the rest keep theirs.

    Every process must call this.

    Args:
        model: whole or sharded.
        config: its own.
        accelerator: of the run.
    """
    if not is_sharded(model):
        return model
    main = accelerator.is_main_process
    whole = unfilled(skeleton(config), torch.device("cpu")) if main else model
    room = weights_of(whole)
    for name, part in weights_of(model).items():  # one at a time, so that they stand once
        weight = gathered(part, keep=main)
        if main:
            room[name].copy_(weight)
    return whole.to(accelerator.device) if main else model


def _require_apart(cradle: Cradle, model: PreTrainedModel) -> None:
    if cradle.plan.settings.data.document_mask and not packing.keeps_apart(model):
        raise ConfigError(
            f"a {model.config.model_type} cannot keep the documents of a sequence apart; leave "
            "--document-mask out"
        )


@dataclass(frozen=True, slots=True)
class _Word:
    """What the others are told of a birth.

    Attributes:
        seed: without its weights and their provenance.
        opt_state: the member's first moments, meta tensors where they are to be sent.
        parent: of the parent that teaches; None where none does.
        generators: the states of the global generators, which a strategy may have drawn from.
    """

    facts: dict[str, Any]
    seed: Seed
    opt_state: OptState | None
    flops: float
    tokens: int
    parent: PretrainedConfig | None
    generators: tuple[Any, Any, Tensor]


def _sharded(cradle: Cradle, member: MemberPlan, accelerator: Accelerator) -> Newborn:
    """Bear a member on the main process and deal it out."""
    taught = member.teacher_flops > 0
    kept: list[Newborn] = []  # on the main process alone

    def make() -> _Word:
        whole = bear(cradle, member)
        _require_apart(cradle, whole.model)
        _require_whole(whole.seed, cradle.who, taught=taught)
        if not taught:
            whole.parent = None
        kept.append(whole)
        return _word(whole, _bare(whole.seed, cradle.who, member.name))

    word = from_main(accelerator, make)
    random.setstate(word.generators[0])
    np.random.set_state(word.generators[1])  # noqa: NPY002 -- the global generator is the point
    torch.set_rng_state(word.generators[2])
    model = skeleton(member.config)
    weights = weights_of(kept[0].model if kept else model)
    shard(accelerator, model)
    receive_weights(model, weights)
    found = Newborn(
        model, word.facts, word.seed, word.opt_state, flops=word.flops, tokens=word.tokens
    )
    if kept:
        found.opt_state, found.parent = kept[0].opt_state, kept[0].parent
    if word.parent is not None:
        found.parent = _copied(found.parent, word.parent, accelerator.device)
    return found


def _word(born: Newborn, seed: Seed) -> _Word:
    shapes = {name: weight.shape for name, weight in weights_of(born.model).items()}
    opt_state = born.opt_state and {
        name: {k: v.to("meta") if v.shape == shapes[name] else v for k, v in entry.items()}
        for name, entry in born.opt_state.items()
    }
    return _Word(
        facts=born.facts,
        seed=seed,
        opt_state=opt_state,
        flops=born.flops,
        tokens=born.tokens,
        parent=None if born.parent is None else born.parent.config,
        generators=(random.getstate(), np.random.get_state(), torch.get_rng_state()),  # noqa: NPY002
    )


def _bare(seed: Seed, who: str, child: str) -> Seed:
    """Return what of a seed is still wanted once the child has its weights.

    Raises:
        PluginError: it cannot be sent to other processes.
    """
    bare = replace(seed, weights={}, provenance={})
    try:
        pickle.dumps(bare)
    except Exception as error:
        raise PluginError(
            f"{who} gave {child} a loss or hints that cannot be sent to other processes: {error}. "
            "Make the loss an object of a class that pickles, or train under DDP"
        ) from error
    return bare


def _require_whole(seed: Seed, who: str, *, taught: bool) -> None:
    """Refuse what a strategy does to whole weights where no process has them."""
    if seed.on_step is not None or (seed.loss is not None and not taught):
        raise ConfigError(
            f"{who} looks at the weights while a member trains, which FSDP2 leaves whole to no "
            "process; use DDP"
        )


def _copied(
    own: PreTrainedModel | None, config: PretrainedConfig, device: torch.device
) -> PreTrainedModel:
    """Return a teacher, whole on each device; it is sent there from the main process's host."""
    if own is None:
        empty = skeleton(config)
        weights = weights_of(empty)
        model = unfilled(empty, device)
    else:
        model, weights = own, weights_of(own)
        model.to(device)  # type: ignore[arg-type]
    receive_weights(model, weights)
    return model


def unfilled(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Return a skeleton with room for its weights on a device, in place; nothing is drawn."""
    materialise(model, device)
    model.tie_weights()  # a tied head was given room of its own
    return model
