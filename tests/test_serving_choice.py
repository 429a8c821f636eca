"""Which engine serves: the one asked for, or the first that can, with its reason."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from served import Scripted

from ars_kit.errors import ConfigError, PluginError
from ars_kit.host import Host, Plugin
from ars_kit.schema import Choice
from ars_kit.spec import Offer, Service, hookimpl
from ars_kit_serving.serve import AUTO, Serving, choose, is_loopback


def choosing(
    engine: str,
    *able: str,
    gpu: bool = False,
    vllm: str = "",
    names: int = 1,
    broken: Collection[str] = (),
) -> tuple[str, list[str]]:
    """Return the engine that is chosen where only ``able`` ones can serve, and what was said."""
    made: list[str] = []

    def maker(name: str) -> Any:
        def make(service: Service) -> Any:
            if name in broken:
                raise KeyError("head_size")
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
    serving = Serving(
        ["d18"] * names, here, host, Choice(engine), here, "127.0.0.1", 0, None, (), None, 1, 1, 1,
        1, said.append, {"ARSKIT_VLLM_PYTHON": vllm, "ARSKIT_VLLM_HOME": "/no", "PATH": ""}, gpu,
    )  # fmt: skip
    choose(service, serving)
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
