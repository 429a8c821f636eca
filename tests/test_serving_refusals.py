"""What the server refuses, by field and with its reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError
from served import (
    ASK,
    CHAT,
    CONTEXT,
    error_of,
    form,
)
from starlette.testclient import TestClient

from ars_kit_serving.generation import Model
from ars_kit_serving.protocol import ChatRequest, CompletionRequest


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": CONTEXT}, "prompt"),
        ({"prompt": "the loss " * 100}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logprobs": 6}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": form({"type": "nonsense"})}, "response_format"),
        ({"response_format": form({"$ref": "http://x.example/y"})}, "response_format"),
        ({"response_format": form({"not": {"type": "string"}})}, "response_format"),
        (
            {"response_format": form({"type": "string", "minLength": 3, "maxLength": 2})},
            "response_format",
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": None}, "model"),
    ],
)
def test_bad_completions_are_refused_by_field(
    client: TestClient, change: dict[str, Any], param: str
) -> None:
    content = json.dumps({**ASK, **change})
    reply = client.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    error = error_of(reply, 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stop": [""]}, "at least 1 character"),
        ({"stop": ["a"] * 5}, "at most 4 items"),
        ({"stop": 5}, "valid string"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"prompt": []}, "at least 1 item"),
    ],
)
def test_the_reason_is_that_of_the_type_which_was_meant(
    client: TestClient, change: dict[str, Any], words: str
) -> None:
    assert words in error_of(client.post("/v1/completions", json={**ASK, **change}), 400)["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"max_completion_tokens": CONTEXT}, "messages"),
    ],
)
def test_bad_chats_are_refused_by_field(
    client: TestClient, change: dict[str, Any], param: str
) -> None:
    assert (
        error_of(client.post("/v1/chat/completions", json={**CHAT, **change}), 400)["param"]
        == param
    )


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "format": "nope"}, "response_format: Unknown format: nope"),
        ({"type": "string", "pattern": "("}, "regex parse error: error: unclosed group"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no answer can keep to"),
    ],
)
def test_a_schema_is_refused_with_its_reason(
    client: TestClient, schema: dict[str, Any], reason: str
) -> None:
    ask = {**ASK, "stream": True, "response_format": form(schema)}
    error = error_of(client.post("/v1/completions", json=ask), 400)  # before a stream begins
    assert error["code"] == "invalid_schema"
    assert reason in error["message"]


def test_too_long_a_prompt_is_told_both_numbers(client: TestClient) -> None:
    error = error_of(client.post("/v1/completions", json={**ASK, "prompt": [1] * 200}), 400)
    assert error["code"] == "context_length_exceeded"
    assert f"maximum context length is {CONTEXT}" in error["message"]
    assert "208" in error["message"]


def test_a_text_that_cannot_fit_is_not_even_cut_into_tokens(
    client: TestClient, served: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "loss " * 100_000
    served.tokenizer.prompt(text)  # so long it may be where nobody says how many tokens fit

    class Untouched:
        def encode(self, *_: Any, **__: Any) -> None:
            raise AssertionError("it was cut")

    monkeypatch.setattr(served.tokenizer, "_core", Untouched())
    for route, change in (
        ("completions", {"prompt": text}),
        ("completions", {"prompt": ["a" * 200_000]}),
        ("chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        ask = {"model": "tiny", **change}
        error = error_of(client.post(f"/v1/{route}", json=ask), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] in change
    longest = served.tokenizer._longest
    with pytest.raises(AssertionError, match="it was cut"):
        served.tokenizer.prompt("a" * longest * CONTEXT, CONTEXT)


@pytest.mark.parametrize(
    "body", [b"{", b"\xff\xfe{}", b'"text"', b"[]", b"", b"[" * 100_000, b'{"model": NaN}']
)
def test_a_body_that_is_no_request_is_refused(client: TestClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    error_of(client.post("/v1/completions", content=body, headers=headers), 400)


def test_a_body_of_another_type_is_told_which_one_to_send(client: TestClient) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain; charset=utf-8", ""):
        headers = {"content-type": kind}
        reply = client.post("/v1/completions", content=json.dumps(ASK), headers=headers)
        assert "Content-Type: application/json" in error_of(reply, 400)["message"]


@pytest.mark.parametrize("prompt", [["a"] * 5000, [-1] * 5000, [{}] * 5000, [[-1] * 999] * 60])
def test_the_errors_of_a_long_list_are_not_all_listed(prompt: Any) -> None:
    with pytest.raises(ValidationError) as told:
        CompletionRequest.model_validate({"model": "tiny", "prompt": prompt})
    assert told.value.error_count() < 200
    parts = {"messages": [{"role": "user", "content": prompt}]}
    with pytest.raises(ValidationError) as told:
        ChatRequest.model_validate({"model": "tiny", **parts})
    assert told.value.error_count() < 200


def test_unknown_routes_and_models_are_not_found(client: TestClient) -> None:
    for path in ("/v1/files", "/v1/models/"):  # a redirect would lead out of a proxy's TLS
        reply = client.get(path, follow_redirects=False)
        assert f"Unknown request URL: GET {path}" in error_of(reply, 404)["message"]
    assert error_of(client.get("/v1/completions"), 405)["type"] == "invalid_request_error"
    for name in ("d99", "../../etc", "https://x.y/z"):
        reply = client.post("/v1/completions", json={**ASK, "model": name})
        assert error_of(reply, 404)["code"] == "model_not_found"
