"""The OpenAI surface in process: what clients may ask, and what they get."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError
from served import CONTEXT, Scripted, model_of
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ars_kit.spec import Service
from ars_kit_serving.app import create_app
from ars_kit_serving.engines.eager import EagerEngine
from ars_kit_serving.generation import Model
from ars_kit_serving.guard import Rules
from ars_kit_serving.protocol import ChatRequest, CompletionRequest
from ars_kit_serving.text import TextStream
from ars_kit_serving.tokenizing import DEFAULT_TEMPLATE, PromptError, ServedTokenizer

ASK = {"model": "tiny", "prompt": "the loss", "max_tokens": 8, "temperature": 0}
HELLO = [{"role": "user", "content": "größer"}]
CHAT = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def service_of(path: Path, **more: Any) -> Service:
    fields = {"context": None, "slots": 3, "say": print, "cache": path.parent / "cache", **more}
    return Service(name="tiny", path=path, digest="0", **fields)


def client_of(model: Model, *, seconds: float = 30, **rules: Any) -> TestClient:
    app = create_app({model.name: model}, rules=Rules(**rules), seconds=seconds)
    return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> ServedTokenizer:
    return ServedTokenizer(checkpoint)


@pytest.fixture(scope="module")
def served(checkpoint: Path, tokenizer: ServedTokenizer) -> Iterator[Model]:
    model = model_of(EagerEngine(service_of(checkpoint)), tokenizer)
    yield model
    model.scheduler.close()


@pytest.fixture(scope="module")
def client(served: Model) -> TestClient:
    return client_of(served)


@pytest.fixture
def saying(tokenizer: ServedTokenizer) -> Iterator[Any]:
    """Return a client of an engine that says a text, token for token."""
    models = []

    def make(text: str | list[int], *, queue: int = 8, seconds: float = 30, **more: Any) -> Any:
        lines = tokenizer.prompt(text) if isinstance(text, str) else text
        engine = Scripted(lines, tokenizer.size, **more)
        models.append(model_of(engine, tokenizer, queue=queue))
        return client_of(models[-1], seconds=seconds), engine

    yield make
    for model in models:
        model.scheduler.engine.go.set()  # type: ignore[attr-defined] # a Scripted's
        model.scheduler.close()


def events(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    return found


# --- what is answered ------------------------------------------------------------------------


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


# --- text ------------------------------------------------------------------------------------


def test_no_character_is_split(saying: Any) -> None:
    text = "Straße, größer: 😀🇩🇪 naïve"
    client, _ = saying(text, slots=1)
    ask = {**ASK, "max_tokens": 200, "stream": True, "stop": "naïve"}
    pieces = [
        c["choices"][0]["text"] for c in events(client.post("/v1/completions", json=ask).text)
    ]
    assert "".join(pieces) == text.removesuffix("naïve")
    assert len(pieces) >= 9
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_shown_as_such(
    saying: Any, tokenizer: ServedTokenizer
) -> None:
    tokens = tokenizer.prompt("a😀")
    client, _ = saying(tokens)
    for stream in (False, True):
        ask = {**ASK, "max_tokens": len(tokens) - 1, "stream": stream}
        reply = client.post("/v1/completions", json=ask)
        found = events(reply.text) if stream else [reply.json()]
        assert "".join(c["choices"][0]["text"] for c in found) == "a\ufffd"


@pytest.mark.parametrize("spelled", [b"\xff", b"\x80", b"\xf0", b"\xf0\x9f\x98\x80\xffa"])
def test_bytes_that_are_no_text_come_as_such_and_are_not_read_over_and_over(
    tokenizer: ServedTokenizer, spelled: bytes
) -> None:
    ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.size)}
    known = [ids[bytes([byte])] for byte in spelled]
    tokens = [*random.Random(0).choices(known, k=600), tokenizer.prompt("a")[0]]
    read: list[int] = []

    def decode(part: Sequence[int]) -> str:
        read.append(len(part))
        return tokenizer.decode(part)

    stream = TextStream(decode)
    pieces = [stream.push(token) for token in tokens] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert sum(map(bool, pieces)) > 30
    assert max(read) < 50


def test_special_tokens_without_end_cost_nothing_and_take_no_space_along() -> None:
    longest = 0

    def decode(part: Sequence[int]) -> str:  # as SentencePiece's: the first space is left out
        nonlocal longest
        longest = max(longest, len(part))
        return "".join(" a" for token in part if token).removeprefix(" ")

    stream = TextStream(decode)
    tokens = [1, 1, *[0] * 500, 1, *[0] * 15, 1]
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == decode([1, 1, 1, 1]) == "a a a a"
    assert longest < 50


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (["s 12"], "los"),  # across tokens
        (["zzz", "2"], "loss 1"),
        (["123"], "loss "),
        ("loss", ""),
        (["loss 12x"], "loss 123loss 1"),  # begins, but does not come
    ],
)
def test_a_stop_string_is_no_part_of_the_text(
    saying: Any, stop: Any, wanted: str, stream: bool
) -> None:
    client, _ = saying("loss 123")
    ask = {**ASK, "max_tokens": 11, "stop": stop, "stream": stream}
    reply = client.post("/v1/completions", json=ask)
    found = events(reply.text) if stream else [reply.json()]
    text = "".join(c["choices"][0]["text"] for c in found)
    finish = found[-1]["choices"][0]["finish_reason"]
    if finish == "stop":
        assert text == wanted
    else:
        assert text.startswith(wanted)
    assert (finish == "stop") == (stop != ["loss 12x"])


def test_the_end_of_text_ends_an_answer(saying: Any, tokenizer: ServedTokenizer) -> None:
    tokens = [*tokenizer.prompt("gate"), 0]
    client, _ = saying(tokens)
    made = client.post("/v1/completions", json={**ASK, "max_tokens": 100}).json()
    assert made["choices"][0]["text"] == "gate"
    assert made["choices"][0]["finish_reason"] == "stop"
    assert made["usage"]["completion_tokens"] == len(tokens)


@pytest.mark.parametrize(("ends", "known"), [([0, 5], {0, 5}), (6, {0, 6}), (50_256, {0})])
def test_the_ends_of_a_configuration_are_known_where_none_is_for_generation(
    checkpoint: Path, tmp_path: Path, ends: Any, known: set[int]
) -> None:
    path = shutil.copytree(checkpoint, tmp_path / "plain")
    assert set(ServedTokenizer(path).ends) == {0}
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))
    assert set(ServedTokenizer(path).ends) == {0}  # what is for generation goes before it
    (path / "generation_config.json").unlink()
    assert set(ServedTokenizer(path).ends) == known


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_begins_with_the_space_that_parts_it_from_its_prompt(
    tmp_path: Path, stream: bool
) -> None:
    words = {"</s>": 0, "\u2581one": 1, "\u2581two": 2, "\u2581three": 3, "?": 4}
    core = Tokenizer(WordLevel(words, unk_token="?"))
    core.pre_tokenizer, core.decoder = Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(tmp_path)
    own = ServedTokenizer(tmp_path)
    model = model_of(Scripted([2, 3], own.size), own)
    client = client_of(model)

    def said(route: str, **ask: Any) -> str:
        body = {"model": "tiny", "max_tokens": 2, "temperature": 0, "stream": stream, **ask}
        reply = client.post(f"/v1/{route}", json=body)
        found = [c["choices"][0] for c in (events(reply.text) if stream else [reply.json()])]
        return "".join(
            c.get("text") or c.get("delta", c.get("message", {})).get("content") or ""
            for c in found
        )

    assert said("completions", prompt="one") == " two three"
    assert said("completions", prompt=[1], stop=" three") == " two"
    assert said("chat/completions", messages=HELLO) == "two three"
    model.scheduler.close()


# --- answers of a form -----------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "größe": {"type": "integer", "minimum": 0, "maximum": 300},
        "wach": {"type": "boolean"},
        "gruß": {"enum": ["hallo 😀", "tschüß"]},
    },
    "required": ["größe", "wach", "gruß"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_keeps_to_its_schema_streamed_or_not(
    client: TestClient, temperature: float
) -> None:
    ask = {**CHAT, "response_format": form(PERSON), "n": 3, "seed": 4, "max_tokens": 75}
    ask["temperature"] = temperature
    whole = client.post("/v1/chat/completions", json=ask).json()["choices"]
    streamed = events(client.post("/v1/chat/completions", json={**ask, "stream": True}).text)
    pieces = [""] * 3
    for chunk in streamed:
        (choice,) = chunk["choices"]
        pieces[choice["index"]] += choice["delta"].get("content", "")
    assert pieces == [choice["message"]["content"] for choice in whole]
    for choice in whole:
        assert choice["finish_reason"] == "stop"
        said = json.loads(choice["message"]["content"])
        assert set(said) == {"größe", "wach", "gruß"}
        assert 0 <= said["größe"] <= 300
        assert said["gruß"] in PERSON["properties"]["gruß"]["enum"]  # type: ignore[index]


def test_a_json_object_is_asked_for_without_a_schema(client: TestClient) -> None:
    ask = {**ASK, "response_format": {"type": "json_object"}, "max_tokens": 30, "n": 4}
    for choice in client.post("/v1/completions", json={**ask, "seed": 1}).json()["choices"]:
        assert choice["text"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
    plain = client.post("/v1/completions", json={**ASK, "response_format": {"type": "text"}})
    assert plain.json()["choices"] == client.post("/v1/completions", json=ASK).json()["choices"]


def test_a_form_goes_with_bias_stops_and_logprobs(
    client: TestClient, tokenizer: ServedTokenizer
) -> None:
    token = tokenizer.prompt("g")[0]
    ask = {**ASK, "response_format": form({"type": "string"}), "logit_bias": {str(token): 100}}
    made = client.post("/v1/completions", json={**ask, "stop": "ggg", "logprobs": 1}).json()
    (choice,) = made["choices"]
    assert (choice["text"], choice["finish_reason"]) == ('"', "stop")
    assert choice["logprobs"]["tokens"][:2] == ['"', "g"]


def test_a_grammar_that_outgrows_its_limits_fails_alone(
    saying: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ars_kit_serving.constraints import Constraint, SchemaError

    client, _ = saying("loss", slots=2)

    def outgrown(*_: Any) -> Any:
        raise SchemaError("too complex")

    monkeypatch.setattr(Constraint, "take", outgrown)
    ask = {**ASK, "response_format": {"type": "json_object"}}
    error = error_of(client.post("/v1/completions", json=ask), 400)  # a 500 would be asked again
    assert (error["code"], error["param"]) == ("invalid_schema", "response_format")
    assert client.post("/v1/completions", json=ASK).status_code == 200
    assert "arskit_cancellations_total{" not in client.get("/metrics").text
    assert client.app.state.desk.models["tiny"].scheduler.active == {}


# --- what is refused -------------------------------------------------------------------------


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


# --- limits, keys, origins -------------------------------------------------------------------


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


# --- logs and counters -----------------------------------------------------------------------


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
