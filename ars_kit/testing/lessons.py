"""Do the parts of a strategy that run while a member trains keep their rules?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ars_kit.spec import Lesson
from ars_kit.testing.cases import windows_of
from ars_kit.testing.newborns import Newborn, may_not_fail
from ars_kit.testing.rules import watching

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_loss(newborn: Newborn, child: PreTrainedModel, *, taught: bool) -> None:
    """Check a seed's loss, if it has one.

    Args:
        newborn: in float32.
        child: as it was born.
        taught: whether a descent asked for a teacher.
    """
    loss, case = newborn.seed.loss, newborn.case
    if loss is None:
        return
    window = windows_of(3, 11)
    inputs, targets = window[:, :-1], window[:, 1:]
    teacher = None
    if taught:
        with torch.no_grad():
            teacher = newborn.parent(input_ids=inputs).logits
    live: dict[str, Tensor] = dict(child.named_parameters())
    values = []
    for _ in range(2):
        logits = child(input_ids=inputs).logits
        mean = cross_entropy(logits.flatten(0, 1), targets.flatten())
        lesson = Lesson(3, inputs, targets, logits, mean, live, teacher)
        with may_not_fail(case, "a loss must not fail"), watching() as watch:
            found: Any = loss(lesson)
        if watch.found:
            raise case.broken("a loss must not wait for the device", f"it calls {watch.found}")
        if not isinstance(found, Tensor) or found.ndim:
            what = (
                f"its shape is {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            )
            raise case.broken("a loss must be a 0-d tensor", what)
        if not bool(found.isfinite()):
            raise case.broken("a loss must be finite", f"it is {float(found.detach()):g}")
        if not found.requires_grad:
            raise case.broken("a loss must have a gradient", "it has none")
        values.append(found.detach())
    changed = [n for n, p in live.items() if not torch.equal(newborn.weights[n], p)]
    if changed:
        raise case.broken("a loss must leave the weights alone", f"it changed {changed[0]}")
    if not torch.equal(*values):
        raise case.broken(
            "a loss must depend on its lesson alone, or no run could be resumed",
            f"the same lesson gives {float(values[0]):g} and then {float(values[1]):g}",
        )


def check_on_step(newborn: Newborn) -> None:
    """Check what a seed does after each step, if anything."""
    on_step, case = newborn.seed.on_step, newborn.case
    if on_step is None:
        return
    ends = []
    for _ in range(2):
        live: dict[str, Tensor] = dict(newborn.grown().named_parameters())
        with may_not_fail(case, "on_step must not fail"), torch.no_grad(), watching() as watch:
            on_step(1, live)
        if watch.found:
            raise case.broken("on_step must not wait for the device", f"it calls {watch.found}")
        ends.append({n: p.detach().clone() for n, p in live.items()})
    for name, end in ends[0].items():
        if not bool(end.isfinite().all()):
            raise case.broken("on_step must leave the weights finite", f"{name} is not")
        if not torch.equal(end, ends[1][name]):
            raise case.broken(
                "on_step must depend on the step and the weights alone",
                f"{name} ends otherwise the second time",
            )
