from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from ars_kit.errors import ConfigError, PluginError
from ars_kit.host import SINGULAR, Host, Plugin
from ars_kit.schema import Choice
from ars_kit.spec import Hooks, Offer, StepSignal, hookimpl

STRANGER = Plugin("stranger", "arskit-stranger", "0.3")


class Mine:
    def __init__(self, *, limit: float = 1.0) -> None:
        self.limit = limit

    def __call__(self, signal: StepSignal) -> Tensor:
        return signal.loss.new_full((), self.limit)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def plugin_of(answer: Any, hook: str = "arskit_gates") -> SimpleNamespace:
    def implementation() -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return SimpleNamespace(**{hook: hookimpl(implementation)})


def test_every_hook_is_read() -> None:
    hooks = {name for name in vars(Hooks) if name.startswith("arskit_")}
    assert hooks == {f"arskit_{kind}" for kind in SINGULAR}
    host = Host.installed()
    assert not host.quarantined
    assert all(host.shelves[kind] for kind in SINGULAR)


def test_a_strangers_gate_registers_like_a_built_in() -> None:
    host = Host.installed()
    host.register(plugin_of([Offer("mine", "a gate", Mine)]), STRANGER)
    assert host.make("gates", Choice("mine", {"limit": "0.5"})).limit == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (dict, "failed when its settings were read: ValueError"),
        (lambda: 1 / 0, r"failed when it was made: ZeroDivisionError"),
        (lambda: sys.exit(3), r"failed when it was made: SystemExit\(3\)"),
        (lambda: 0.5, "is a float, which has no __call__, state_dict, load_state_dict"),
    ],
)
def test_what_is_no_gate_is_named_when_it_is_made(make: Any, message: str) -> None:
    host = Host()
    host.register(plugin_of([Offer("mine", "a gate", make)]), STRANGER)
    who = r"damping gate 'mine' of plugin 'stranger' \(arskit-stranger 0\.3\) "
    with pytest.raises(PluginError, match=who + message):
        host.make("gates", Choice("mine", {}))


def test_a_wrapper_of_what_is_no_gate_is_named() -> None:
    host = Host()
    host.register(plugin_of([Offer("w", "", lambda: {"g": 1})], "arskit_wrappers"), STRANGER)
    with pytest.raises(PluginError, match="gate 'g' of optimizer wrapper 'w' of plugin 'stranger'"):
        host.make("wrappers", Choice("w", {}))


def test_two_plugins_of_one_name_are_left_out_by_their_distributions() -> None:
    host = Host()
    for dist in ("arskit-one", "arskit-two"):
        host.register(plugin_of("nonsense"), Plugin("same", dist, "1"))
    assert [line.rpartition("=")[2] for line in host.complaints()] == ["arskit-one", "arskit-two"]
    assert not Host.installed(without=["ars-kit"]).plugins


@pytest.mark.parametrize(
    ("answer", "hook", "message"),
    [
        (RuntimeError("no"), "arskit_gates", "failed in arskit_gates"),
        (SystemExit(3), "arskit_gates", "failed in arskit_gates"),
        ("clip", "arskit_gates", "not a list"),
        (["clip"], "arskit_gates", "not an Offer"),
        ([Offer("Bad Name", "", dict)], "arskit_gates", "a name is"),
        ([Offer(5, "", dict)], "arskit_gates", "offers 5; a name is"),  # type: ignore[arg-type]
        ([Offer("x", None, dict)], "arskit_gates", "no text: None"),  # type: ignore[arg-type]
        (None, "arskit_gates", "returned NoneType from arskit_gates(), not a list"),
        ([], "arskit_gatez", "unknown hook"),
    ],
)
def test_a_bad_plugin_is_put_aside_and_named(answer: Any, hook: str, message: str) -> None:
    host = Host.installed()
    host.register(plugin_of(answer, hook), STRANGER)
    (line,) = host.complaints()
    assert message in line
    assert "arskit-stranger 0.3" in line
    assert line.endswith("ARSKIT_WITHOUT=stranger")
    assert host.listing("gates", "guard")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_this_name", "failed to load: ModuleNotFoundError"),
        ("def broken(:", "failed to load: SyntaxError"),
        ("import sys; sys.exit(3)", "failed to load: SystemExit(3)"),
        ("ARSKIT_API = 99", "is written for plugin API 99"),
        (
            "import time\ntry:\n    time.sleep(60)\nexcept Exception:\n    pass",
            "was not loaded after 0.5 seconds",
        ),
    ],
)
def test_an_installed_plugin_that_breaks_leaves_the_rest(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "arskit_broken.py").write_text(source)
    info = tmp_path / "arskit_broken-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: arskit-broken\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[ars_kit]\nbroken = arskit_broken\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "arskit_broken", raising=False)
    monkeypatch.setattr("ars_kit.host.LOAD_LIMIT", 0.5)
    host = Host.installed()
    (line,) = host.complaints()
    assert line.startswith("plugin 'broken' (arskit-broken 0.3) ")
    assert message in line
    assert host.make("gates", Choice("clip", {}))
    assert not Host.installed(without=["broken"]).quarantined


def test_a_hook_that_is_not_marked_is_named() -> None:
    host = Host()
    host.register(SimpleNamespace(arskit_gates=lambda: [Offer("mine", "a gate", Mine)]), STRANGER)
    (line,) = host.complaints()
    assert "has arskit_gates() without @hookimpl above it" in line


def test_a_newer_interface_is_refused() -> None:
    host = Host()
    module = plugin_of([])
    module.ARSKIT_API = 99
    host.register(module, STRANGER)
    assert "plugin API 99" in host.complaints()[0]


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(PluginError, match=r"no damping gate named 'surprize' \(did you mean 'surp"):
        Host.installed().listing("gates", "surprize")


def test_a_name_offered_twice_is_refused_when_chosen() -> None:
    host = Host.installed()
    host.register(plugin_of([Offer("clip", "another", dict)]), STRANGER)
    with pytest.raises(PluginError, match="offered twice"):
        host.listing("gates", "clip")


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'clip' has no setting 'limt'.*It has: limit\."):
        Host.installed().check("gates", Choice("clip", {"limt": "1"}))


def test_a_bad_value_is_named() -> None:
    with pytest.raises(ConfigError, match="'clip': limit must be greater than 0"):
        Host.installed().make("gates", Choice("clip", {"limit": "-1"}))


HEAVY = (
    "torch", "transformers", "datasets", "rich", "fastapi", "openai", "uvicorn", "pydantic",
    "onnx", "onnxruntime", "onnxruntime_genai", "onnxscript", "prometheus_client", "jinja2",
    "peft",
)  # fmt: skip


def test_listing_and_help_import_nothing_heavy() -> None:
    code = (
        "import sys; from ars_kit.host import Host; import ars_kit.cli; Host.installed(); "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
