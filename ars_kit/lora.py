"""Which of a member's parameters train: all, or low-rank adapters (Hu et al., 2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ars_kit.errors import ConfigError
from ars_kit.schema import Choice, bind, did_you_mean

WHOLE = Choice("all")
"""Every parameter trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Adapters beside frozen weights: a linear layer W computes W x + alpha / r * B (A x).

    Args:
        r: rank, the rows of A and columns of B.
        alpha: the adapters' weight is alpha / r.
        dropout: share of an adapter's inputs that are left out of a step.
        targets: names of the linear layers, such as q_proj,v_proj; without any, all but the head.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no adapter can have.

        Raises:
            ConfigError: a value is out of its range.
        """
        if self.r < 1:
            raise ConfigError(f"lora: r must be 1 or more, not {self.r}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora: alpha must be greater than 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora: dropout must lie in [0, 1), not {self.dropout}")


def parse_trainable(choice: Choice) -> Lora | None:
    """Return the adapters that ``train.trainable`` asks for; None where all parameters train.

    Raises:
        ConfigError: it asks for something else.
    """
    known = {"all": None, "lora": Lora}
    if choice.name not in known:
        raise ConfigError(
            f"train.trainable must be all or lora:key=value, not {choice.name!r}"
            f"{did_you_mean(choice.name, known)}"
        )
    if choice.name == "all":
        if choice.settings:
            raise ConfigError("train.trainable: 'all' has no settings")
        return None
    return Lora(**bind("'lora'", Lora, choice.settings))
