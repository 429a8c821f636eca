"""Limits, keys and origins, and what is left of the server when an engine fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from served import (
    ASK,
    client_of,
    error_of,
)
from starlette.testclient import TestClient

from ars_kit_serving.generation import Model


def test_a_large_body_is_refused_before_it_is_read(client: TestClient) -> None:
    error = error_of(client.post("/v1/completions", content=b"x" * (2 << 20)), 413)
    assert error["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:  # of no announced length
        yield from [b"x" * (1 << 19)] * 3

    error_of(client.post("/v1/completions", content=chunks()), 413)


def test_every_route_but_health_and_the_page_wants_the_key(served: Model) -> None:
    client = client_of(served, key="s3cret", hosts=None)
    for path in ("/health", "/"):
        assert client.get(path).status_code == client.head(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/index.html", "/nowhere"):
        assert error_of(client.get(path), 401)["code"] == "invalid_api_key"
        wrong = {"authorization": "Bearer s3crets"}
        error_of(client.get(path, headers=wrong), 401)
    given = {"authorization": "Bearer s3cret"}
    assert client.get("/v1/models", headers=given).status_code == 200
    for value in ("Basic eDpzM2NyZXQ=", "Basic ///", "Bearer"):  # what a browser would send unasked
        error_of(client.get("/v1/models", headers={"authorization": value}), 401)


def test_other_names_and_other_pages_may_not_ask(served: Model) -> None:
    client = client_of(served, origins=["https://app.example"])
    headers = {"host": "evil.example"}
    assert error_of(client.get("/v1/models", headers=headers), 403)["code"] == "wrong_host"
    headers = {"origin": "https://evil.example"}
    assert error_of(client.get("/v1/models", headers=headers), 403)["code"] == "wrong_origin"
    for mine in ("http://127.0.0.1:8000", "https://app.example"):
        assert client.get("/v1/models", headers={"origin": mine}).status_code == 200


def test_a_browser_page_that_is_allowed_may_ask(served: Model) -> None:
    client = client_of(served, key="k", hosts=None, origins=["https://app.example"])
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    preflight = client.options("/v1/chat/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    refused = client.get("/v1/models", headers={"origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"


def test_a_full_queue_says_when_to_come_again(saying: Any) -> None:
    client, engine = saying("loss", slots=1, queue=1)
    engine.go.clear()
    threads = [
        threading.Thread(target=client.post, args=["/v1/completions"], kwargs={"json": ASK})
        for _ in range(2)
    ]
    scheduler = client.app.state.desk.models["tiny"].scheduler
    for thread in threads:
        thread.start()
    for _ in range(2000):
        if scheduler.count_active() + scheduler.count_waiting() == 2:
            break
        threads[0].join(0.005)
    reply = client.post("/v1/completions", json=ASK)
    assert error_of(reply, 429)["code"] == "queue_full"
    assert reply.headers["retry-after"] == "1"
    engine.go.set()
    for thread in threads:
        thread.join(20)
    assert "arskit_queue_full_total" in client.get("/metrics").text
    assert client.post("/v1/completions", json=ASK).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_given_up(saying: Any, stream: bool) -> None:
    client, engine = saying("loss", seconds=0.15, pause=0.01)
    reply = client.post("/v1/completions", json={**ASK, "max_tokens": 9000, "stream": stream})
    if stream:
        assert json.loads(reply.text.split("data: ")[-1])["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in reply.text
    else:
        assert error_of(reply, 408)["code"] == "deadline_exceeded"
        assert reply.headers["x-should-retry"] == "false"
    assert 'arskit_cancellations_total{model="tiny"} 1.0' in client.get("/metrics").text
    assert engine.steps < 100


def test_the_time_that_a_prompt_takes_to_be_read_counts(
    saying: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, engine = saying("loss", seconds=0.05)
    tokenizer = client.app.state.desk.models["tiny"].tokenizer

    def slow(*_: Any) -> list[int]:
        time.sleep(0.5)
        return [1]

    with monkeypatch.context() as patched:
        patched.setattr(tokenizer, "prompt", slow)
        long = {**ASK, "prompt": "the loss " * 200}  # a short one is read at once
        reply = client.post("/v1/completions", json=long)
        assert error_of(reply, 408)["code"] == "deadline_exceeded"
    assert engine.steps == 0
    assert client.post("/v1/completions", json={**ASK, "max_tokens": 1}).status_code == 200


def test_a_broken_engine_is_an_error_and_the_next_request_is_served(
    saying: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client, engine = saying("loss")
    engine.broken = True
    assert error_of(client.post("/v1/completions", json=ASK), 500)["type"] == "server_error"
    with caplog.at_level("INFO", "ars_kit_serving"):
        reply = client.post("/v1/completions", json={**ASK, "stream": True})
    assert json.loads(reply.text.split("data: ")[-1])["error"]["code"] == "engine_error"
    assert caplog.records[-1].facts["error"] == "engine_error"  # type: ignore[attr-defined] # ours
    metrics = client.get("/metrics").text
    assert 'arskit_failures_total{model="tiny"} 2.0' in metrics
    assert "arskit_cancellations_total{" not in metrics  # nobody left
    engine.broken = False
    assert client.post("/v1/completions", json=ASK).status_code == 200


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_a_failure_and_no_answer(
    saying: Any, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    client, engine = saying("loss")
    monkeypatch.setattr(engine, "_say", lambda _: np.full(engine.vocabulary, value, np.float32))
    for temperature in (0, 1):
        reply = client.post("/v1/completions", json={**ASK, "temperature": temperature})
        assert error_of(reply, 500)["code"] == "engine_error"


class Panic(BaseException):
    """As Rust's libraries raise it."""


def test_an_engine_that_panics_on_a_prompt_serves_the_next(
    saying: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, engine = saying("loss")

    def panic(*_: Any) -> Any:
        raise Panic

    with monkeypatch.context() as patched:
        patched.setattr(engine, "prefill", panic)
        assert error_of(client.post("/v1/completions", json=ASK), 500)["code"] == "engine_error"
    count = 'arskit_time_to_first_token_seconds_count{model="tiny"}'
    assert count not in client.get("/metrics").text  # there was none
    assert client.post("/v1/completions", json=ASK).status_code == 200
    assert f"{count} 1.0" in client.get("/metrics").text


def test_an_engine_that_cannot_let_go_has_ended_for_all(
    saying: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, engine = saying("loss", slots=2, queue=8)

    def stuck(slot: int) -> None:
        raise RuntimeError(slot)

    monkeypatch.setattr(engine, "release", stuck)
    ask = {**ASK, "n": 6}  # some at work, some waiting
    assert client.get("/health").status_code == 200
    for _ in range(2):  # those that were there, and those that come
        assert error_of(client.post("/v1/completions", json=ask), 503)["code"] == "engine_dead"
        assert error_of(client.get("/health"), 503)["code"] == "engine_dead"
    assert 'arskit_active_sequences{model="tiny"} 0.0' in client.get("/metrics").text
