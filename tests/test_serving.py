"""The OpenAI surface in process: what clients may ask, and what they get."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from served import (
    ASK,
    CHAT,
    CONTEXT,
    HELLO,
    error_of,
    events,
)
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from ars_kit_serving.generation import Model
from ars_kit_serving.tokenizing import DEFAULT_TEMPLATE, PromptError, ServedTokenizer


def test_models_are_listed_and_found_by_name(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", CONTEXT)
    assert client.get("/v1/models/tiny").json() == card
    assert error_of(client.get("/v1/models/d99"), 404)["code"] == "model_not_found"


def test_a_completion_is_what_transformers_generates(
    client: TestClient, checkpoint: Path, tokenizer: ServedTokenizer
) -> None:
    made = Completion.model_validate(client.post("/v1/completions", json=ASK).json())
    prompt = tokenizer.prompt("the loss")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0]
    assert made.choices[0].text == tokenizer.decode(wanted[len(prompt) :].tolist())
    assert made.id.startswith("cmpl-")
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(prompt), 8)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole_in_pieces(client: TestClient, n: int) -> None:
    ask = {**ASK, "n": n, "seed": 5, "temperature": 1, "prompt": ["the", "gate grows"]}
    whole = client.post("/v1/completions", json=ask).json()
    streamed = client.post(
        "/v1/completions", json={**ask, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    chunks = events(streamed.text)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    *chunks, last = chunks
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(c["usage"] is None for c in chunks)
    texts = [""] * (2 * n)
    finishes: list[Any] = [None] * (2 * n)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert finishes[choice["index"]] is None
        texts[choice["index"]] += choice["text"]
        finishes[choice["index"]] = choice["finish_reason"]
    assert texts == [c["text"] for c in whole["choices"]]
    assert finishes == [c["finish_reason"] for c in whole["choices"]]
    assert len(set(texts)) == 2 * n


def test_a_chat_stream_begins_with_the_role_and_ends_with_a_reason(client: TestClient) -> None:
    whole = ChatCompletion.model_validate(client.post("/v1/chat/completions", json=CHAT).json())
    raw = events(client.post("/v1/chat/completions", json={**CHAT, "stream": True}).text)
    chunks = [ChatCompletionChunk.model_validate(c) for c in raw]
    assert chunks[0].id.startswith("chatcmpl-")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(c.choices[0].delta.role is None for c in chunks[1:])
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    assert all("usage" not in c for c in raw)
    counted = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    raw = events(client.post("/v1/chat/completions", json=counted).text)
    assert [c["usage"] for c in raw] == [None] * len(chunks) + [whole.to_dict()["usage"]]


def test_the_default_template_is_one_line_a_message(
    client: TestClient, tokenizer: ServedTokenizer
) -> None:
    text = client.post(
        "/v1/completions", json={**ASK, "prompt": "user: größer\nassistant:"}
    ).json()["choices"][0]["text"]
    parts = [{"type": "text", "text": "grö"}, {"type": "text", "text": "ßer"}]
    for content in ("größer", parts):
        ask = {**CHAT, "messages": [{"role": "user", "content": content}]}
        message = client.post("/v1/chat/completions", json=ask).json()["choices"][0]["message"]
        assert message["content"] == text
    assert "{% if add_generation_prompt %}assistant:" in DEFAULT_TEMPLATE


def test_of_several_templates_a_chat_takes_the_default(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "named")
    own = AutoTokenizer.from_pretrained(checkpoint)
    own.chat_template = {"default": "{{ messages[0]['content'] }}!", "tool_use": "x"}
    own.save_pretrained(tmp_path / "named")
    named = ServedTokenizer(tmp_path / "named")
    assert named.decode(named.chat(HELLO)) == "größer!"
    own.chat_template = {"rag": "x", "tool_use": "x"}
    own.save_pretrained(tmp_path / "lacking")
    with pytest.raises(PromptError, match="no default"):
        ServedTokenizer(tmp_path / "lacking").chat(HELLO)


def test_a_seed_repeats_and_another_does_not(client: TestClient) -> None:
    def ask(seed: int) -> str:
        body = {**ASK, "temperature": 1.5, "seed": seed, "max_tokens": 20}
        text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        return text

    assert ask(1) == ask(1) != ask(2)


def test_the_least_temperature_and_top_p_there_are_take_the_most_likely_token(
    client: TestClient,
) -> None:
    texts = {
        client.post("/v1/completions", json={**ASK, **how}).json()["choices"][0]["text"]
        for how in (
            *({"temperature": t} for t in (0, 5e-324, 1e-9)),
            {"temperature": 2, "top_p": 0},
        )
    }
    assert len(texts) == 1


def test_logprobs_are_those_of_the_model(
    client: TestClient, checkpoint: Path, tokenizer: ServedTokenizer
) -> None:
    ask = {**CHAT, "logprobs": True, "top_logprobs": 3}
    made = ChatCompletion.model_validate(client.post("/v1/chat/completions", json=ask).json())
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.chat(HELLO)])).logits[0, -1]
    wanted = logits.log_softmax(-1).topk(3)
    first = logprobs.content[0]
    assert first.logprob == pytest.approx(wanted.values[0].item(), abs=1e-4)
    assert [t.logprob for t in first.top_logprobs] == pytest.approx(
        wanted.values.tolist(), abs=1e-4
    )
    assert first.bytes == list(tokenizer.token_bytes(int(wanted.indices[0])))
    legacy = client.post("/v1/completions", json={**ASK, "logprobs": 2}).json()["choices"][0]
    assert {len(legacy["logprobs"][k]) for k in legacy["logprobs"]} == {8}
    assert all(len(top) == 2 for top in legacy["logprobs"]["top_logprobs"])
    ask = {**ASK, "logprobs": 0, "temperature": 2, "seed": 1}
    told = client.post("/v1/completions", json=ask).json()["choices"][0]["logprobs"]
    drawn = zip(told["tokens"], told["token_logprobs"], strict=True)
    assert told["top_logprobs"] == [{token: logprob} for token, logprob in drawn]


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_is_said_to_be_where_its_text_is(
    saying: Any, tokenizer: ServedTokenizer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.size)}
    lost = [ids[b"\xff"], 0, ids[b"\xf0"]]  # 0 is a special token, which is not shown
    tokens = [*tokenizer.prompt("größer 😀 naïve"), *lost, *tokenizer.prompt("€ am Ende")]
    client, _ = saying(tokens)
    monkeypatch.setattr(client.app.state.desk.models["tiny"].tokenizer, "ends", frozenset())
    ask = {**ASK, "max_tokens": len(tokens), "logprobs": 0, "stream": stream}
    reply = client.post("/v1/completions", json=ask)
    choices = [c["choices"][0] for c in (events(reply.text) if stream else [reply.json()])]
    text = "".join(choice["text"] for choice in choices)
    assert text == "größer 😀 naïve\ufffd\ufffd€ am Ende"
    sizes = [1 if character == "\ufffd" else len(character.encode()) for character in text]
    ends = np.cumsum(sizes)
    begun, wanted = 0, []
    for token in tokens:
        wanted.append(int((ends <= begun).sum()))
        begun += len(tokenizer.token_bytes(token)) * (token != 0)
    found = [place for choice in choices for place in choice["logprobs"]["text_offset"]]
    assert found == wanted


def test_a_bias_decides_and_a_penalty_forbids_repeating(
    client: TestClient, tokenizer: ServedTokenizer
) -> None:
    token = tokenizer.prompt("g")[0]
    ask = {**ASK, "logit_bias": {str(token): 100}}
    assert client.post("/v1/completions", json=ask).json()["choices"][0]["text"] == "g" * 8
    ask |= {"logit_bias": {str(token): 3.9}, "presence_penalty": 2, "frequency_penalty": 2}
    text = client.post("/v1/completions", json=ask).json()["choices"][0]["text"]
    assert text != "g" * 8


def test_prompts_may_be_text_or_tokens(client: TestClient, tokenizer: ServedTokenizer) -> None:
    tokens = tokenizer.prompt("the loss")
    forms = ("the loss", ["the loss"], tokens, [tokens])
    made = [client.post("/v1/completions", json={**ASK, "prompt": form}).json() for form in forms]
    assert all(m["choices"] == made[0]["choices"] for m in made)


@pytest.mark.parametrize("prompt", ["", None, [0]])
def test_an_empty_prompt_is_the_beginning_of_a_text(client: TestClient, prompt: Any) -> None:
    made = client.post("/v1/completions", json={**ASK, "prompt": prompt}).json()
    begun = client.post("/v1/completions", json={**ASK, "prompt": [0]}).json()
    assert made["choices"] == begun["choices"]
    assert made["usage"]["prompt_tokens"] == 1


def test_many_at_once_get_what_each_gets_alone(served: Model, client: TestClient) -> None:
    asks = [{**ASK, "prompt": "the gate" * k, "max_tokens": 12 + k} for k in range(1, 5)]
    alone = [client.post("/v1/completions", json=a).json()["choices"][0]["text"] for a in asks]
    together = client.post(
        "/v1/completions", json={**ASK, "prompt": [a["prompt"] for a in asks], "max_tokens": 16}
    ).json()["choices"]
    for single, choice in zip(alone, together, strict=True):
        assert single.startswith(choice["text"][:8])
        assert choice["text"].startswith(single[:8])
    assert served.scheduler.active == {}


def test_unknown_fields_are_tolerated(client: TestClient) -> None:
    assert client.post("/v1/completions", json={**ASK, "user": "x", "fancy": 1}).status_code == 200


def test_logs_are_one_line_a_request_whatever_a_client_sends(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    from ars_kit_serving.logs import JsonLines

    with caplog.at_level("INFO", "ars_kit_serving"):
        client.get("/v1/x%0A%7B%22level%22%3A%22fake%22%7D", headers={"x-request-id": "mine-1"})
        client.get("/health", headers={"x-request-id": "a b"})
        client.post("/v1/completions", json=ASK)
    lines = [JsonLines().format(record) for record in caplog.records]
    assert all("\n" not in line and line.isascii() for line in lines)
    first, second, third = (json.loads(line) for line in lines)
    assert (first["id"], first["status"], first["level"]) == ("mine-1", 404, "info")
    assert first["path"] == '/v1/x\n{"level":"fake"}'
    assert second["id"] != "a b"
    assert (third["model"], third["completion_tokens"]) == ("tiny", 8)


def test_counters_tell_of_tokens_and_waiting(client: TestClient) -> None:
    client.post("/v1/completions", json=ASK)
    text = client.get("/metrics").text
    for name in (
        'arskit_generated_tokens_total{model="tiny"}',
        'arskit_time_to_first_token_seconds_count{model="tiny"}',
        'arskit_tokens_per_second_count{model="tiny"}',
        'arskit_waiting_sequences{model="tiny"} 0.0',
        'arskit_active_sequences{model="tiny"} 0.0',
    ):
        assert name in text


def test_a_short_prompt_waits_for_no_thread(
    served: Model, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hop(*_: Any, **__: Any) -> None:
        raise AssertionError("handed to a thread")

    client.post("/v1/completions", json=ASK)
    monkeypatch.setattr("anyio.to_thread.run_sync", hop)
    monkeypatch.setattr("asyncio.to_thread", hop)
    assert client.post("/v1/completions", json=ASK).status_code == 200


def test_the_end_of_a_stream_goes_out_with_its_last_text(saying: Any) -> None:
    asked = {**ASK, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 1}
    client, _ = saying("a")
    inner, parts = client.app, []

    async def listening(scope: Any, receive: Any, send: Any) -> None:
        async def heard(message: Any) -> None:
            parts.append(message.get("body", b""))
            await send(message)

        await inner(scope, receive, heard)

    TestClient(listening, base_url="http://127.0.0.1:8000").post("/v1/completions", json=asked)
    (part,) = filter(None, parts)
    assert part.count(b"data: ") == 3  # the text, the usage, the end
