"""torchao's AdamW with moments of 8 or 4 bits and stochastic rounding of bf16 weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ars_kit.errors import ConfigError

# At import torchao tells of each kernel for other devices and torches, and torch of its old calls.
_talkers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
_levels = [logger.level for logger in _talkers]
for _logger in _talkers:
    _logger.setLevel(logging.ERROR)
try:
    from torchao.optim import AdamW4bit, AdamW8bit
except ImportError:
    raise ConfigError(
        "moments of 8 or 4 bits need an extra; install it: pip install 'ars-kit[lowbit]', or use "
        "--memory full"
    ) from None
finally:
    for _logger, _level in zip(_talkers, _levels, strict=True):
        _logger.setLevel(_level)


class _Adopting:
    """What both have beyond torchao's own."""

    param_groups: list[dict[str, Any]]
    each_alone = True
    """What the step of a parameter takes depends on its shape alone: see :mod:`ars_kit.live`."""

    def __init__(self, params: Any, lr: float, *rest: Any, **options: Any) -> None:
        super().__init__(params, lr, *rest, **options)  # type: ignore[call-arg]
        # torchao makes its tables at the first state; among fake tensors it could not.
        with unset_fake_temporarily():
            for signed in (True, False):
                self._subclass_zeros(torch.zeros(1024), signed, self.block_size)  # type: ignore[attr-defined]

    def step(self, closure: Any = None) -> Any:
        """Step; compiled, as torchao has it, on an accelerator alone.

        On the CPU that would need a C++ compiler, and minutes where a member has many shapes.
        """
        device = self.param_groups[0]["params"][0].device
        eager = torch.compiler.set_stance("force_eager")
        with eager if device.type == "cpu" else nullcontext():
            return super().step(closure)  # type: ignore[misc]

    def adopt(self, parameter: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return float moments of a parameter as this optimizer keeps them."""
        kept = {"step": state["step"].float().cpu()} if "step" in state else {}
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                kept[key] = self._new_buffer(parameter, key == "exp_avg")  # type: ignore[attr-defined]
                kept[key].copy_(state[key].float())
        return kept


class EightBit(_Adopting, AdamW8bit):  # type: ignore[misc]
    """Block-wise 8-bit moments (Dettmers et al., 2110.02861)."""


class FourBit(_Adopting, AdamW4bit):  # type: ignore[misc]
    """Block-wise 4-bit moments (Li et al., 2309.01507)."""
