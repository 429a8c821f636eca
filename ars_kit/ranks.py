"""Several processes that train one member: how they start, agree, and part."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    fsdp2_prepare_model,
    parse_flag_from_env,
)
from torch import Tensor

from ars_kit.errors import ArsKitError, ConfigError, PluginError
from ars_kit.sharding import is_sharded, materialise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ars_kit.memory import Recipe
    from ars_kit.plan import RunPlan
    from ars_kit.settings import Settings

_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|watchdog", re.IGNORECASE)
"""What errors of a collective call whose other side is gone have in their text."""

PATIENCE = timedelta(hours=2)
"""How long processes wait while the main one bears a sharded member; NCCL's own is 10 minutes."""

T = TypeVar("T")


def make_accelerator(plan: RunPlan) -> Accelerator:
    """Return the accelerator the plan asks for; under a launcher it joins the others.

    Raises:
        ConfigError: the launcher asks for an engine that is not supported, or for several
            processes under a recipe for one.
    """
    # Weights in bf16 compute in it by themselves.
    autocast = plan.precision == "bf16" and not plan.recipe.bf16_weights
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    accelerator = Accelerator(
        cpu=plan.device == "cpu",
        mixed_precision="bf16" if autocast else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)] if sharded else [],
    )
    require_alone(plan.recipe, accelerator.num_processes)
    if plan.device == "cpu" and sharded:
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


def from_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """Return what the main process makes, sent to every process; each must call this.

    Args:
        accelerator: of the run.
        make: called on the main process alone; what it returns must pickle.

    Raises:
        ArsKitError: what kept the main process from making it; on every process.
    """
    sent: list[tuple[T | None, ArsKitError | None]] = [(None, None)]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            sent = [(make(), None)]
        except Exception as error:  # the others wait, and must hear of it  # noqa: BLE001
            failure = error
            known = error if isinstance(error, ArsKitError) else None
            sent = [(None, known or ArsKitError(f"the main process failed: {error!r}"))]
    dist.broadcast_object_list(sent, src=0)
    made, told = sent[0]
    if failure or told:
        raise failure or told  # type: ignore[misc]
    return made  # type: ignore[return-value]


def shard(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Give each process of FSDP2 room for its part of a model's meta weights, in place, unfilled.

    The optimizer is to be made afterwards, over what is there.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy  # noqa: PLC0415 -- slow to import

    plugin = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False  # accelerate's way; it would send meta weights
    fsdp2_prepare_model(accelerator, model)
    offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    materialise(model, torch.device("cpu") if offloaded else accelerator.device)


def wrapped(accelerator: Accelerator, model: PreTrainedModel) -> Any:
    """Return what is called to train ``model``: itself where it is sharded, else DDP around it."""
    return model if is_sharded(model) else accelerator.prepare(model)


def lost_another(error: BaseException | None) -> bool:
    """Return whether a collective call ended in ``error`` because its other side is gone.

    A plugin in which it happened, such as a sharded optimizer, is not to blame.
    """
    while isinstance(error, PluginError):
        error = error.__cause__
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or bool(_LOST.search(str(error)))


@contextmanager
def not_alone(accelerator: Accelerator) -> Iterator[None]:
    """Say in words that another process is gone.

    Raises:
        ArsKitError: it is.
    """
    try:
        yield
    except (RuntimeError, PluginError) as error:
        if accelerator.num_processes == 1 or not lost_another(error):
            raise
        raise ArsKitError(
            f"process {accelerator.process_index} of {accelerator.num_processes} has lost another: "
            "one of them ended, or its machine did. What was saved is kept; start them all again "
            "to go on"
        ) from error
