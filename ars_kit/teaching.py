"""A strategy's own loss within the training loop: run, checked, and its FLOPs counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ars_kit.errors import PluginError
from ars_kit.ledger import counting
from ars_kit.spec import Hint, Lesson, Loss, OnStep

if TYPE_CHECKING:
    from torch.optim import Optimizer

BACKWARD = 3
"""What forward and backward of a loss cost, as a multiple of its forward pass."""


@dataclass(slots=True)
class Teaching:
    """What a strategy asked for beyond first weights.

    Attributes:
        who: the strategy and its plugin, for complaints.
        loss: takes the place of the cross-entropy; None leaves it.
        on_step: called after each optimizer step; None: nothing is.
        weights: the member's live parameters by Hugging Face name.
        teacher: returns logits for token ids and their positions; None where nobody teaches.
        teacher_flops: of its forward pass, per token.
    """

    who: str = ""
    loss: Loss | None = None
    on_step: OnStep | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    teacher: Callable[[Tensor, Tensor | None], Tensor] | None = None
    teacher_flops: float = 0.0

    def objective(
        self,
        step: int,
        window: Tensor,
        logits: Tensor | None,
        loss: Tensor,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, float]:
        """Return what the micro-batch is to minimise, and the FLOPs it costs beyond ``loss``.

        Args:
            step: optimizer steps done before this one.
            window: token ids, shape (sequences, length + 1).
            logits: of the member, shape (sequences, length, vocabulary); None where they stand in
                chunks, which a strategy with a loss of its own rules out.
            loss: their mean cross-entropy, 0-d.
            positions: of each input token in its document, where documents are kept apart.

        Raises:
            PluginError: the strategy's loss raised, or returned something else than a 0-d tensor.
        """
        if self.loss is None or logits is None:
            return loss, 0.0
        inputs, targets = window[:, :-1], window[:, 1:]
        taught, spent = None, 0.0
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(inputs, positions)
            spent = self.teacher_flops * inputs.numel()
        lesson = Lesson(step, inputs, targets, logits, loss, self.weights, taught)
        try:
            with counting() as account:
                found: Any = self.loss(lesson)
        except torch.OutOfMemoryError:  # of the batch as it is divided now
            raise
        except (Exception, SystemExit) as error:
            raise self._broke(f"its loss failed at step {step}: {error!r}") from error
        if not isinstance(found, Tensor) or found.ndim:
            what = type(found).__name__ if not isinstance(found, Tensor) else str(found.shape)
            raise self._broke(f"its loss must return a 0-d tensor; at step {step} it is {what}")
        return found, spent + BACKWARD * account.flops

    def after(self, step: int) -> float:
        """Let the strategy change weights once a step is done; returns what that cost in FLOPs.

        Raises:
            PluginError: it raised.
        """
        if self.on_step is None:
            return 0.0
        try:
            with torch.no_grad(), counting() as account:
                self.on_step(step + 1, self.weights)
        except torch.OutOfMemoryError:  # the device's affair
            raise
        except (Exception, SystemExit) as error:
            raise self._broke(f"its on_step failed at step {step}: {error!r}") from error
        return account.flops

    def _broke(self, how: str) -> PluginError:
        return PluginError(f"{self.who}: {how}")


def hinted(groups: list[dict[str, Any]], hints: Mapping[str, Hint]) -> list[dict[str, Any]]:
    """Split parameter groups so that each tensor of one group has the same hint.

    Args:
        groups: as :func:`ars_kit.models.parameter_groups` returns them.
        hints: by parameter name; every name must stand in a group.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        found: dict[Hint, dict[str, Any]] = {}
        for name, parameter in zip(group["names"], group["params"], strict=True):
            hint = hints.get(name, Hint())
            fresh = {**group, **_terms(group, hint), "params": [], "names": []}
            own = found.setdefault(hint, fresh)
            own["params"].append(parameter)
            own["names"].append(name)
        split += found.values()
    return split


def _terms(group: Mapping[str, Any], hint: Hint) -> dict[str, Any]:
    if hint == Hint():
        return {}
    return {
        "lr": group["lr"] * hint.lr,
        "weight_decay": group["weight_decay"] * hint.weight_decay,
        "peak_decay": group["weight_decay"] * hint.weight_decay,
        "decay_from": hint.decay_from,
        "frozen_until": hint.frozen_until,
    }


def follow_hints(optimizer: Optimizer, step: int) -> None:
    """Hold back what is not to change yet; called once this step's learning rates are set."""
    for group in optimizer.param_groups:
        if "decay_from" not in group:
            continue
        group["weight_decay"] = group["peak_decay"] if step >= group["decay_from"] else 0.0
        if step < group["frozen_until"]:
            if isinstance(group["lr"], Tensor):
                group["lr"].zero_()
            else:
                group["lr"] = 0.0
