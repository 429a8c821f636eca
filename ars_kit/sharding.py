"""Weights and optimizer states that several processes share: gathered to be kept, dealt out again.

Where nothing is sharded, all of this passes tensors through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    every process has the whole.
    """
    if not hasattr(like, "device_mesh") or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 -- slow to import

    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


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
