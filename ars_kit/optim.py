"""From the chosen names to an optimizer: a base, the gates around it, each member's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ars_kit.errors import ConfigError, PluginError
from ars_kit.host import Host
from ars_kit.schema import Choice, did_you_mean, signature_of
from ars_kit.settings import OptimizerSettings

if TYPE_CHECKING:
    from torch import Tensor

    from ars_kit.damping import DampedOptimizer
    from ars_kit.memory import Recipe
    from ars_kit.spec import DampingGate

GUARD = Choice("guard")
"""The one gate that every run has unless it is left out: no NaN reaches the weights."""

LOSS_ONLY = "loss_only"
"""The setting of a wrapper that can do without gradients."""

PER_MEMBER = ("entropy_threshold", "surprise_damping")
"""Wrapper settings that move linearly from the first member to the last."""


def check_optimizer(host: Host, settings: OptimizerSettings) -> None:
    """Refuse what could not be built, before anything is trained.

    Raises:
        PluginError: a name nobody offers.
        ConfigError: a setting that does not fit, or a gate left out that is not there.
    """
    import torch  # noqa: PLC0415 -- slow to import

    check_names(host, settings)
    build_gates(host, settings, position=0.0)
    # Made once over a few numbers: what it refuses is said before anything is trained.
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(shape))], "names": [role], "role": role,
         "lr": 1e-3, "weight_decay": 0.0}
        for role, shape in (("matrix", (2, 2)), ("embedding", (2, 2)), ("vector", (2,)))
    ]  # fmt: skip
    make_base(host, settings, groups)


def check_names(host: Host, settings: OptimizerSettings) -> None:
    """Refuse names that nobody offers and settings that do not fit, without making anything.

    Raises:
        PluginError: a name nobody offers.
        ConfigError: a setting that does not fit.
    """
    wrapper, base = _wrapper_and_base(host, settings)
    if wrapper is not None:
        host.check("wrappers", wrapper)
    host.check("optimizers", base, extra=("lr",))
    for gate in settings.gates:
        host.check("gates", gate)


def build_gates(
    host: Host, settings: OptimizerSettings, *, position: float
) -> dict[str, DampingGate]:
    """Make the gates of one member, in the order they are asked.

    A wrapper's own gates come first, then those added with ``--gate``; an added gate takes the
    place of one of the same name.

    Args:
        host: the installed plugins.
        settings: the run's.
        position: 0 for the family's first member, 1 for its last.

    Raises:
        ConfigError: a gate that is to be left out is not there.
        PluginError: a gate has a name that history.jsonl calls something else by.
    """
    from ars_kit.telemetry import TAKEN  # noqa: PLC0415 -- torch is slow to import

    wrapper, _ = _wrapper_and_base(host, settings)
    if wrapper is None:
        stack: dict[str, DampingGate] = {GUARD.name: host.make("gates", GUARD)}
    else:
        stack = dict(host.make("wrappers", _placed(host, wrapper, settings, position)))
    for choice in settings.gates:
        stack[choice.name] = host.make("gates", choice)
    for name in settings.without:
        if name not in stack:
            has = ", ".join(stack) or "none"
            raise ConfigError(
                f"no damping gate {name!r} to leave out{did_you_mean(name, stack)}. "
                f"This optimizer has: {has}"
            )
        del stack[name]
    if taken := sorted(TAKEN & stack.keys()):
        owner = _owners(host, settings, stack)[taken[0]]
        raise PluginError(
            f"damping gate {taken[0]!r} of plugin {owner} needs another name: {taken[0]!r} is "
            "something else in history.jsonl"
        )
    return stack


def build_optimizer(
    host: Host,
    settings: OptimizerSettings,
    groups: Sequence[dict[str, Any]],
    *,
    lr: float,
    position: float,
    reduce: Callable[[Tensor], Tensor] | None = None,
    in_backward: bool = False,
) -> DampedOptimizer:
    """Make the base optimizer over ``groups`` and wrap it in its gates.

    Args:
        host: the installed plugins.
        settings: the run's.
        groups: as :func:`ars_kit.models.parameter_groups` returns them.
        lr: peak learning rate.
        position: 0 for the family's first member, 1 for its last.
        reduce: means a 0-d loss over all ranks, so that they all damp alike.
        in_backward: step within the backward pass, of one process.
    """
    from ars_kit.backward import InBackward  # noqa: PLC0415 -- torch is slow to import
    from ars_kit.damping import DampedOptimizer  # noqa: PLC0415 -- torch is slow to import
    from ars_kit.undamped import Undamped  # noqa: PLC0415 -- torch is slow to import

    _, base = _wrapper_and_base(host, settings)
    optimizer = host.make("optimizers", base, list(groups), lr=lr)
    gates = build_gates(host, settings, position=position)
    owners = _owners(host, settings, gates)
    if in_backward:
        return InBackward(optimizer, gates, owners=owners)
    kind = DampedOptimizer if gates else Undamped
    return kind(optimizer, gates, reduce=reduce, owners=owners)


def base_name(host: Host, settings: OptimizerSettings) -> str:
    """Return the base optimizer's name."""
    return _wrapper_and_base(host, settings)[1].name


