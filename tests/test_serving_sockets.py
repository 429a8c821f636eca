"""The server on a real socket: clients that leave, dawdle, or are the official ones."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from click.testing import CliRunner
from served import Scripted, model_of

from ars_kit.cli import cli
from ars_kit.errors import ArsKitError
from ars_kit_serving.app import create_app
from ars_kit_serving.connections import PatientProtocol
from ars_kit_serving.guard import Rules
from ars_kit_serving.tokenizing import ServedTokenizer


def until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.005)
    return False


class Running:
    """A server in a thread, over an engine that never comes to an end."""

    def __init__(self, tokenizer: ServedTokenizer, **rules: Any) -> None:
        self.engine = Scripted(tokenizer.prompt("loss "), tokenizer.size, pause=0.002, slots=64)
        self.model = model_of(self.engine, tokenizer)
        app = create_app({"tiny": self.model}, rules=Rules(**rules), seconds=60)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        config = uvicorn.Config(
            app, http=PatientProtocol, ws="none", log_config=None, timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=[[self.listener]])
        self.thread.start()
        assert until(lambda: self.server.started, 10)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.model.scheduler.close()

    def connect(self, receive: int | None = None) -> socket.socket:
        made = socket.socket()
        if receive is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        made.settimeout(10)
        made.connect(("127.0.0.1", self.port))
        return made

    def ask(self, receive: int | None = None, **change: Any) -> socket.socket:
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 9000, **change}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        made = self.connect(receive)
        made.sendall(head.encode() + body)
        return made

    @property
    def active(self) -> int:
        return self.model.scheduler.count_active()


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[Running]:
    made = Running(ServedTokenizer(checkpoint), body_seconds=0.3)
    yield made
    made.stop()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_work_within_a_second(
    running: Running, stream: bool
) -> None:
    with running.ask(stream=stream, n=4) as connection:
        assert until(lambda: running.active == 4, 10)
        while stream and b"data: " not in connection.recv(4096):
            pass
        steps = running.engine.steps
    assert until(lambda: running.active == 0, 10)
    assert (running.engine.steps - steps) * running.engine.pause < 1


def test_a_token_waits_for_no_acknowledgement_of_the_one_before(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
        (protocol,) = running.server.server_state.connections
        theirs = protocol.transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_slow_readers_do_not_hold_up_the_others(running: Running) -> None:
    with contextlib.ExitStack() as slow:
        for _ in range(20):  # who never read
            slow.enter_context(running.ask(stream=True))
        assert until(lambda: running.active == 20, 10)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="-") as client:
            made = client.completions.create(model="tiny", prompt="a", max_tokens=20, temperature=0)
        assert made.choices[0].text.startswith("loss loss")
        assert running.active == 20  # they are at it still
    assert until(lambda: running.active == 0, 10)


def test_headers_that_do_not_come_close_the_connection(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.2)
    for beginning in (b"", b"GET /health HTTP/1.1\r\nHo"):
        with running.connect() as connection:
            connection.sendall(beginning)
            assert connection.recv(100) == b""
    with running.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(20).startswith(b"HTTP/1.1 200")


def test_a_client_that_takes_nothing_is_cut_off(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientProtocol, "stalled_seconds", 0.2)
    before = running.listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
    running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # an accepted one's too
    try:
        with running.ask(stream=True, n=8, logprobs=5, receive=4096):
            assert until(lambda: running.active == 8, 10)
            assert until(lambda: running.active == 0, 10)  # long before its 9,000 tokens
            assert until(lambda: not running.server.server_state.connections, 10)
    finally:
        running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, before)


def test_a_body_that_does_not_come_is_answered(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        )
        assert connection.recv(20).startswith(b"HTTP/1.1 408")


# --- the command -----------------------------------------------------------------------------


@contextlib.contextmanager
def command(
    *arguments: str, log: Path | None = None, **environment: str
) -> Iterator[tuple[Any, str]]:
    """Run ``arskit serve`` in a process of its own; yields it and its base URL.

    Args:
        arguments: of the command.
        log: takes its stderr; a pipe by default, which a long log would fill.
        environment: variables.
    """
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            [sys.executable, "-m", "ars_kit", "serve", *arguments, "--port", "0"],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if log is None else stack.enter_context(log.open("w")),
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            assert line, process.communicate()[1]
            yield process, line
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def serving(checkpoint: Path) -> Iterator[tuple[Any, str]]:
    with command(
        str(checkpoint), "--engine", "transformers", "--slots", "1", ARSKIT_API_KEY="k3y"
    ) as found:
        yield found


def test_the_official_client_is_served(serving: tuple[Any, str]) -> None:
    client = openai.OpenAI(base_url=serving[1], api_key="k3y")
    assert [model.id for model in client.models.list()] == ["tiny"]
    ask: Any = {"model": "tiny", "messages": [{"role": "user", "content": "größer"}]}
    ask |= {"temperature": 0, "max_tokens": 12, "logprobs": True}
    whole = client.chat.completions.create(**ask)
    chunks = list(
        client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    legacy = client.completions.create(model="tiny", prompt="the", max_tokens=4, n=2)
    assert len(legacy.choices) == 2
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="d99", prompt="a")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="tiny", prompt="a", max_tokens=1000)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=serving[1], api_key="wrong").models.list()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_sigterm_lets_what_is_being_answered_be_finished(serving: tuple[Any, str]) -> None:
    process, url = serving
    client = openai.OpenAI(base_url=url, api_key="k3y", max_retries=0)
    stream = client.completions.create(
        model="tiny", prompt="a", max_tokens=90, n=8, stream=True, logit_bias={"0": -100}
    )
    chunks = [next(stream)]
    process.send_signal(signal.SIGTERM)
    chunks += list(stream)
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason]
    assert finishes == ["length"] * 8
    assert process.wait(20) == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    lines = [line for line in process.stderr.read().splitlines() if line]
    assert lines[0] == "tiny: engine transformers, as asked for"
    assert lines[-1] == "stopped by SIGTERM"
    logged = [json.loads(line) for line in lines[1:-1]]
    assert all(line["event"] == "request" for line in logged)
    assert logged[-1]["completion_tokens"] == 720


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ([], 3, "no member 'nobody'"),
        (["--host", "0.0.0.0"], 3, "set a key with ARSKIT_API_KEY"),
        (["--engine", "tranformers"], 4, "did you mean 'transformers'?"),
        (["--engine", "transformers:speed=9"], 3, "has no setting 'speed'"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, checkpoint: Path, change: list[str], code: int, message: str
) -> None:
    name = str(checkpoint) if change else "nobody"
    done = CliRunner().invoke(cli, ["serve", name, "--out", str(tmp_path), *change])
    assert isinstance(done.exception, ArsKitError)
    assert done.exception.exit_code == code
    assert message in str(done.exception)
    assert len(str(done.exception).splitlines()) == 1
