"""The callback on long instability, in a loop of one's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ars_kit.instability import Instability, Watch
from ars_kit_plugins.ars import ARS

BAD, STEPS, EVERY = 100, 200, 10


def problem() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.ones(4))
    return weight, torch.optim.SGD([weight], lr=0.05)


def batch(place: int) -> torch.Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(place)) * 0.01


def run(*, remedy: bool, every: int = EVERY) -> tuple[list[Instability], torch.Tensor, int]:
    """Train; a bad batch throws the weight off for long. Go back, past the batches, if told to."""
    weight, base = problem()
    found: list[Instability] = []
    optimizer = ARS(base, on_instability=found.append, watch=Watch(steps=32), norm_memory=False)
    saved: dict[int, Any] = {}
    step = passed_over = 0
    while step < STEPS:
        if step % EVERY == 0:
            saved[step] = copy.deepcopy((weight.data, optimizer.state_dict()))
        place = step + passed_over
        optimizer.zero_grad()
        loss = (weight - batch(place)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
        if place == BAD:
            weight.data.fill_(30.0)
        step += 1
        if step % every == 0:
            optimizer.drain()
        if found and remedy and not passed_over:
            back = max(s for s in saved if s < found[0].since)
            passed_over = found[0].noticed + 1 - back
            weight.data.copy_(saved[back][0])
            optimizer.load_state_dict(saved[back][1])
            step = back
    return found, weight.detach(), passed_over


def test_a_loop_goes_back_and_leaves_the_batches_out() -> None:
    found, weight, passed_over = run(remedy=True)
    assert len(found) == 1
    assert found[0].since <= BAD < found[0].noticed
    assert passed_over > found[0].noticed - BAD
    assert weight.abs().max() < 0.1


def test_without_a_remedy_it_is_told_and_goes_on() -> None:
    found, weight, _ = run(remedy=False)
    assert found
    assert weight.abs().max() > 1


def test_it_is_told_the_same_however_often_the_loop_drains() -> None:
    assert run(remedy=False)[0][0] == run(remedy=False, every=1)[0][0]


def test_the_watch_resumes_with_the_optimizer(tmp_path: Any) -> None:
    losses = [1.0] * 60 + [9.0] * 100
    found: list[list[Instability]] = [[], []]
    weight, base = problem()
    optimizer = ARS(base, on_instability=found[0].append)
    for step, loss in enumerate(losses):
        weight.grad = torch.zeros(4)
        optimizer.step(loss=loss)
        optimizer.drain()
        if step == 90:
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer = ARS(problem()[1], on_instability=found[1].append)
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for loss in losses[91:]:
        optimizer.param_groups[0]["params"][0].grad = torch.zeros(4)
        optimizer.step(loss=loss)
        optimizer.drain()
    assert found[0] == found[1]
    assert len(found[0]) == 1


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_it_may_be_asked_for_later_or_no_more(*, saved: bool, loaded: bool) -> None:
    first = ARS(problem()[1], on_instability=print if saved else None)
    second = ARS(problem()[1], on_instability=print if loaded else None)
    state = first.state_dict()
    assert ("watch" in state["damping"]) == saved
    second.load_state_dict(state)
