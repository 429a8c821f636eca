"""Fixtures of the tests of the server in process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from ars_kit_serving.generation import Model
    from ars_kit_serving.tokenizing import ServedTokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> ServedTokenizer:
    from ars_kit_serving.tokenizing import ServedTokenizer

    return ServedTokenizer(checkpoint)


@pytest.fixture(scope="module")
def served(checkpoint: Path, tokenizer: ServedTokenizer) -> Iterator[Model]:
    from served import model_of, service_of

    from ars_kit_serving.engines.eager import EagerEngine

    model = model_of(EagerEngine(service_of(checkpoint)), tokenizer)
    yield model
    model.scheduler.close()


@pytest.fixture(scope="module")
def client(served: Model) -> TestClient:
    from served import client_of

    return client_of(served)


@pytest.fixture
def saying(tokenizer: ServedTokenizer) -> Iterator[Any]:
    """Return a client of an engine that says a text, token for token."""
    from served import Scripted, client_of, model_of

    models = []

    def make(text: str | list[int], *, queue: int = 8, seconds: float = 30, **more: Any) -> Any:
        lines = tokenizer.prompt(text) if isinstance(text, str) else text
        engine = Scripted(lines, tokenizer.size, **more)
        models.append(model_of(engine, tokenizer, queue=queue))
        return client_of(models[-1], seconds=seconds), engine

    yield make
    for model in models:
        model.scheduler.engine.go.set()  # a Scripted's
        model.scheduler.close()
