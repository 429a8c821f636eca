"""Whether a base optimizer steps sharded weights as it steps whole ones: tried, not looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ars_kit.errors import ConfigError
from ars_kit.factors import is_quantised
from ars_kit.optim import base_name, make_base
from ars_kit.ranks import lost_another
from ars_kit.sharding import dealt, dealt_state, gathered

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

    from ars_kit.host import Host
    from ars_kit.settings import OptimizerSettings

STEPS = 3
WIDTH = 2048
"""Of the matrix in the trial: so much that moments would be kept in few bits."""
SAME = 0.05
"""Largest difference between two updates, against the largest update; bf16 products make 0.01."""


def require_shardable(host: Host, settings: OptimizerSettings, accelerator: Accelerator) -> None:
    """Refuse a base optimizer that FSDP2 cannot train with. Every process must ask.

    It steps a few numbers, sharded and whole, is saved and loaded as a training state is, and
    steps again.

    Raises:
        ConfigError: it fails, or steps the two differently; on every process.
    """
    if not accelerator.is_fsdp2:
        return
    try:
        reason = _reason(host, settings, accelerator)
    except Exception as error:  # an optimizer may raise anything
        if lost_another(error):
            raise
        sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
        reason = f"it ends in {type(error).__name__}: {sentence}"
    if reason:
        raise ConfigError(
            f"base optimizer {base_name(host, settings)!r} cannot train weights that FSDP2 shards "
            f"({reason}); use --base-optimizer adamw, or train under DDP"
        )


def _reason(host: Host, settings: OptimizerSettings, accelerator: Accelerator) -> str | None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 -- slow to import
    from torch.distributed.tensor import Shard, distribute_tensor  # noqa: PLC0415

    device, processes = accelerator.device, accelerator.num_processes
    mesh = init_device_mesh(device.type, (processes,))
    draw = torch.Generator().manual_seed(0)
    rows = 2 * processes
    shapes: dict[str, tuple[int, ...]] = {
        "matrix": (rows, WIDTH),
        "embedding": (rows, 4),
        "vector": (rows,),
    }

    def drawn() -> dict[str, Tensor]:
        return {k: torch.randn(s, generator=draw).to(device) for k, s in shapes.items()}

    first = drawn()
    whole = {k: nn.Parameter(v.clone()) for k, v in first.items()}
    parts = {
        k: nn.Parameter(distribute_tensor(v, mesh, [Shard(0)], src_data_rank=None))
        for k, v in first.items()
    }
    one, two = (make_base(host, settings, _groups(params)) for params in (whole, parts))
    for step in range(STEPS):
        for role, gradient in drawn().items():
            whole[role].grad = gradient
            parts[role].grad = dealt(gradient, parts[role])
        if step == STEPS - 1:
            if any(is_quantised(value) for value in _moments(two)):
                return "moments of few bits are not kept in parts"
            kept = gathered(two.state_dict(), keep=True)
            two = make_base(host, settings, _groups(parts))
            two.load_state_dict(dealt_state(kept, two))
        one.step()
        two.step()
    for role, weight in whole.items():
        update = (weight - first[role]).abs().max()
        if not (gathered(parts[role], keep=True).to(device) - weight).abs().max() <= SAME * update:
            return "it steps them otherwise than whole ones"
    return None


def _groups(params: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [p], "names": [role], "role": role, "lr": 1e-3, "weight_decay": 0.0}
        for role, p in params.items()
    ]


def _moments(optimizer: Optimizer) -> list[Any]:
    """Return what this process holds of every tensor of a state."""
    values = [v for entry in optimizer.state.values() for v in entry.values()]
    return [v.to_local() if hasattr(v, "to_local") else v for v in values]
