"""An optimizer that stands for another wherever torch expects one.

Schedulers, GradScaler, accelerate and Lightning read and replace groups, state and hooks of the
optimizer they are given; here those are the wrapped one's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Wrapper(Optimizer, ABC):
    """Everything of a :class:`torch.optim.Optimizer` but the step, handed on to ``base``.

    A subclass has a state of its own besides, by ``damping_state`` and ``load_damping_state``.

    Args:
        base: the optimizer; its ``param_groups`` and ``state`` stay its own.
    """

    # A GradScaler puts these here if the base takes them.
    grad_scale: Tensor | None
    found_inf: Tensor

    def __init__(self, base: Optimizer) -> None:
        # Optimizer.__init__ would copy the groups; a copy goes stale when the base loads a state.
        # What it sets up besides are the hook tables that schedulers and Lightning rely on.
        self.base = base
        for table in (
            "_optimizer_step_pre_hooks",
            "_optimizer_step_post_hooks",
            "_optimizer_state_dict_pre_hooks",
            "_optimizer_state_dict_post_hooks",
            "_optimizer_load_state_dict_pre_hooks",
            "_optimizer_load_state_dict_post_hooks",
        ):
            setattr(self, table, OrderedDict())
        self._patch_step_function()

    # The base owns these three; whoever reads or replaces them here reads or replaces its own.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base."""
        self.base.add_param_group(param_group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling to the step, as the base would have it."""
        return bool(getattr(self.base, "_step_supports_amp_scaling", False))

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state with one more key, ``damping``; tensors and plain numbers."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = {**self.base.state_dict(), "damping": self.damping_state()}
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; a bare base's state is accepted too."""
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state = dict(before(self, state) or state)
        damping = state.pop("damping", None)
        self.base.load_state_dict(state)
        if damping is not None:
            self.load_damping_state(damping)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @abstractmethod
    def damping_state(self) -> dict[str, Any]:
        """Return what is not the base's; the same on every rank."""

    @abstractmethod
    def load_damping_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`damping_state` returned."""
