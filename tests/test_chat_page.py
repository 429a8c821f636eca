"""The chat page: what is sent, and what a browser makes of it, driven over its debugging pipe."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from served import Scripted, model_of
from starlette.testclient import TestClient

from ars_kit_serving.app import create_app
from ars_kit_serving.connections import PatientProtocol
from ars_kit_serving.generation import Model
from ars_kit_serving.guard import Rules
from ars_kit_serving.tokenizing import ServedTokenizer

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here: the chat page is served, but nobody looked at it"
)
AT_3_AND_4 = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
MARKUP = "<b>größer</b> 😀 "


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> Iterator[dict[str, Model]]:
    """Two models: one that says markup, and one that says less, slower."""
    tokenizer = ServedTokenizer(checkpoint)
    first = Scripted(tokenizer.prompt(MARKUP), tokenizer.size)
    second = Scripted(tokenizer.prompt("loss "), tokenizer.size, pause=0.002)
    made = {
        name: model_of(engine, tokenizer, name)
        for name, engine in (("d10", first), ("d18", second))
    }
    yield made
    for model in made.values():
        model.scheduler.close()


# --- what is sent ----------------------------------------------------------------------------


def test_the_page_is_in_the_package_and_needs_nothing_else() -> None:
    page = files("ars_kit_serving").joinpath("chat.html").read_text(encoding="utf-8")
    outside = re.findall(r"https?:|(?:src|href)=\"(?!data:,)|@import|url\(|<(?:img|iframe)", page)
    assert outside == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page) == []
    assert re.findall(r"localStorage|sessionStorage|indexedDB|cookie|\sstyle=|\son\w+=", page) == []


def test_the_page_may_run_its_own_script_and_no_other(models: dict[str, Model]) -> None:
    app = create_app(models, rules=Rules(), seconds=30)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        reply = client.get("/")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    policy = dict(
        part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in " ".join(policy.values())
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind])


def test_the_page_needs_no_key_and_holds_none(models: dict[str, Model]) -> None:
    app = create_app(models, rules=Rules(key="s3cret", hosts=None), seconds=30)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        reply = client.get("/")
        assert reply.status_code == 200
        assert not any(word in reply.text for word in ("s3cret", "d10", "d18"))
        assert client.get("/v1/models").status_code == 401
        assert client.post("/").status_code == 405


# --- what a browser makes of it --------------------------------------------------------------


class Page:
    """A page of a headless Chromium, over the pipe that it offers to debuggers.

    Args:
        home: folder of its profile.

    Attributes:
        complaints: what the browser logged: errors of scripts, breaches of the policy.
    """

    def __init__(self, home: Path) -> None:
        theirs, ours = os.pipe(), os.pipe()
        command = [
            sys.executable, "-ISc", AT_3_AND_4, str(theirs[0]), str(ours[1]),
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--remote-debugging-pipe", f"--user-data-dir={home}",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            pass_fds=(theirs[0], ours[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs[0])
        os.close(ours[1])
        self.sending, self.receiving = os.fdopen(theirs[1], "wb", 0), os.fdopen(ours[0], "rb")
        self.number, self.session, self.complaints = 0, "", list[str]()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the debugging protocol; returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.sending.write(json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("method") in {"Log.entryAdded", "Runtime.exceptionThrown"}:
                self.complaints.append(json.dumps(found["params"]))
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def _receive(self) -> Any:
        raw = bytearray()
        while (byte := self.receiving.read(1)) != b"\0":
            assert byte, "Chromium has gone"
            raw += byte
        return json.loads(raw)

    def do(self, expression: str) -> Any:
        """Evaluate JavaScript; returns its value, awaited."""
        made = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in made, made
        return made["result"].get("value")

    def until(self, condition: str, seconds: float = 20) -> None:
        """Wait until JavaScript holds."""
        end = time.monotonic() + seconds
        while not self.do(f"!!({condition})"):
            assert time.monotonic() < end, (condition, self.do("document.body.innerText"))
            time.sleep(0.02)

    def type(self, where: str, text: str) -> None:
        """Type into a field and press Enter."""
        self.do(f"document.querySelector('{where}').select()")
        self.call("Input.insertText", text=text)
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def open(self, url: str) -> None:
        """Go to a page, and forget the complaints about others."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")
        self.complaints.clear()

    def size(self, width: int, *, dark: bool = False) -> None:
        """Be a window of a width, light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
            mobile=width < 500,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def close(self) -> None:
        """End the browser."""
        self.session = ""
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        self.sending.close()
        self.receiving.close()
        self.process.wait(20)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    made = Page(tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


@contextlib.contextmanager
def listening(models: dict[str, Model], **rules: Any) -> Iterator[str]:
    """Serve models on a socket; yields the base URL."""
    app = create_app(models, rules=Rules(**rules), seconds=60)
    config = uvicorn.Config(
        app, http=PatientProtocol, ws="none", log_config=None, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def url(models: dict[str, Model]) -> Iterator[str]:
    with listening(models) as made:
        yield made


ANSWERED = (
    "[...document.querySelectorAll('.answer')].filter(a => a.querySelector('.note')?.textContent)"
)
TEXTS = "[...document.querySelectorAll('.answer')].map(a => a.querySelector('p').textContent)"
NOTES = "[...document.querySelectorAll('.answer')].map(a => a.querySelector('.note').textContent)"


def open_and_send(page: Page, url: str, asked: str) -> None:
    """Open a link that asks, and press the button."""
    page.open(f"{url}/?ask={asked}")
    page.until("document.querySelector('#status').textContent.startsWith('The link asks')")
    page.do("document.querySelector('#send').click()")


@needs_browser
def test_a_link_asks_nothing_before_the_button_is_pressed(
    page: Page, url: str, models: dict[str, Model]
) -> None:
    page.open(f"{url}/?ask=a")
    page.until("document.querySelector('#message').value === 'a'")
    page.until("document.activeElement.id === 'send'")
    assert page.do("document.querySelectorAll('.answer').length") == 0
    assert all(model.scheduler.count_active() == 0 for model in models.values())


@needs_browser
def test_a_link_asks_and_the_answers_stand_side_by_side(page: Page, url: str) -> None:
    page.size(1100)
    open_and_send(page, url, "Wie%20gro%C3%9F%3F")
    page.until(f"{ANSWERED}.length === 2")
    assert page.do("document.querySelector('h2').textContent") == "Wie groß?"
    assert page.do("[...document.querySelectorAll('h3')].map(h => h.textContent)") == ["d10", "d18"]
    first, second = page.do(TEXTS)
    assert first.startswith(MARKUP * 3)
    assert second.startswith("loss loss loss")
    for note in page.do(NOTES):
        assert re.fullmatch(r"256 tokens in \d+\.\d s, cut off at max tokens", note)
    assert page.do("document.querySelectorAll('[aria-live=polite][aria-busy=false]').length") == 2
    boxes = "[...document.querySelectorAll('.answer')].map(a => a.getBoundingClientRect().toJSON())"
    left, right = page.do(boxes)
    assert left["right"] <= right["left"]
    assert left["top"] == right["top"]
    page.size(390)
    above, below = page.do(boxes)
    assert above["bottom"] <= below["top"]
    assert page.do("document.documentElement.scrollWidth") <= 390
    assert page.complaints == []


@needs_browser
def test_a_chat_goes_on_with_what_each_model_said_and_stop_frees_the_work(
    page: Page, url: str, models: dict[str, Model]
) -> None:
    open_and_send(page, url, "a")
    page.until(f"{ANSWERED}.length === 2")
    page.do("document.querySelector('[value=d10]').click()")
    page.do("document.querySelector('#max-tokens').value = 5000")
    page.do(
        "sent = []; ask_fetch = fetch; fetch = (...a) => (sent.push(a[1].body), ask_fetch(...a))"
    )
    page.type("#message", "b")
    page.until("document.querySelectorAll('.answer')[2]?.querySelector('p').textContent.length > 9")
    page.do("document.querySelector('#stop').click()")
    page.until(f"{ANSWERED}.length === 3")
    assert page.do(f"{NOTES}[2]") == "stopped"
    page.until("document.querySelector('#status').textContent === 'Stopped.'")
    end = time.monotonic() + 5
    while models["d18"].scheduler.count_active() and time.monotonic() < end:
        time.sleep(0.01)
    assert models["d18"].scheduler.count_active() == 0
    (body,) = (json.loads(text) for text in page.do("sent"))
    said = page.do(f"{TEXTS}[1]")
    assert (body["model"], body["max_tokens"], body["stream"]) == ("d18", 5000, True)
    assert body["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "b"},
    ]
    assert page.complaints == []


@needs_browser
def test_what_the_server_refuses_is_said_in_its_words(page: Page, url: str) -> None:
    page.open(url)
    page.until("document.querySelectorAll('#models input').length === 2")
    page.do("document.querySelector('#max-tokens').value = 20000")
    page.type("#message", "too much")
    page.until(f"{ANSWERED}.length === 2")
    for note in page.do(NOTES):
        assert note.startswith("This model's maximum context length is 10000 tokens.")
    assert page.do("document.querySelector('#message').value") == "too much"
    page.do("document.querySelectorAll('#models input').forEach(box => box.click())")
    page.type("#message", "nobody")
    assert page.do("document.querySelector('#status').textContent") == "Choose a model."


@needs_browser
def test_a_key_is_asked_for_and_kept_in_memory_only(page: Page, models: dict[str, Model]) -> None:
    with listening(models, key="s3cret", hosts=None) as url:
        page.open(f"{url}/?ask=a")
        page.until("!document.querySelector('#key-form').hidden")
        assert page.do("document.querySelectorAll('#models input').length") == 0
        page.type("#key", "wrong")
        page.until("document.querySelector('#status').textContent.startsWith('Incorrect API key')")
        page.type("#key", "s3cret")
        page.until("document.querySelector('#status').textContent.startsWith('The link asks')")
        page.do("document.querySelector('#send').click()")
        page.until(f"{ANSWERED}.length === 2")
        assert page.do(TEXTS)[1].startswith("loss loss")
        assert page.do("document.querySelector('#key-form').hidden")
        kept = "[localStorage.length, sessionStorage.length, document.cookie, location.search]"
        assert page.do(kept) == [0, 0, "", "?ask=a"]
        assert "s3cret" not in page.do("document.documentElement.outerHTML")
        page.open("about:blank")
