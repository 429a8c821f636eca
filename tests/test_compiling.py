"""``--compile``: the layers alone, each shape once in a family, and the loss as without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ars_kit.compiling import compiled, eagerly, layers_of
from ars_kit.feed import Feed
from ars_kit.models import build
from ars_kit.shapes import embedded_config
from ars_kit.tokens import Batches

TOKENS = torch.arange(16).reshape(2, 8)


@pytest.fixture
def graphs() -> Iterator[Any]:
    """How many graphs were compiled so far."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def member(depth: int, width: int) -> Any:
    config = embedded_config(
        depth, vocab_size=300, context=8, aspect=1.6, head_dim=8, sizes={"hidden_size": width}
    )
    return build(config, seed=0).train()


def loss_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits.square().mean()
    return found


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_an_heir_compiles_no_layer_that_its_parent_compiled(graphs: Any) -> None:
    """Three depths of one width are one graph; one width more is one graph more."""
    seen = []
    for depth, width in ((2, 8), (3, 8), (5, 8), (5, 16)):
        model = member(depth, width)
        plain = loss_of(model)
        with compiled(model, backend="eager"):
            loss = loss_of(model)
            loss.backward()
            with eagerly(wanted=True), torch.no_grad():  # judging compiles nothing of its own
                loss_of(model.eval())
        torch.testing.assert_close(loss, plain)
        seen.append(graphs())
    assert seen == [1, 1, 1, 2]


def test_layers_are_as_they_were_afterwards() -> None:
    model = member(2, 8)
    assert layers_of(model) == list(model.model.layers)
    with compiled(model, backend="eager"):
        assert all("forward" in vars(layer) for layer in model.model.layers)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_nested_lists_are_compiled_from_outside() -> None:
    experts = [nn.ModuleList([nn.Linear(1, 1)] * 2) for _ in range(3)]
    blocks = nn.ModuleList([nn.Sequential(e) for e in experts])
    assert layers_of(nn.ModuleDict({"blocks": blocks, "head": nn.Linear(1, 1)})) == list(blocks)


def test_a_feed_hands_over_what_the_batches_are() -> None:
    batches = Batches(np.arange(200, dtype=np.uint16), sequence_length=8, batch_size=4, seed=0)
    feed = Feed(batches, 2, torch.device("cpu"))
    for place in (0, 1, 5):
        feed.prepare(place + 1)
        found = torch.cat([window for window, _ in feed.take(place)]).numpy()
        assert np.array_equal(found, batches.batch(place))
