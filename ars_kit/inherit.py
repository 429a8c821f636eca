"""What the host makes of a strategy: the order of births, the moments along the provenance."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ars_kit.errors import PluginError
from ars_kit.sharding import dealt
from ars_kit.spec import Block, Descent, Hint, InheritanceStrategy, Ordering, Seed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
"""The degree in the gradient of each kind of state that can follow a scaled or extended weight."""

State = Mapping[str, Mapping[str, Tensor]]


def descents(
    strategy: InheritanceStrategy, configs: Sequence[PretrainedConfig]
) -> tuple[Descent, ...]:
    """Return every member's descent in order of birth: the strategy's own, or a chain.

    Raises:
        ConfigError: the strategy cannot have such a family.
        PluginError: it left a member out, named one twice, or an heir before its parent.
    """
    if not isinstance(strategy, Ordering):
        chain = range(len(configs))
        parents = [i - 1 if i and strategy.inherits else None for i in chain]
        return tuple(Descent(i, parent) for i, parent in zip(chain, parents, strict=True))
    found = tuple(strategy.descents(configs))
    born: list[int] = []
    for d in found:
        if d.parent is not None and d.parent not in born:
            raise PluginError(f"the strategy bears member {d.member} before its parent {d.parent}")
        born.append(d.member)
    if sorted(born) != list(range(len(configs))):
        raise PluginError(f"the strategy bears members {born} of a family of {len(configs)}")
    return found


def objection(
    strategy: InheritanceStrategy, parent: PretrainedConfig, child: PretrainedConfig
) -> str | None:
    """Return why a strategy cannot have a child of a parent, or None if it can.

    Raises:
        TypeError: it answers neither.
    """
    reason: Any = strategy.supports(parent, child)
    if not isinstance(reason, str | None):
        raise TypeError(f"supports must return None, or the reason in words, not {reason!r}")
    return reason


def broken_term(seed: Seed) -> tuple[str, str] | None:
    """Return the first of a seed's terms that is out of range: what it must be, and what it is."""

    def share(value: Any) -> bool:
        return isinstance(value, int | float) and 0 <= value <= 1

    def steps(value: Any) -> bool:
        return isinstance(value, int) and value >= 0

    note: Any = seed.note
    checks = {
        "preserves": (seed.preserves in ("exact", "approx", "none"), "exact, approx or none"),
        "opt_state": (seed.opt_state in ("derive", "reset"), "derive or reset"),
        "rewarm_steps": (
            seed.rewarm_steps is None or steps(seed.rewarm_steps),
            "None or a number of steps",
        ),
        "start_lr": (share(seed.start_lr), "in [0, 1]"),
        "decay_fraction": (
            seed.decay_fraction is None or share(seed.decay_fraction),
            "None or in [0, 1]",
        ),
        "replay": (share(seed.replay) and seed.replay < 1, "in [0, 1)"),
        "note": (isinstance(note, str) and "\n" not in note, "one line of text"),
    }
    for name, (held, span) in checks.items():
        if not held:
            return f"a seed's {name} must be {span}", f"it is {getattr(seed, name)!r}"
    hints: Mapping[str, Any] = seed.hints
    for name, hint in hints.items():
        numbers = [getattr(hint, f.name) for f in fields(Hint)] if isinstance(hint, Hint) else []
        if not numbers or not all(x >= 0 for x in numbers):
            return "a hint must be a Hint of numbers >= 0", f"for {name}: {hint!r}"
    return None


