"""A birth as the host has it, and what must hold of whatever is born."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ars_kit.inherit import broken_term
from ars_kit.models import set_weights, weights_of
from ars_kit.spec import Birth, InheritanceStrategy, Parent, Seed
from ars_kit.testing.cases import Case, fresh_of, model_of, windows_of
from ars_kit.testing.rules import ConformanceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Make = Callable[[], InheritanceStrategy]


@dataclass(frozen=True, slots=True)
class Newborn:
    """What a strategy bore.

    Attributes:
        weights: the seed's, each read once.
        parent: the parent's model; for reading.
        fresh: the child's as it would begin without a parent; for reading.
    """

    case: Case
    seed: Seed
    weights: Mapping[str, Tensor]
    parent: PreTrainedModel
    fresh: PreTrainedModel

    def grown(self) -> PreTrainedModel:
        """Return a new model with the seed's weights."""
        child = copy.deepcopy(self.fresh)
        set_weights(child, self.weights)
        return child


def born(make: Make, case: Case, seed: int, dtype: torch.dtype = torch.float32) -> Newborn:
    """Return what a new strategy bears in one case, if it may be born so.

    Args:
        make: returns the strategy.
        case: parent and child.
        seed: of weights, text and draws.
        dtype: of parent and child.

    Raises:
        ConformanceError: it raised, changed what it was shown, drew from a global generator, or
            returned no seed of a child's weights.
    """
    parent, newborn = model_of(case.parent, seed, dtype), fresh_of(case.child, seed + 1, dtype)
    given = {n: t.clone() for n, t in weights_of(parent).items()}
    fresh = {n: t.clone() for n, t in weights_of(newborn).items()}
    moments = {n: {"exp_avg": t * 0.01, "step": torch.tensor(5.0)} for n, t in given.items()}
    heir = Parent(
        name="parent",
        config=copy.deepcopy(case.parent),
        weights=given,
        opt_state=moments,
        heldout_loss=4.0,
        tokens=1000,
        flops=1e9,
        model=lambda: copy.deepcopy(parent),
    )
    birth = Birth(
        name="child",
        config=copy.deepcopy(case.child),
        fresh=fresh,
        rng=torch.Generator().manual_seed(seed),
        steps=100,
        flops=1e9,
        windows=lambda n: windows_of(n, seed),
    )
    drawn = torch.get_rng_state(), random.getstate()
    with may_not_fail(case, "inherit must bear every child that supports has nothing against"):
        answer: Any = make().inherit(heir, birth)
        if not isinstance(answer, Seed):
            raise case.broken("inherit must return a Seed", f"it returned {answer!r}")
        weights = {name: answer.weights[name] for name in answer.weights}
    if not torch.equal(torch.get_rng_state(), drawn[0]) or random.getstate() != drawn[1]:
        raise case.broken("birth.rng is the only source of chance", "it used a global generator")
    _check_untouched(case, heir, birth, parent, newborn)
    _check_weights(case, weights, given, fresh)
    return Newborn(case, answer, weights, parent, newborn)


@contextmanager
def may_not_fail(case: Case, rule: str) -> Iterator[None]:
    """Turn what a strategy raises into the complaint about a rule."""
    try:
        yield
    except ConformanceError:
        raise
    except Exception as error:
        raise case.broken(rule, f"it raised {error!r}") from error


def _check_untouched(
    case: Case, heir: Parent, birth: Birth, parent: PreTrainedModel, newborn: PreTrainedModel
) -> None:
    old, fresh = weights_of(parent), weights_of(newborn)
    moments = {n: entry["exp_avg"] for n, entry in (heir.opt_state or {}).items()}
    shown = {
        "the parent's weights": (old, heir.weights),
        "the parent's moments": ({n: t * 0.01 for n, t in old.items()}, moments),
        "birth.fresh": (fresh, birth.fresh),
    }
    for what, (was, now) in shown.items():
        changed = [n for n in was if n not in now or not torch.equal(was[n], now[n])]
        if changed:
            raise case.broken(
                "what a strategy is shown it only reads", f"{what} changed: {changed[0]}"
            )
    for what, before, after in (
        ("the parent's", case.parent, heir.config),
        ("the child's", case.child, birth.config),
    ):
        if before.to_dict() != after.to_dict():
            raise case.broken("what a strategy is shown it only reads", f"{what} config changed")


def _check_weights(
    case: Case,
    weights: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
) -> None:
    rule = "a seed's weights must match the child's configuration exactly"
    for name in sorted(fresh.keys() | weights.keys()):
        if name not in weights:
            raise case.broken(rule, f"{name} is missing")
        if name not in fresh:
            raise case.broken(rule, f"the child has no {name}")
        found: Any = weights[name]
        wanted = fresh[name]
        if not isinstance(found, Tensor) or found.shape != wanted.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise case.broken(rule, f"{name} is {shape}, not {tuple(wanted.shape)}")
        if found.dtype != wanted.dtype:
            raise case.broken(
                "weights must have the precision of birth.fresh",
                f"{name} is {found.dtype}, not {wanted.dtype}",
            )
        if not bool(found.isfinite().all()):
            raise case.broken("weights must be finite", f"{name} is not")
    owners: dict[int, str] = {}
    for what, group in (("the parent's ", given), ("birth.fresh's ", fresh), ("", weights)):
        for name, tensor in group.items():
            place = tensor.untyped_storage().data_ptr()
            if group is weights and place in owners:
                raise case.broken(
                    "a child's tensors must be copies, in memory of their own",
                    f"{name} shares its memory with {owners[place]}",
                )
            owners[place] = f"{what}{name}"


def check_terms(newborn: Newborn) -> None:
    """Check what a seed says about the child's training."""
    seed, case = newborn.seed, newborn.case
    if broken := broken_term(seed):
        raise case.broken(*broken)
    for name in seed.hints:
        if name not in newborn.weights:
            raise case.broken("a hint must be about a tensor of the child", f"it has no {name!r}")


def check_repeated(newborn: Newborn, again: Newborn) -> None:
    """Check that two strategies shown the same bore the same."""
    one, two = newborn.weights, again.weights
    differ = [name for name in one if not torch.equal(one[name], two[name])]
    rule = "the same parent and the same birth.rng must bear the same child"
    if differ:
        raise newborn.case.broken(rule, f"{differ[0]} differs the second time")
    if newborn.seed.provenance != again.seed.provenance:
        raise newborn.case.broken(rule, "its provenance differs the second time")
