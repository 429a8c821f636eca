"""Does a newborn compute what was promised, and do its new and its copied parts learn?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ars_kit.spec import Hint
from ars_kit.testing.cases import windows_of
from ars_kit.testing.newborns import Newborn
from ars_kit.testing.provenance import NEW, Origin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXACT = {torch.float64: 1e-12, torch.float32: 1e-4}
"""Largest change of a logit, against the largest logit, that passes as exact."""

STEPS, RATE = 2, 0.1
ALIKE = 1e-9
"""Two entries whose changes differ by less, against the largest, learn the same."""


def check_exact(newborn: Newborn, child: PreTrainedModel) -> None:
    """Check that a child whose seed says so computes what its parent computes."""
    if newborn.seed.preserves != "exact":
        return
    logits = []
    for model in (newborn.parent, child):
        with torch.no_grad(), norms_in_full(model):
            logits.append(model(input_ids=windows_of(2, 7)).logits)
    before, after = logits
    change, scale = float((after - before).abs().max()), float(before.abs().max())
    bound = EXACT[before.dtype] * max(1.0, scale)
    if not change <= bound:
        name = str(before.dtype).removeprefix("torch.")
        raise newborn.case.broken(
            "what preserves 'exact' must leave every logit as it was",
            f"one changes by {change:.3g} in {name} (allowed: {bound:.3g})",
        )


@contextmanager
def norms_in_full(model: PreTrainedModel) -> Iterator[None]:
    """Let RMSNorm compute in the model's precision; transformers' goes through float32 always."""
    norms: list[Any] = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.forward = _normed(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _normed(norm: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        normed: Tensor = norm.weight * (x * scale)
        return normed

    return forward


def check_alive(newborn: Newborn, child: PreTrainedModel, found: Mapping[str, Origin]) -> None:
    """Check that every new entry has a gradient within two steps, and that copies part.

    Args:
        newborn: in float64.
        child: as it was born; it is trained.
        found: its entries' origins.
    """
    new = any(bool((origin.at == NEW).any()) for origin in found.values())
    places = torch.cat([origin.at.flatten() for origin in found.values()])
    inherited = places[places != NEW]
    if not new and len(inherited.unique()) == len(inherited):
        return
    window = windows_of(4, 11)
    inputs, targets = window[:, :-1], window[:, 1:]
    live: dict[str, Tensor] = dict(child.named_parameters())
    alive = {name: origin.at != NEW for name, origin in found.items()}
    for step in range(STEPS + 1):
        child.zero_grad()
        logits = child(input_ids=inputs).logits
        cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        with torch.no_grad():
            for name, p in live.items():
                assert p.grad is not None  # noqa: S101 -- every parameter is used
                alive[name] |= p.grad != 0
                if step < STEPS:
                    p.sub_(RATE * p.grad)
    unseen = torch.ones(len(live["model.embed_tokens.weight"]), dtype=torch.bool)
    unseen[inputs.unique()] = False
    alive["model.embed_tokens.weight"][unseen] = True
    for name, there in alive.items():
        if not bool(there.all()) and _trains(newborn.seed.hints.get(name, Hint())):
            raise newborn.case.broken(
                "every new entry must have a gradient within two steps",
                f"{int((~there).sum())} of {name} have none",
            )
    _check_parted(newborn, found, live)


def _trains(hint: Hint) -> bool:
    return hint.lr > 0 and hint.frozen_until == 0


def _check_parted(
    newborn: Newborn, found: Mapping[str, Origin], live: Mapping[str, Tensor]
) -> None:
    """Check that no two entries with one origin have moved by the same."""
    names = [n for n in found if _trains(newborn.seed.hints.get(n, Hint()))]
    at = torch.cat([found[n].at.flatten() for n in names])
    coefficient = torch.cat([found[n].coefficient.flatten() for n in names])
    change = torch.cat([(live[n].detach() - newborn.weights[n]).flatten() for n in names])
    # Equal origins side by side, of those equal coefficients, of those like changes.
    order = change.argsort()
    for key in (coefficient, at):
        order = order[key[order].argsort(stable=True)]
    at, coefficient, change = at[order], coefficient[order], change[order]
    largest = float(change.abs().max())
    twins = (at[1:] == at[:-1]) & (at[1:] != NEW) & (coefficient[1:] == coefficient[:-1])
    twins &= (change[1:] - change[:-1]).abs() <= ALIKE * largest
    twins &= change[1:].abs() > ALIKE * largest
    if not bool(twins.any()):
        return
    ends = torch.tensor([found[n].at.numel() for n in names]).cumsum(0)
    where = names[int(torch.searchsorted(ends, order[1:][twins][0], right=True))]
    raise newborn.case.broken(
        "copies of one entry must part within two steps",
        f"{int(twins.sum())} pairs do not, among them in {where}; give them different coefficients",
    )
