"""What the host does at a birth: carries optimizer moments along the provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ars_kit.spec import Block

FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq"})

State = Mapping[str, Mapping[str, Tensor]]


def derive_opt_state(
    parent: State, provenance: Mapping[str, Sequence[Block]], shapes: Mapping[str, torch.Size]
) -> dict[str, dict[str, Tensor]]:
    """Return the child's optimizer state by parameter name.

    A weight that is c times its parent's sees a gradient 1/c as large, by the chain rule through
    a function that was preserved. So first moments are divided by c and second moments by c
    squared. What is new starts at zero under its parent's step count. State of any other kind
    (Adafactor's factored moments) is left out, and the optimizer starts it afresh.
    """
    derived: dict[str, dict[str, Tensor]] = {}
    for name, blocks in provenance.items():
        shape = shapes[name]
        state: dict[str, Tensor] = {}
        for block in blocks:
            for key, old in parent.get(block.parent, {}).items():
                if key == "step":
                    state[key] = old.clone()
                elif key in FIRST_MOMENTS | SECOND_MOMENTS:
                    power = 1 if key in FIRST_MOMENTS else 2
                    target = state.setdefault(key, old.new_zeros(shape))
                    target[_slices(block.child_index)] = (
                        old[_slices(block.parent_index)] / block.coefficient**power
                    )
        if state:
            derived[name] = state
    return derived


def inherited_share(
    provenance: Mapping[str, Sequence[Block]], shapes: Mapping[str, torch.Size]
) -> float:
    """Return the share of the child's parameters that came from its parent, in [0, 1]."""
    total = sum(shape.numel() for shape in shapes.values())
    covered = 0
    for blocks in provenance.values():
        for block in blocks:
            covered += torch.Size([len(range(*span)) for span in block.child_index]).numel()
    return covered / total if total else 0.0


def _slices(index: tuple[tuple[int, int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(*span) for span in index)
