"""What a plugin package can be begun for: the texts of its module, its test, its use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Kind:
    """The texts of a package that offers one thing; each is a :class:`string.Template`.

    They are filled with ``$name`` (what the user types), ``$package``, ``$distribution`` and
    ``$type`` (the class).

    Attributes:
        noun: what is offered, for sentences.
        shelf: where the host puts it, the part of the hook's name after ``arskit_``.
        usage: a command that uses it.
        module: its source.
        test: its test.
    """

    noun: str
    shelf: Literal["gates", "strategies", "evaluators"]
    usage: str
    module: str
    test: str


GATE = Kind(
    noun="damping gate",
    shelf="gates",
    usage="arskit run --gate $name:steps=20",
    module='''\
"""The damping gate $name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ars_kit.spec import DampingGate, Offer, StepSignal, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class $type:
    """Halve the step size of the first steps.

    Args:
        steps: how many.
    """

    acts_on = "step"

    def __init__(self, *, steps: int = 10) -> None:
        self.steps = steps

    def __call__(self, signal: StepSignal) -> Tensor:
        """Return this step's factor, made on its device without waiting for it."""
        return signal.loss.new_full((), 0.5 if signal.step < self.steps else 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the gate remembers nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""


@hookimpl
def arskit_gates() -> list[Offer[DampingGate]]:
    """Offer the gate."""
    return [Offer("$name", "halve the first steps", $type)]
''',
    test='''\
"""The gate keeps every gate's rules, and does what it says."""

from __future__ import annotations

import pytest
import torch
from ars_kit.damping import DampedOptimizer
from ars_kit.testing import check_gate

from $package import $type


def test_the_gate_keeps_the_rules() -> None:
    check_gate($type)


def test_the_first_step_is_halved() -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    gates = {"$name": $type(steps=1)}
    optimizer = DampedOptimizer(torch.optim.SGD([weight], lr=0.1), gates)
    for _ in range(2):
        weight.grad = torch.ones(())
        optimizer.step(loss=torch.ones(()))
    assert weight.item() == pytest.approx(1 - 0.05 - 0.1)
''',
)

STRATEGY = Kind(
    noun="inheritance strategy",
    shelf="strategies",
    usage="arskit run --strategy $name:rewarm_steps=5 --set family.depth=depth",
    module='''\
"""The inheritance strategy $name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ars_kit.spec import Birth, Block, InheritanceStrategy, Offer, Parent, Seed, hookimpl

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

FAMILIES = ("qwen2", "llama", "qwen3")
FREE = {
    *("num_hidden_layers", "layer_types", "max_window_layers"),  # say how deep it is
    *("_name_or_path", "architectures", "dtype", "transformers_version"),  # say where it is from
}
SILENT = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")


class $type:
    """Each member is its parent with new blocks on top, which do nothing yet.

    Args:
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
    """

    inherits = True

    def __init__(self, *, rewarm_steps: int = 10) -> None:
        self.rewarm_steps = rewarm_steps

    def supports(self, parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
        """Return why the child is not the parent with blocks on top, or None if it is."""
        if child.model_type not in FAMILIES:
            return f"a {child.model_type} is not known here, only {', '.join(FAMILIES)}"
        before, after = parent.to_dict(), child.to_dict()
        keys = sorted((before.keys() | after.keys()) - FREE)
        changed = [key for key in keys if before.get(key) != after.get(key)]
        if changed:
            return f"{changed[0]} changes, and only the depth may"
        depth = parent.num_hidden_layers
        if child.num_hidden_layers < depth:
            return "it has fewer layers than its parent"
        kinds = before.get("layer_types") or []
        if (after.get("layer_types") or [])[:depth] != kinds:
            return "its first layers are of another kind than its parent's"
        return None

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the parent's weights, and silent blocks above them."""
        weights: dict[str, Tensor] = {}
        provenance: dict[str, list[Block]] = {}
        for name, fresh in birth.fresh.items():
            if name in parent.weights:
                whole = tuple((0, n, 1) for n in fresh.shape)
                weights[name] = parent.weights[name].to(fresh, copy=True)
                provenance[name] = [Block(name, whole, whole)]
            else:
                silent = name.endswith(SILENT)
                weights[name] = fresh.new_zeros(fresh.shape) if silent else fresh.clone()
                provenance[name] = []
        return Seed(
            weights,
            provenance,
            preserves="exact",
            opt_state="derive",
            rewarm_steps=self.rewarm_steps,
            note="blocks on top",
        )


@hookimpl
def arskit_strategies() -> list[Offer[InheritanceStrategy]]:
    """Offer the strategy."""
    return [Offer("$name", "each member gets new blocks on top", $type)]
''',
    test='''\
"""The strategy keeps every strategy's rules, and does what it says."""

from __future__ import annotations

from ars_kit.shapes import embedded_config
from ars_kit.testing import check_strategy

from $package import $type


def test_the_strategy_keeps_the_rules() -> None:
    check_strategy($type)


def test_a_wider_child_is_refused_in_words() -> None:
    parent, child = (embedded_config(d, vocab_size=300, context=32) for d in (4, 18))
    assert $type().supports(parent, child) == "hidden_size changes, and only the depth may"
''',
)

KINDS: Mapping[str, Kind] = {"gate": GATE, "strategy": STRATEGY}
