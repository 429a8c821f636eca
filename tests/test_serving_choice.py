"""Which engine serves: the one asked for, or the first that can, with its reason."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from served import Scripted

from ars_kit.errors import ArsKitError, ConfigError, PluginError
from ars_kit.host import Host, Plugin
from ars_kit.schema import Choice
from ars_kit.spec import Offer, Service, hookimpl
from ars_kit_serving.guard import Rules
from ars_kit_serving.serve import AUTO, Serving, _run, choose, is_loopback, rules_of


def serving_of(host: Host, **change: Any) -> Serving:
    here = Path()
    fields: dict[str, Any] = {
        "names": ["d18"], "out": here, "host": host, "engine": Choice("auto"), "cache": here,
        "address": "127.0.0.1", "port": 0, "key": None, "origins": (), "context": None, "slots": 1,
        "queue": 1, "seconds": 1, "drain_seconds": 1, "say": print,
    }  # fmt: skip
    return Serving(**{**fields, **change})


def choosing(
    engine: str,
    *able: str,
    gpu: bool = False,
    vllm: str = "",
    names: int = 1,
    broken: Collection[str] = (),
    full: Collection[str] = (),
) -> tuple[str, list[str]]:
    """Return the engine that is chosen where only ``able`` ones can serve, and what was said."""
    made: list[str] = []

    def maker(name: str) -> Any:
        def make(service: Service) -> Any:
            if name in broken:
                raise KeyError("head_size")
            if name in full:
                raise ArsKitError("no space left to write the export")
            if name not in able:
                raise ConfigError(f"it is no {name}")
            made.append(name)
            return Scripted([1], 4)

        def vllm(service: Service, *, memory: float = 0.9) -> Any:
            if name not in able:
                raise PluginError("no kernel")
            made.append(f"vllm with {memory}")
            return Scripted([1], 4)

        return vllm if name == "vllm" else make

    class Module:
        @staticmethod
        @hookimpl
        def arskit_servers() -> list[Offer[Any]]:
            return [Offer(name, "for tests", maker(name)) for name in (*AUTO, "vllm")]

    host = Host()
    host.register(Module, Plugin("mine", "arskit-mine", "1"))
    said: list[str] = []
    here = Path()
    service = Service("d18", here, "0", here, None, 1, said.append)
    environment = {"ARSKIT_VLLM_PYTHON": vllm, "ARSKIT_VLLM_HOME": "/no", "PATH": ""}
    how: dict[str, Any] = {"names": ["d18"] * names, "engine": Choice(engine), "gpu": gpu}
    choose(service, serving_of(host, **how, say=said.append, environment=environment))
    return made[0], said


def test_auto_takes_the_first_that_can_and_says_why_not_the_others() -> None:
    assert choosing("auto", *AUTO) == ("genai", ["d18: engine genai (the first choice of auto)"])
    name, said = choosing("auto", "transformers")
    assert name == "transformers"
    assert said == [
        "d18: engine transformers (genai cannot: it is no genai; onnx cannot: it is no onnx)"
    ]
    with pytest.raises(ConfigError, match="no engine serves d18"):
        choosing("auto")


def test_auto_leaves_what_an_engine_fails_on_to_the_next() -> None:
    name, said = choosing("auto", *AUTO, broken=["genai"])
    assert name == "onnx"
    assert "genai cannot: serving engine 'genai' of plugin 'mine'" in said[0]
    assert "KeyError('head_size')" in said[0]
    with pytest.raises(PluginError, match="serving engine 'transformers'"):
        choosing("auto", broken=["transformers"])


def test_auto_serves_without_an_export_where_none_can_be_written() -> None:
    name, said = choosing("auto", *AUTO, full=["genai", "onnx"])
    assert name == "transformers"
    assert "genai cannot: no space left to write the export; onnx cannot: no space" in said[0]
    with pytest.raises(ArsKitError, match="no space left"):
        choosing("genai", *AUTO, full=["genai"])


def test_auto_takes_vllm_where_it_is_set_up_and_there_is_a_gpu() -> None:
    every, python = (*AUTO, "vllm"), sys.executable
    name, said = choosing("auto", *every, gpu=True, vllm=python)
    assert name == "vllm with 0.9"
    assert said == ["d18: engine vllm (it is set up, and there is a GPU)"]
    assert choosing("auto", *every, gpu=True, vllm=python, names=3)[0] == "vllm with 0.3"
    assert choosing("auto", *every, gpu=False, vllm=python)[0] == "genai"
    assert choosing("auto", *every, gpu=True)[0] == "genai"
    assert choosing("auto", *every, gpu=True, vllm="/no/python")[0] == "genai"
    name, said = choosing("auto", *AUTO, gpu=True, vllm=python)
    assert (name, said) == ("genai", ["d18: engine genai (vllm cannot: no kernel)"])


def test_an_engine_that_is_asked_for_is_never_replaced() -> None:
    assert choosing("onnx", *AUTO) == ("onnx", ["d18: engine onnx, as asked for"])
    with pytest.raises(ConfigError, match="it is no onnx"):
        choosing("onnx", "transformers")


def test_what_is_loopback_needs_no_key() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "")))


def test_a_server_answers_to_the_address_it_listens_on() -> None:
    rules = rules_of(serving_of(Host(), address="127.0.0.2"))
    assert rules.hosts == {"localhost", "127.0.0.1", "::1", "127.0.0.2"}
    assert rules_of(serving_of(Host(), address="0.0.0.0", key="k")).hosts is None


@pytest.mark.parametrize("key", [" k3y", "k3y\r", "k 3", "kéy", " "])
def test_a_key_that_no_client_can_send_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="clients cannot send"):
        rules_of(serving_of(Host(), key=key))


def test_an_origin_is_as_browsers_write_it() -> None:
    good = ("*", "null", "https://app.example", "http://127.0.0.1:3000", "http://[::1]:80")
    assert rules_of(serving_of(Host(), origins=good)).origins == good
    for origin in ("https://app.example/", "app.example", "https://App.example", "https://", ""):
        with pytest.raises(ConfigError, match="is no origin"):
            rules_of(serving_of(Host(), origins=[origin]))


def test_a_signal_that_comes_before_the_server_listens_for_it_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def beginning(_: uvicorn.Config) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(uvicorn.Config, "get_loop_factory", beginning)
    monkeypatch.setattr("ars_kit_serving.serve.log_to_stderr", lambda: None)
    said: list[str] = []
    again = threading.Timer(10, os.kill, [os.getpid(), signal.SIGTERM])
    again.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _run(serving_of(Host(), say=said.append), {}, Rules(), listener, print)
    assert again.is_alive()
    again.cancel()
    assert said == ["stopped by SIGTERM"]
