"""Is what a seed says of its weights' origin the truth, and all of it?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ars_kit.inherit import derive_opt_state
from ars_kit.models import weights_of
from ars_kit.spec import Block
from ars_kit.testing.newborns import Newborn

CLOSE = 1e-9
"""In float64: rounding, in whatever order a strategy multiplies."""

NEW = -1


@dataclass(frozen=True, slots=True)
class Origin:
    """Where each entry of one child tensor comes from.

    Attributes:
        at: int64, of the child's shape; the parent's entry, counted through all its tensors, or
            :data:`NEW`.
        coefficient: float64, of the child's shape; what it was multiplied by.
    """

    at: Tensor
    coefficient: Tensor


def origins(newborn: Newborn) -> dict[str, Origin]:
    """Return every entry's origin, of a newborn in float64.

    Raises:
        ConformanceError: provenance leaves a tensor out, does not fit, overlaps, is not true, or
            hides that something was inherited.
    """
    case, told = newborn.case, newborn.seed.provenance
    for name in sorted(told.keys() ^ newborn.weights.keys()):
        what = f"{name} is missing" if name in newborn.weights else f"the child has no {name}"
        raise case.broken("provenance must name every tensor, with an empty list if new", what)
    places = dict(_numbered(weights_of(newborn.parent)))
    found: dict[str, Origin] = {}
    for name, tensor in newborn.weights.items():
        origin = Origin(
            torch.full(tensor.shape, NEW),
            torch.ones(tensor.shape, dtype=torch.float64),
        )
        for block in told[name]:
            _fill(newborn, name, block, places, origin)
        found[name] = origin
    _check_hidden(newborn, found)
    _check_moments(newborn)
    return found


def _numbered(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    first = 0
    for name, tensor in weights.items():
        yield name, torch.arange(first, first + tensor.numel()).view(tensor.shape)
        first += tensor.numel()


def _fill(
    newborn: Newborn, name: str, block: Block, places: Mapping[str, Tensor], origin: Origin
) -> None:
    case, tensor = newborn.case, newborn.weights[name]
    try:
        expected = block.source(weights_of(newborn.parent)[block.parent]) * block.coefficient
        here, at = tensor[block.target], origin.at[block.target]
        source = block.source(places[block.parent])
        fits = here.shape == expected.shape and len(block.child_index) == tensor.ndim
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise case.broken(
            "a block must fit both tensors", f"of {name} {block} gives {error!r}"
        ) from error
    if not fits:
        raise case.broken(
            "a block must fit both tensors",
            f"of {name} it is {tuple(here.shape)}, of {block.parent} {tuple(expected.shape)}",
        )
    if bool((at != NEW).any()):
        raise case.broken("an entry has one origin at most", f"blocks of {name} overlap")
    if not torch.allclose(here, expected, rtol=CLOSE, atol=CLOSE):
        off = float((here - expected).abs().max())
        raise case.broken(
            "provenance must be true",
            f"{name} is not {block.coefficient:g} times {block.parent} where a block says so, but "
            f"up to {off:.3g} off",
        )
    origin.at[block.target] = source
    origin.coefficient[block.target] = block.coefficient


def _check_hidden(newborn: Newborn, found: Mapping[str, Origin]) -> None:
    """Look for the parent's numbers where no block is; drawn in float64, none occurs by chance."""
    drawn = torch.cat([t.flatten() for t in weights_of(newborn.fresh).values()])
    known = torch.cat([t.flatten() for t in weights_of(newborn.parent).values()])
    known = known[~torch.isin(known, drawn) & (known != 0)]
    new = {name: newborn.weights[name][origin.at == NEW] for name, origin in found.items()}
    taken = torch.isin(torch.cat(list(new.values())), known).split([len(t) for t in new.values()])
    for name, entries in zip(new, taken, strict=True):
        if bool(entries.any()):
            raise newborn.case.broken(
                "provenance must tell of all that was inherited",
                f"{int(entries.sum())} entries of {name} are the parent's, and no block says so",
            )


def _check_moments(newborn: Newborn) -> None:
    if newborn.seed.opt_state != "derive":
        return
    state = {
        n: {"exp_avg": t.clone(), "step": torch.tensor(5.0)}
        for n, t in weights_of(newborn.parent).items()
    }
    shapes = {n: t.shape for n, t in newborn.weights.items()}
    derived = derive_opt_state(state, newborn.seed.provenance, shapes)
    for name, entry in derived.items():
        if not bool(entry["exp_avg"].isfinite().all()):
            raise newborn.case.broken(
                "opt_state='derive' needs provenance that moments can follow",
                f"those of {name} would not be finite (a coefficient of 0?)",
            )