def make_base(host: Host, settings: OptimizerSettings, groups: list[dict[str, Any]]) -> Any:
    """Return the bare base optimizer, for trials."""
    _, base = _wrapper_and_base(host, settings)
    return host.make("optimizers", base, groups, lr=1e-3)


def under_recipe(host: Host, settings: OptimizerSettings, recipe: Recipe) -> OptimizerSettings:
    """Return the optimizer with the base that a memory recipe puts in the place of its own.

    A wrapper that can judge the loss alone is told to where no gradients will be there to look at.

    Raises:
        ConfigError: the base and the recipe contradict each other.
    """
    wrapper, base = _wrapper_and_base(host, settings)
    if wrapper is None:
        return replace(settings, name=recipe.base(base))
    if recipe.in_backward and LOSS_ONLY in signature_of(
        host.listing("wrappers", wrapper.name).offer.make
    ):
        wrapper = Choice(wrapper.name, {LOSS_ONLY: True, **wrapper.settings})
    return replace(settings, name=wrapper, base=recipe.base(base))


def check_loss_only(host: Host, settings: OptimizerSettings, recipe: Recipe) -> None:
    """Refuse gates that look at gradients, for a recipe under which these never stand together.

    Args:
        host: the installed plugins.
        settings: as :func:`under_recipe` returns them.
        recipe: the one.

    Raises:
        ConfigError: there is such a gate.
        PluginError: a gate fails in the trial.
    """
    from ars_kit.backward import looks_at_gradients  # noqa: PLC0415 -- torch is slow to import

    gates = build_gates(host, settings, position=0.0)
    owners = _owners(host, settings, gates)
    for name, gate in gates.items():
        try:
            looks = looks_at_gradients(gate)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"damping gate {name!r} of plugin {owners[name]} failed in a trial: {error!r}"
            ) from error
        if looks:
            raise ConfigError(
                f"damping gate {name!r} looks at all gradients together, which never stand in "
                f"memory under --memory {recipe.name}: each parameter is stepped as its gradient "
                f"arrives; leave it out (--no-gate {name}), or use --memory lean"
            )


def _owners(host: Host, settings: OptimizerSettings, gates: Iterable[str]) -> dict[str | None, str]:
    """Name the plugin that each gate, and under None the base optimizer, comes from."""
    wrapper, base = _wrapper_and_base(host, settings)
    own = (
        host.listing("gates", GUARD.name)
        if wrapper is None
        else host.listing("wrappers", wrapper.name)
    )
    added = {choice.name: host.listing("gates", choice.name) for choice in settings.gates}
    found: dict[str | None, str] = {name: str(added.get(name, own).plugin) for name in gates}
    return found | {None: str(host.listing("optimizers", base.name).plugin)}


def _wrapper_and_base(host: Host, settings: OptimizerSettings) -> tuple[Choice | None, Choice]:
    name = settings.name.name
    if name in host.shelves["wrappers"]:
        return settings.name, settings.base
    if name in host.shelves["optimizers"]:
        return None, settings.name
    names = sorted({*host.names("wrappers"), *host.names("optimizers")})
    aside = "".join(f". {line}" for line in host.complaints())
    raise PluginError(
        f"no optimizer named {name!r}{did_you_mean(name, names)}. "
        f"Installed: {', '.join(names)}{aside}"
    )


def _placed(host: Host, wrapper: Choice, settings: OptimizerSettings, position: float) -> Choice:
    """Add this member's share of the per-member settings that the wrapper knows."""
    known = signature_of(host.listing("wrappers", wrapper.name).offer.make)
    placed = {}
    for key in PER_MEMBER:
        if key in known:
            first, last = getattr(settings, key)
            placed[key] = first + (last - first) * position
    return Choice(wrapper.name, {**placed, **wrapper.settings})
