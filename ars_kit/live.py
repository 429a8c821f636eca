"""The bytes of all tensors that live at once, and what an optimizer's steps take of them."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ars_kit.backward import held, step_alone

if TYPE_CHECKING:
    from torch.optim import Optimizer


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor storage made under it, real or fake.

    Memory that a kernel takes and returns within itself is not seen; nor is what the allocator
    rounds up or keeps.

    Attributes:
        now: bytes alive.
        peak: the most there were, since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            # A subclass made of tensors has no memory but theirs.
            wrapper: bool = is_traceable_wrapper_subclass(tensor)
            if isinstance(tensor, Tensor) and not wrapper:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # noqa: SLF001 -- what identifies a storage
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += self._alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


class Steps:
    """An optimizer's steps, over all parameters or over each as its gradient arrives.

    Args:
        optimizer: whose.
        live: what counts the bytes.
        device: the foreseen one; off the CPU a step needs no memory beside its states.
    """

    def __init__(self, optimizer: Optimizer, live: LiveBytes, device: str) -> None:
        self.optimizer, self.live, self.device = optimizer, live, device

    def first(self) -> None:
        """Make the states of all parameters, which have gradients."""
        self.optimizer.step()

    def next(self) -> None:
        """Take what a step takes once there are states."""
        self.optimizer.step()

    def follow_gradients(self) -> None:
        """Let each parameter be stepped as its gradient arrives, as :mod:`ars_kit.backward` does.

        Elsewhere than on the CPU it holds a copy of the parameter and its state.
        """

        def arrived(group: dict[str, Any], p: Tensor) -> None:
            self.alone(group, p)
            p.grad = None

        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(partial(arrived, group))

    def alone(self, group: dict[str, Any], p: Tensor) -> None:
        """Take what the step of one parameter takes."""
        if self.device == "cpu":
            step_alone(self.optimizer, group, p)
        else:
            held(p, self.optimizer.state[p])


class _StepsAlike(Steps):
    """Those of one that steps each parameter by itself: one of each kind is stepped for all."""

    def first(self) -> None:
        """Make the states of one parameter of each kind, and count them for all."""
        kinds: dict[tuple[int, torch.Size, torch.dtype], list[Tensor]] = {}
        for at, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                kinds.setdefault((at, p.shape, p.dtype), []).append(p)
        self.takes: dict[Tensor, int] = {}
        missing = 0
        for (at, *_), alike in kinds.items():
            group, p, before = self.optimizer.param_groups[at], alike[0], self.live.now
            step_alone(self.optimizer, group, p)
            missing += (self.live.now - before) * (len(alike) - 1)
            self.live.peak = now = self.live.now
            super().alone(group, p)
            self.takes |= dict.fromkeys(alike, self.live.peak - now)
        self.live.now += missing  # the states of those that were not stepped

    def next(self) -> None:
        """Take what a step takes once there are states: one parameter's at a time."""
        self._took(max(self.takes.values()))

    def alone(self, group: dict[str, Any], p: Tensor) -> None:  # noqa: ARG002 -- not stepped
        """Take what the step of one parameter takes."""
        self._took(self.takes[p])

    def _took(self, size: int) -> None:
        self.live.peak = max(self.live.peak, self.live.now + size)


def steps_of(optimizer: Optimizer, live: LiveBytes, device: str) -> Steps:
    """Return an optimizer's steps, at as little work as tells what they take."""
    kind = _StepsAlike if getattr(optimizer, "each_alone", False) else Steps
    return kind(optimizer, live, device)
