"""The server under what nobody would send on purpose: our own OpenAPI document, fuzzed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans, one_of
from schemathesis import GenerationMode
from served import Scripted, model_of

from ars_kit_serving.app import create_app
from ars_kit_serving.guard import Rules
from ars_kit_serving.tokenizing import ServedTokenizer

CASES = int(os.environ.get("ARSKIT_FUZZ_CASES", "40"))
"""Of each operation; ``make fuzz`` asks for more."""


@pytest.fixture(scope="module")
def api(checkpoint: Path) -> Iterator[Any]:
    tokenizer = ServedTokenizer(checkpoint)
    engine = Scripted(tokenizer.prompt("loss 😀 "), tokenizer.size, slots=8)
    engine.context = 64
    model = model_of(engine, tokenizer)
    app = create_app({"tiny": model}, rules=Rules(hosts=None), seconds=20)
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    model.scheduler.close()


ROUTES = (
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
)


def test_every_route_of_the_document_is_tried(api: Any) -> None:
    found = {(o.ok().method.upper(), o.ok().path) for o in api.get_all_operations()}
    assert found == set(ROUTES)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nothing_that_is_sent_is_an_error_of_the_server(api: Any, method: str, path: str) -> None:
    """Half of what is sent is what the document allows, half is not."""
    operation = api[path][method]
    statuses: Counter[int] = Counter()
    modes = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]

    @given(case=one_of(modes), served=booleans())
    @settings(
        max_examples=CASES if method == "POST" else max(CASES // 10, 5),
        deadline=None,
        database=None,
        phases=[Phase.generate],  # what fails is shown as it was sent
        suppress_health_check=list(HealthCheck),
    )
    def fuzz(case: schemathesis.Case, served: bool) -> None:
        if served and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"  # or hardly any would get past the name
        reply = case.call()
        statuses[reply.status_code] += 1
        assert reply.status_code < 500, (reply.status_code, reply.text, case.body)

    fuzz()
    print(f"{method} {path}: {sum(statuses.values())} cases, {dict(statuses)}")  # noqa: T201 -- the figures
    if method == "POST" and CASES > 1000:
        assert {200, 400, 404} <= set(statuses)
