"""How tokens become text: whole characters, stop strings, ends, and answers that keep to a form."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from served import (
    ASK,
    CHAT,
    HELLO,
    Scripted,
    client_of,
    error_of,
    events,
    form,
    model_of,
)
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from ars_kit_serving.text import TextStream
from ars_kit_serving.tokenizing import ServedTokenizer


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
