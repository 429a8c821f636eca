"""vLLM behind the server: a double stands in for its process, and for that alone."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from starlette.testclient import TestClient
from transformers import BertConfig, BertLMHeadModel, GemmaConfig, GemmaForCausalLM

from ars_kit.causality import NotCausalError
from ars_kit.errors import PluginError
from ars_kit.spec import Service
from ars_kit_serving.app import create_app
from ars_kit_serving.engines.vllm import VllmEngine, VllmSettings, steps_of
from ars_kit_serving.generation import Model
from ars_kit_serving.guard import Rules
from ars_kit_serving.relaying import Relay
from ars_kit_serving.sampling import Sampler, Sampling
from ars_kit_serving.scheduling import Job, QueueFullError
from ars_kit_serving.tokenizing import ServedTokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="vLLM does not run on Windows")
ASK: dict[str, Any] = {"model": "tiny", "prompt": "the loss", "max_tokens": 6, "temperature": 0}
START = """
import sys, time
from pathlib import Path
from ars_kit_serving.engines.child import Child
import os
import shutil
child = Child("vLLM", sys.argv[2:], os.environ, Path(sys.argv[1]))
time.sleep(60)
"""


def until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> ServedTokenizer:
    return ServedTokenizer(checkpoint)


class Stage:
    """Starts engines whose process is the double."""

    def __init__(self, folder: Path, path: Path, tokenizer: ServedTokenizer, patch: Any) -> None:
        self.folder, self.path, self.tokenizer, self.patch = folder, path, tokenizer, patch
        self.notes = folder / "notes"
        self.python = folder / "python"
        double = Path(__file__).with_name("vllm_double.py")
        self.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{double}" "$@"\n')
        self.python.chmod(0o755)
        patch.setenv("ARSKIT_VLLM_PYTHON", str(self.python))
        patch.setenv("DOUBLE_NOTES", str(self.notes))
        self.relays: list[Relay] = []
        self.clients = ExitStack()

    def engine(self, mood: str = "", text: str = "loss 123", seconds: float = 20) -> VllmEngine:
        self.patch.setenv("DOUBLE", mood)
        self.patch.setenv("DOUBLE_LINES", json.dumps(self.tokenizer.prompt(text)))
        service = Service("tiny", self.path, "0", self.folder / "cache", None, 2, print, os.environ)
        how = VllmSettings("cpu", compiled=False, seconds=seconds)
        return VllmEngine(service, how)

    def relay(self, mood: str = "", text: str = "loss 123") -> Relay:
        self.relays.append(Relay(self.engine(mood, text), queue=4))
        return self.relays[-1]

    def client(self, mood: str = "", text: str = "loss 123") -> TestClient:
        model = Model("tiny", self.tokenizer, self.relay(mood, text), self.tokenizer.size, 1)
        app = create_app({"tiny": model}, rules=Rules(), seconds=30)
        client = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
        return self.clients.enter_context(client)  # one loop for all of its requests

    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.notes.read_text().splitlines()]

    def pid(self) -> int:
        return int(self.notes.with_suffix(".pid").read_text())


@pytest.fixture
def stage(
    tmp_path: Path, checkpoint: Path, tokenizer: ServedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    made = Stage(tmp_path, checkpoint, tokenizer, monkeypatch)
    yield made
    made.clients.close()
    for relay in made.relays:
        relay.close()


def test_tokens_go_there_and_come_back_as_any_engines(stage: Stage) -> None:
    client = stage.client()
    made = client.post("/v1/completions", json={**ASK, "logprobs": 1, "n": 2, "seed": 7}).json()
    tokens = stage.tokenizer.prompt("loss 123") * 2
    assert [c["text"] for c in made["choices"]] == [stage.tokenizer.decode(tokens[:6])] * 2
    assert made["usage"]["completion_tokens"] == 12
    best, drawn = stage.tokenizer.token_text(2), stage.tokenizer.token_text(tokens[0])
    assert made["choices"][0]["logprobs"]["top_logprobs"][0] == {best: -0.5, drawn: -3.0}
    assert {body["seed"] for body in stage.asked()} == {7, 8}
    assert stage.asked()[0]["prompt"] == stage.tokenizer.prompt("the loss")
    assert stage.asked()[0]["stop_token_ids"] == [0]
    stop = client.post("/v1/completions", json={**ASK, "max_tokens": 60, "stop": "s 12"}).json()
    assert (stop["choices"][0]["text"], stop["choices"][0]["finish_reason"]) == ("los", "stop")
    chat = {**ASK, "messages": [{"role": "user", "content": "a"}], "stream": True}
    text = client.post("/v1/chat/completions", json=chat).text
    assert text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in text.replace(" ", "")


def test_only_the_listed_routes_exist(stage: Stage) -> None:
    client = stage.client()
    for path in ("/version", "/tokenize", "/v1/embeddings", "/load"):
        assert client.get(path).status_code == client.post(path, json={}).status_code == 404
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert client.get("/health").status_code == 200
    assert not stage.notes.exists()


def test_a_form_goes_there_as_a_schema_and_a_bad_one_does_not(stage: Stage) -> None:
    client = stage.client()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for form, sent in (
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, schema),
    ):
        answer = client.post("/v1/completions", json={**ASK, "response_format": form})
        assert answer.status_code == 200
        assert stage.asked()[-1]["structured_outputs"] == {"json": sent}
    asked = len(stage.asked())
    for form in ({"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}, {"type": "?"}):
        answer = client.post("/v1/completions", json={**ASK, "response_format": form})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")
    client.post("/v1/completions", json={**ASK, "response_format": {"type": "text"}})
    assert "structured_outputs" not in stage.asked()[asked]


def test_the_end_of_text_ends_an_answer(stage: Stage) -> None:
    client = stage.client(text="loss<|endoftext|>")
    assert json.loads(os.environ["DOUBLE_LINES"])[-1] == 0
    made = client.post("/v1/completions", json={**ASK, "max_tokens": 60}).json()
    assert (made["choices"][0]["text"], made["choices"][0]["finish_reason"]) == ("loss", "stop")


def test_an_end_that_vllm_alone_knows_ends_an_answer_too(stage: Stage) -> None:
    client = stage.client("ends")
    made = client.post("/v1/completions", json={**ASK, "max_tokens": 60}).json()
    text = stage.tokenizer.decode(stage.tokenizer.prompt("loss 123")[:2])
    assert (made["choices"][0]["text"], made["choices"][0]["finish_reason"]) == (text, "stop")
    assert made["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("tokens", "reason", "finish"),
    [([7, 0], "length", "stop"), ([7, 8], "length", "length"), ([7, 8], "stop", "stop")],
)
def test_an_end_by_vllms_word_or_by_its_token_is_a_stop(
    tokens: list[int], reason: str, finish: str
) -> None:
    job = Job([5], Sampler(Sampling()), 9, {0}, print)
    made = steps_of({"choices": [{"token_ids": tokens, "finish_reason": reason}]}, job)
    assert [(step.drawn.token, step.finish) for step in made if step.drawn] == [
        (tokens[0], None),
        (tokens[1], finish),
    ]


def test_one_that_dies_at_its_start_is_one_line_with_its_reason(stage: Stage) -> None:
    with pytest.raises(PluginError, match="ValueError: there is no such attention") as found:
        stage.engine("dies")
    assert len(str(found.value).splitlines()) == 1
    assert Path(str(found.value).rsplit("Its log is ", 1)[1]).is_file()


def test_one_that_cannot_run_the_model_is_one_line_with_the_first_error(stage: Stage) -> None:
    with pytest.raises(PluginError, match=r"cannot run this model: RuntimeError: no kernel for"):
        stage.engine("cannot")
    assert not psutil.pid_exists(stage.pid())


def test_one_that_hangs_is_given_up_and_ended(stage: Stage) -> None:
    with pytest.raises(PluginError, match="did not answer within 2 seconds; its log is"):
        stage.engine("hangs", seconds=2)
    assert not psutil.pid_exists(stage.pid())


def test_one_that_dies_in_a_stream_is_said_and_health_says_so_too(stage: Stage) -> None:
    client = stage.client("breaks")
    text = client.post("/v1/completions", json={**ASK, "stream": True}).text
    *pieces, error = [json.loads(e.removeprefix("data: ")) for e in text.strip().split("\n\n")]
    assert pieces
    assert error["error"]["code"] == "engine_dead"
    relay = stage.relays[0]
    assert until(lambda: relay.complaint() is not None, 10)
    assert "ended with exit code 1" in str(relay.complaint())
    for answer in (client.get("/health"), client.post("/v1/completions", json=ASK)):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"


def test_a_job_that_nobody_waits_for_is_dropped_there_within_a_second(stage: Stage) -> None:
    relay = stage.relay("dawdles")
    came: list[Any] = []
    job = Job([5], Sampler(Sampling()), 90_000, {0}, came.append)

    async def soon(true: Callable[[], bool], seconds: float) -> bool:
        return await asyncio.to_thread(until, true, seconds)

    async def leave() -> None:
        relay.submit([job])
        assert await soon(lambda: len(came) > 2, 10)
        relay.cancel([job])
        assert await soon(lambda: stage.notes.with_suffix(".gone").exists(), 1)
        assert await soon(lambda: relay.count_active() == relay.count_waiting() == 0, 1)
        await relay.end()
        with pytest.raises(QueueFullError):
            relay.submit([job])

    asyncio.run(leave())


def test_nothing_is_left_when_we_are_killed(stage: Stage) -> None:
    stage.patch.setenv("DOUBLE_LINES", "[1]")
    started = subprocess.Popen(
        [sys.executable, "-c", START, str(stage.folder / "log"), str(stage.python), "--port", "0"]
    )
    assert until(stage.notes.with_suffix(".pid").exists, 20)
    assert until(lambda: bool(stage.notes.with_suffix(".pid").read_text()), 5)
    pid = stage.pid()
    assert psutil.pid_exists(pid)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert until(lambda: not psutil.pid_exists(pid), 10)


@pytest.mark.parametrize("kind", ["gemma", "bert"])
def test_what_reads_ahead_is_refused_before_anything_starts(
    stage: Stage, tmp_path: Path, kind: str
) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32,
             "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip
    heads = {"num_key_value_heads": 1, "head_dim": 8, "use_bidirectional_attention": True}
    model: Any = (
        BertLMHeadModel(BertConfig(**sizes))
        if kind == "bert"
        else GemmaForCausalLM(GemmaConfig(**sizes, **heads))
    )
    model.save_pretrained(tmp_path / "both-ways")
    stage.path = tmp_path / "both-ways"
    with pytest.raises(NotCausalError, match="tokens that come later"):
        stage.engine()
    assert not stage.notes.with_suffix(".pid").exists()


def test_weights_that_vllm_alone_may_know_are_left_to_it(stage: Stage, tmp_path: Path) -> None:
    stage.path = Path(shutil.copytree(stage.path, tmp_path / "packed"))
    save_file({"model.packed": torch.zeros(3)}, stage.path / "model.safetensors")
    stage.relay()
    assert psutil.pid_exists(stage.pid())
