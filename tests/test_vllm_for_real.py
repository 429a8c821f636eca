"""vLLM itself, from nothing: set up by one command, served with, asked, killed (make vllm-test)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import pytest
import torch
from openai import BadRequestError, InternalServerError, OpenAI
from served import make_checkpoint
from transformers import AutoModelForCausalLM

from ars_kit_serving.tokenizing import ServedTokenizer

pytestmark = pytest.mark.slow
CONTEXT = 8192
COUNTER = "vllm:generation_tokens_total"
JSON = {"content-type": "application/json"}
PROMPTS = ("the loss", "größer is naïve", "gate", "0-1-2: of and to", "Straße für", "grows 7")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["yes", "no"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@dataclass
class Served:
    """A server with vLLM behind it."""

    url: str
    process: psutil.Process
    checkpoint: Path
    errors: Path

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def vllm(self) -> psutil.Process:
        """Return vLLM's own first process."""
        below = self.process.children(recursive=True)
        found = [p for p in below if "vllm.entrypoints.openai.api_server" in p.cmdline()]
        return next(p for p in found if not any("warden" in part for part in p.cmdline()))

    def made(self) -> float:
        """Return the tokens that vLLM has drawn so far, as it counts them itself."""
        command = self.vllm().cmdline()
        port = command[command.index("--port") + 1]
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(COUNTER))


def until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    work = tmp_path_factory.mktemp("vllm")
    home = os.environ.get("ARSKIT_VLLM_TEST_HOME") or str(work / "home")
    cleared = {k: v for k, v in os.environ.items() if k != "ARSKIT_VLLM_PYTHON"}
    environment = {**cleared, "ARSKIT_VLLM_HOME": home, "ARSKIT_CACHE": str(work / "cache")}
    arskit = [sys.executable, "-m", "ars_kit", "serve"]
    subprocess.run([*arskit, "--setup-vllm"], env=environment, check=True)
    checkpoint = make_checkpoint(
        work / "tiny", hidden_size=64, max_position_embeddings=CONTEXT
    )  # heads of 32, which vLLM has kernels for
    command = [*arskit, str(checkpoint), "--port", "0", "--engine", "vllm:compiled=false"]
    errors = work / "errors"
    with (
        errors.open("wb") as err,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=err) as process,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        assert url, errors.read_text()
        try:
            yield Served(url, psutil.Process(process.pid), checkpoint, errors)
        finally:
            process.terminate()
            process.wait(60)
    assert "as asked for" in errors.read_text()


def ask(server: Served, prompt: Any, **fields: Any) -> Any:
    asked = {"model": "tiny", "max_tokens": 48, "temperature": 0, **fields}
    return server.client.completions.create(prompt=prompt, **asked)


def logits_of(server: Served, tokens: list[int]) -> torch.Tensor:
    """Return transformers' log-probabilities at each place, shape (tokens, vocabulary)."""
    model = AutoModelForCausalLM.from_pretrained(server.checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)


def test_greedy_text_is_that_of_transformers(server: Served) -> None:
    tokenizer = ServedTokenizer(server.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(server.checkpoint, dtype=torch.float32).eval()
    said = ask(server, list(PROMPTS)).choices
    for prompt, choice in zip(PROMPTS, said, strict=True):
        ids = torch.tensor([tokenizer.prompt(prompt)])
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=48, do_sample=False)
        tokens = made[0, ids.shape[1] :].tolist()
        assert choice.text == tokenizer.decode([t for t in tokens if t not in tokenizer.ends])
    assert len({choice.text for choice in said}) == len(PROMPTS)


def test_a_stream_is_the_same_text_in_whole_characters(server: Served) -> None:
    whole = ask(server, "the loss", max_tokens=200)
    chunks = list(ask(server, "the loss", max_tokens=200, stream=True,
                      stream_options={"include_usage": True}))  # fmt: skip
    pieces = [c.choices[0].text for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) > 20
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    chat = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "loss"}], max_tokens=12, temperature=0
    )
    assert chat.choices[0].finish_reason in {"length", "stop"}
    assert chat.usage is not None
    assert chat.usage.completion_tokens <= 12


def test_log_probabilities_are_the_models(server: Served) -> None:
    tokenizer = ServedTokenizer(server.checkpoint)
    told = ask(server, "the loss", max_tokens=8, logprobs=3).choices[0].logprobs
    ids = tokenizer.prompt("the loss")
    for logprob, top in zip(told.token_logprobs, told.top_logprobs, strict=True):
        row = logits_of(server, ids)[-1]
        best = row.topk(3)
        assert logprob == pytest.approx(float(row.max()), abs=1e-3)
        assert sorted(top.values()) == pytest.approx(sorted(best.values.tolist()), abs=1e-3)
        ids.append(int(row.argmax()))


def test_stop_strings_choices_and_seeds(server: Served) -> None:
    said = {p: ask(server, p, max_tokens=60).choices[0].text for p in PROMPTS}
    prompt, text = max(said.items(), key=lambda item: len(item[1]))  # one may end at once
    stop = text[10:13]
    assert len(stop) == 3
    ended = ask(server, prompt, max_tokens=60, stop=[stop]).choices[0]
    assert (ended.text, ended.finish_reason) == (text[: text.index(stop)], "stop")
    drawn = [ask(server, "gate", n=3, temperature=1, seed=5).choices for _ in range(2)]
    assert len({choice.text for choice in drawn[0]}) == 3
    assert [c.text for c in drawn[0]] == [c.text for c in drawn[1]]


def test_forms_are_kept(server: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    for seed in range(4):
        for temperature in (0, 1):
            how = {"seed": seed, "temperature": temperature, "max_tokens": 60}
            made = ask(server, "loss", extra_body={"response_format": form}, **how).choices[0]
            found = json.loads(made.text)
            assert found["b"] in {"yes", "no"}
            assert int(found["a"]) == found["a"] <= 99
            assert made.finish_reason == "stop"
    free = ask(server, "loss", extra_body={"response_format": {"type": "json_object"}}, **how)
    assert free.choices[0].text.startswith("{")
    wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}}
    with pytest.raises(BadRequestError, match="response_format"):
        ask(server, "loss", extra_body={"response_format": wrong})


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_work_within_a_second(server: Served, stream: bool) -> None:
    body = {"model": "tiny", "prompt": "loss", "max_tokens": CONTEXT - 20, "stream": stream,
            "n": 8, "temperature": 1, "logit_bias": {"0": -100}}  # fmt: skip
    before, url = server.made(), urlsplit(server.url)
    client = HTTPConnection(str(url.hostname), url.port, timeout=30)
    client.request("POST", "/v1/completions", json.dumps(body), JSON)
    assert until(lambda: server.made() > before + 20, 30)
    client.close()
    time.sleep(1)
    then = server.made()
    time.sleep(1)
    assert server.made() == then < before + 8 * (CONTEXT - 20)


def test_nothing_else_is_reached(server: Served) -> None:
    for path in ("/tokenize", "/version", "/inference/v1/generate"):
        url = urlsplit(server.url)
        client = HTTPConnection(str(url.hostname), url.port, timeout=30)
        client.request("POST", path, "{}", JSON)
        status = client.getresponse().status
        client.close()
        assert status == 404


def test_a_killed_vllm_is_said(server: Served) -> None:
    server.vllm().kill()
    assert until(lambda: "503" in str(failing(server)), 10)
    error = failing(server)
    assert error is not None
    assert error.code == "engine_dead"


def failing(server: Served) -> InternalServerError | None:
    try:
        ask(server, "loss", max_tokens=2)
    except InternalServerError as error:
        return error
    return None
