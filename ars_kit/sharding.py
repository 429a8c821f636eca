"""Weights and optimizer states that several processes share: kept in parts, gathered, dealt out.

Where nothing is sharded, all of this passes tensors through. Parts are written and read by
torch.distributed.checkpoint: each process writes what it holds as safetensors, and any number of
processes reads what it needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only its part of the weights."""
    return any(hasattr(p, "device_mesh") for p in model.parameters())


def gathered(tree: Any, *, keep: bool) -> Any:
    """Return a state with whole tensors in the place of sharded ones.

    Every process must call this with a state of the same structure, since each sharded tensor is
    brought together by all of them. One at a time, so that no device holds them all.

    Args:
        tree: mappings, lists and tuples of anything.
        keep: whether this process wants the result; the others get an empty tensor for each.
    """
    if isinstance(tree, Tensor):
        if not hasattr(tree, "full_tensor"):
            return tree
        whole = tree.full_tensor()
        return whole.cpu() if keep else whole.new_empty(0)
    if isinstance(tree, Mapping):
        return {key: gathered(value, keep=keep) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(gathered(value, keep=keep) for value in tree)
    return tree


def dealt(whole: Tensor, like: Any) -> Tensor:
    """Return this process's part of a tensor, sharded as ``like`` is; all of it where it is not.

    What is not of the shape of ``like``, such as a step count, is left as it is. Nothing is sent:
    every process has the whole. Of a meta tensor the part is empty.
    """
    if not hasattr(like, "device_mesh") or whole.shape != like.shape:
        return whole
    if whole.is_meta:
        return torch.empty_like(like.detach(), dtype=whole.dtype)
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 -- slow to import

    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give meta weights room on a device, in place and unfilled; buffers keep their numbers."""
    held = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(held[name])


def scattered(whole: Tensor, like: Any) -> Tensor:
    """Return this process's part of a tensor that the first process alone has.

    Every process must call this at the same place of its work. The first sends each its part, so
    that no host holds the tensor again; on a device it stands whole until this returns.

    Args:
        whole: on the first process; elsewhere a meta tensor of the same shape and precision. One of
            another shape than ``like``, such as a step count, is whole on each, and left as it is.
        like: a weight, sharded or not.
    """
    if whole.shape != like.shape:
        return whole
    sharded = hasattr(like, "device_mesh")
    device = torch.device(like.device_mesh.device_type) if sharded else like.device
    if whole.is_meta:
        sent = torch.empty(whole.shape, dtype=whole.dtype, device=device)
    else:
        sent = whole.to(device).contiguous()
    if not sharded:
        dist.broadcast(sent, src=0)
        return sent
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 -- slow to import

    # Where weights rest on the host (offloaded), the mesh is of the devices all the same.
    return distribute_tensor(sent, like.device_mesh, like.placements).to(like.device)


def receive_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill a model from weights that the first process alone has, as :func:`scattered` does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(scattered(weights[name], parameter))


def dealt_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return whole weights by name, each sharded as the model's own is."""
    own = dict(model.named_parameters(remove_duplicate=True))
    return {name: dealt(w, own[name]) if name in own else w for name, w in weights.items()}


def dealt_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return a whole optimizer state, its moments sharded as the parameters are.

    Args:
        state: of an optimizer over parameters of the same number and order.
        optimizer: whose parameters they are.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    owner = dict(zip(numbers, params, strict=True))
    moments = {
        n: {k: dealt(v, owner[n]) if isinstance(v, Tensor) else v for k, v in entry.items()}
        if n in owner
        else entry
        for n, entry in state["state"].items()
    }
    return {**state, "state": moments}


def all_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is finite, over all its parts; waits for the device."""
    finite = tensor.isfinite().all()
    return bool(finite.full_tensor() if hasattr(finite, "full_tensor") else finite)


def write_parts(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write what this process holds of each tensor into a folder; every process must call this.

    What all of them hold is written once.

    Args:
        tensors: by the same names on every process.
        folder: the same one, empty, seen by all.

    Raises:
        Exception: what kept a process from writing; on every process.
    """
    from torch.distributed.checkpoint import hf_storage, state_dict_saver  # noqa: PLC0415 -- slow

    writer = hf_storage.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _first_failure():
        state_dict_saver.save(dict(tensors), storage_writer=writer)


def in_parts(folder: Path) -> bool:
    """Whether :func:`write_parts` has written into a folder."""
    return any(folder.glob("shard-*.safetensors"))


def parts_like(folder: Path) -> dict[str, Tensor]:
    """Return a meta tensor for each whole tensor whose parts are in a folder."""
    from torch.distributed.checkpoint import hf_storage  # noqa: PLC0415 -- slow to import
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # noqa: PLC0415

    found = hf_storage.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_parts(tensors: Mapping[str, Tensor], folder: Path, *, together: bool) -> None:
    """Fill tensors, sharded ones each with this process's part, from a folder of parts.

    Args:
        tensors: by name; those that the folder has more are left out.
        folder: that :func:`write_parts` wrote, on any number of processes.
        together: whether every process calls this; only so can a tensor be sharded.

    Raises:
        Exception: what kept a process from reading; on every process.
    """
    from torch.distributed.checkpoint import hf_storage, state_dict_loader  # noqa: PLC0415 -- slow

    with warnings.catch_warnings(), _first_failure():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_loader.load(
            dict(tensors),
            storage_reader=hf_storage.HuggingFaceStorageReader(str(folder)),
            no_dist=not together,
        )


@contextmanager
def _first_failure() -> Iterator[None]:
    """Raise what failed first in the place of a CheckpointException, which is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415 -- slow to import

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def allotted(tree: Any) -> Any:
    """Return a state with room on the CPU in the place of meta tensors."""
    if isinstance(tree, Tensor):
        return torch.empty(tree.shape, dtype=tree.dtype) if tree.is_meta else tree
    if isinstance(tree, Mapping):
        return {key: allotted(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(allotted, tree))
    return tree
