"""Several processes that train one member: how they start, agree, and part."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    fsdp2_prepare_model,
    parse_flag_from_env,
)
from torch import Tensor

from ars_kit.errors import ArsKitError, ConfigError
from ars_kit.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ars_kit.memory import Recipe
    from ars_kit.plan import RunPlan
    from ars_kit.settings import Settings

_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|watchdog", re.IGNORECASE)
"""What errors of a collective call whose other side is gone have in their text."""


def make_accelerator(plan: RunPlan) -> Accelerator:
    """Return the accelerator the plan asks for; under a launcher it joins the others.

    Raises:
        ConfigError: the launcher asks for an engine that is not supported, or for several
            processes under a recipe for one.
    """
    # Weights in bf16 compute in it by themselves.
    autocast = plan.precision == "bf16" and not plan.recipe.bf16_weights
    accelerator = Accelerator(
        cpu=plan.device == "cpu", mixed_precision="bf16" if autocast else "no"
    )
    require_alone(plan.recipe, accelerator.num_processes)
    if plan.device == "cpu" and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        _shard_on_cpu(accelerator)
    if accelerator.distributed_type in {DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}:
        raise ConfigError(
            f"arskit trains under DDP and FSDP2, not under {accelerator.distributed_type.value}; "
            "launch it with a configuration of docs/examples/accelerate"
        )
    if accelerator.distributed_type is DistributedType.FSDP:
        _require_fsdp2(accelerator)
    return accelerator


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """Take up the launcher's FSDP settings, which accelerate itself ignores on a CPU."""
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    if accelerator.num_processes > 1:
        accelerator.state.distributed_type = DistributedType.FSDP


def _require_fsdp2(accelerator: Accelerator) -> None:
    plugin = accelerator.state.fsdp_plugin
    if not accelerator.is_fsdp2:
        raise ConfigError("arskit shards by FSDP2; set fsdp_version: 2 in accelerate's file")
    if plugin.activation_checkpointing:  # it renames the weights
        raise ConfigError("set fsdp_activation_checkpointing: false in accelerate's file")


def require_equal_parts(settings: Settings, processes: int) -> None:
    """Refuse a number of processes that would change what a step is made of.

    Raises:
        ConfigError: a batch does not divide among them.
    """
    train = settings.train
    if train.batch_size % (processes * train.accumulation):
        raise ConfigError(
            f"train.batch_size {train.batch_size} cannot be split into {train.accumulation} "
            f"micro-batches on each of {processes} processes"
        )


def require_alone(recipe: Recipe, processes: int) -> None:
    """Refuse a recipe that several processes cannot train under.

    Raises:
        ConfigError: it is one.
    """
    if recipe.in_backward and processes > 1:
        raise ConfigError(
            f"--memory {recipe.name} steps parameters within the backward pass, before several "
            "processes could agree on their gradients; use --memory lean, or one process"
        )


def require_seen(path: Path, accelerator: Accelerator) -> None:
    """Refuse a run folder that lies on one machine of several. Every process must ask.

    Args:
        path: a file that the main process has written.
        accelerator: of the run.

    Raises:
        ConfigError: a process does not see it; on every process.
    """
    if accelerator.num_processes == 1:
        return
    blind = torch.tensor([float(not path.exists())], device=accelerator.device)
    number = int(accelerator.reduce(blind, reduction="sum"))
    if number:
        raise ConfigError(
            f"{number} of {accelerator.num_processes} processes do not see {path.parent}; put "
            "--out on a volume that all machines share"
        )


class MeanOverRanks:
    """Means a 0-d loss over all processes; the reduction may run beside other work.

    Args:
        processes: how many there are.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def __call__(self, loss: Tensor) -> Tensor:
        """Return the mean."""
        return self.begin(loss)()

    def begin(self, loss: Tensor) -> Callable[[], Tensor]:
        """Begin to take the mean; returns what waits for it, on the device's queue alone."""
        mean = loss / self.processes
        work: Any = dist.all_reduce(mean, async_op=True)

        def arrived() -> Tensor:
            work.wait()
            return mean

        return arrived


def mean_over_ranks(accelerator: Accelerator) -> MeanOverRanks | None:
    """Return the loss reduction that makes every rank damp alike, or None for one process."""
    return None if accelerator.num_processes == 1 else MeanOverRanks(accelerator.num_processes)


def shard(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Leave each process its part of the weights, in place, where the launcher asks for FSDP2.

    The optimizer is to be made afterwards, over what is left.
    """
    if accelerator.is_fsdp2:
        fsdp2_prepare_model(accelerator, model)


def wrapped(accelerator: Accelerator, model: PreTrainedModel) -> Any:
    """Return what is called to train ``model``: itself where it is sharded, else DDP around it."""
    return model if is_sharded(model) else accelerator.prepare(model)


@contextmanager
def not_alone(accelerator: Accelerator) -> Iterator[None]:
    """Say in words that another process is gone.

    Raises:
        ArsKitError: it is.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or _LOST.search(str(error))
        if accelerator.num_processes == 1 or not lost:
            raise
        raise ArsKitError(
            f"process {accelerator.process_index} of {accelerator.num_processes} has lost another: "
            "one of them ended, or its machine did. What was saved is kept; start them all again "
            "to go on"
        ) from error
