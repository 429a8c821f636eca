"""The built-in inheritance strategies, as offers."""

from __future__ import annotations

from ars_kit.spec import InheritanceStrategy, Offer, hookimpl
from ars_kit_plugins.consolidation import Ewc
from ars_kit_plugins.distillation import Distill
from ars_kit_plugins.duplication import Duplicate, Stack
from ars_kit_plugins.lineages import Jump, Progressive, Scratch, Trunk
from ars_kit_plugins.pruning import Prune
from ars_kit_plugins.replay import Replay
from ars_kit_plugins.soups import Soup


@hookimpl
def arskit_strategies() -> list[Offer[InheritanceStrategy]]:
    """Offer the built-in strategies."""
    return [
        Offer("progressive", "each member continues its predecessor exactly, grown", Progressive),
        Offer("scratch", "each member alone from fresh weights: the control", Scratch),
        Offer("jump", "each member is one exact growth from the family's first", Jump),
        Offer("trunk", "a stable trunk grows; each member is a cooled branch of it", Trunk),
        Offer("stack", "deeper by the parent's blocks stacked upon themselves", Stack),
        Offer("duplicate", "deeper by copies of neighbouring blocks", Duplicate),
        Offer("distill", "continues its predecessor and learns from its logits", Distill),
        Offer("ewc", "continues its predecessor and is held near it (EWC)", Ewc),
        Offer("replay", "continues its predecessor, and reads on in the texts it left", Replay),
        Offer("soup", "a chain, and at its end the average of the last of one shape", Soup),
        Offer("prune", "the largest first, each smaller one cut out and taught", Prune),
    ]
