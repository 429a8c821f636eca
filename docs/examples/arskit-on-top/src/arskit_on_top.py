"""The inheritance strategy on-top."""

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


class OnTop:
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
    return [Offer("on-top", "each member gets new blocks on top", OnTop)]