def derive_opt_state(
    parent: State, provenance: Mapping[str, Sequence[Block]], shapes: Mapping[str, torch.Size]
) -> dict[str, dict[str, Tensor]]:
    """Return the child's optimizer state by parameter name.

    A weight that is c times its parent's sees a gradient 1/c as large, by the chain rule through
    a function that was preserved. So first moments are divided by c and second moments by c
    squared. New entries of an inherited tensor start at zero under its step count; a tensor that
    is new throughout has no state, and the optimizer starts it afresh.

    State of any other kind (Adafactor's factored moments) is carried where a tensor is a plain
    copy. Where it is not, the whole tensor starts afresh: no optimizer takes half a state.

    Args:
        parent: the parent's state, ``{parameter: {"exp_avg": ..., "step": ...}}``.
        provenance: as a strategy's :class:`~ars_kit.spec.Seed` carries it.
        shapes: the child's parameters.

    Returns:
        New tensors, on the parent's devices and in their precision.
    """
    derived: dict[str, dict[str, Tensor]] = {}
    dropped: set[str] = set()
    for name, blocks in provenance.items():
        live = [b for b in blocks if parent.get(b.parent)]
        if not live:
            continue
        whole = parent.get(blocks[0].parent, {})
        if len(blocks) == 1 and _is_copy(blocks[0], whole, shapes[name]):
            derived[name] = {key: old.clone() for key, old in whole.items()}
            continue
        unknown = {k for b in live for k in parent[b.parent] if k != "step" and k not in POWERS}
        if unknown or any(b.coefficient == 0 for b in live):
            dropped |= unknown
            continue
        derived[name] = _scaled(parent, live, shapes[name])
    if dropped:
        logger.info(
            "optimizer state %s cannot follow a tensor that changed; those tensors start afresh",
            ", ".join(sorted(dropped)),
        )
    return derived


def inherited_share(
    provenance: Mapping[str, Sequence[Block]], shapes: Mapping[str, torch.Size]
) -> float:
    """Return the share of the child's parameters that came from its parent, in [0, 1]."""
    total = sum(shape.numel() for shape in shapes.values())
    covered = sum(_extent(block) for blocks in provenance.values() for block in blocks)
    return covered / total if total else 0.0


def _scaled(parent: State, blocks: Sequence[Block], shape: torch.Size) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for block in blocks:
        for key, old in parent[block.parent].items():
            if key == "step":
                # Of several parents the longest lived: its bias correction is the mildest.
                state[key] = torch.maximum(state[key], old) if key in state else old.clone()
                continue
            target = state.setdefault(key, old.new_zeros(shape))
            target[block.target] = block.source(old) / block.coefficient ** POWERS[key]
    return state


def _is_copy(block: Block, state: Mapping[str, Tensor], shape: torch.Size) -> bool:
    """Return whether a tensor is its parent's, unchanged, and the state is of its shape.

    A factored moment has the extent of the tensor or 1 in each dimension.
    """
    span = tuple((0, n, 1) for n in shape)
    if block.coefficient != 1 or block.child_index != span or block.parent_index != span:
        return False
    return all(
        old.ndim == 0
        or (
            old.ndim == len(shape)
            and all(a in {1, b} for a, b in zip(old.shape, shape, strict=True))
        )
        for old in state.values()
    )


def _extent(block: Block) -> int:
    return torch.Size([len(range(*span)) for span in block.child_index]).numel()


def load_named_state(
    optimizer: Optimizer, state: State, *, deal: Callable[[Tensor, Tensor], Tensor] = dealt
) -> None:
    """Put tensors back by parameter name; parameters without an entry keep what they have.

    Args:
        optimizer: whose groups name their parameters.
        state: by parameter name and kind of tensor.
        deal: returns this process's part of a tensor, for a parameter.
    """
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
                # Fused SGD wants every momentum buffer or none.
                optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            if name in state:
                found = {
                    k: v.clone() if k == "step" else _own(deal(v, p), v, p)
                    for k, v in state[name].items()
                }
                # Where moments are kept in few bits, the optimizer brings them there.
                adopt = getattr(optimizer, "adopt", None)
                optimizer.state[p] = found if adopt is None else adopt(p, found)


def _own(part: Tensor, whole: Tensor, parameter: Tensor) -> Tensor:
    """Return a part on its parameter's device, in memory of its own."""
    return part.to(parameter.device, copy=part is whole)
