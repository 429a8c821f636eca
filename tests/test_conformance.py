from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from torch import Tensor

from ars_kit.cli import cli
from ars_kit.conformance import Finding, check_offers
from ars_kit.errors import ConfigError, PluginError
from ars_kit.host import Host, Plugin
from ars_kit.spec import DampingGate, Offer, StepSignal, hookimpl


class Named:
    """A gate that tells the check what it should find."""

    def __init__(self, *, says: str = "") -> None:
        self.says = says

    def __call__(self, signal: StepSignal) -> Tensor:
        return signal.loss

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def needy(*, limit: float) -> Named:
    return Named(says=f"limit {limit}")


def check(make: Callable[[], DampingGate]) -> None:
    gate: Any = make()
    if gate.says == "boom":
        raise KeyError("boom")
    if gate.says:
        raise AssertionError(f"step 3: factor is\n{gate.says}")


def plugin(**offers: Any) -> Any:
    found = [Offer(name.replace("_", "-"), "for a test", make) for name, make in offers.items()]
    return SimpleNamespace(arskit_gates=hookimpl(lambda: found))


@pytest.fixture
def host() -> Host:
    host = Host()
    bad = lambda: Named(says="2.0")  # noqa: E731 -- as a plugin might
    raising = lambda: Named(says="boom")  # noqa: E731
    host.register(
        plugin(good=Named, bad=bad, raising=raising, needy=needy), Plugin("a", "Arskit_A", "1")
    )
    host.register(plugin(alone=Named, twice=Named), Plugin("b", "arskit-b", "2"))
    host.register(plugin(twice=Named), Plugin("c", "arskit-c", "3"))
    host.register(SimpleNamespace(ARSKIT_API=99), Plugin("old", "arskit-old", "4"))
    return host


def found(host: Host, wanted: str) -> list[str]:
    return [str(finding) for finding in check_offers(host, wanted, {"gates": check})]


def test_a_gate_is_checked_with_its_settings(host: Host) -> None:
    assert found(host, "good") == ["good (Arskit_A 1): ok"]
    assert found(host, "good:says=x") == ["good:says=x (Arskit_A 1): step 3: factor is x"]


def test_every_gate_of_a_distribution_is_checked_however_it_is_spelt(host: Host) -> None:
    assert found(host, "arskit-a") == [
        "bad (Arskit_A 1): step 3: factor is 2.0",
        "good (Arskit_A 1): ok",
        "needy (Arskit_A 1): 'needy' needs a value for limit",
        "raising (Arskit_A 1): it raised KeyError: 'boom'",
    ]


def test_a_plugin_that_was_put_aside_failed(host: Host) -> None:
    (line,) = found(host, "arskit-old")
    assert line.startswith("old (arskit-old 4): is written for plugin API 99")


def test_a_clash_is_named(host: Host) -> None:
    with pytest.raises(PluginError, match="arskit-b"):
        found(host, "twice")
    assert "arskit-c" in found(host, "arskit-b")[1]


def test_an_unknown_name_is_refused_with_a_hint(host: Host) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'good'.*There are: Arskit_A, "):
        found(host, "goud")


def test_the_command_prints_a_line_a_gate_and_fails_with_4(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    testing: Any = ModuleType("ars_kit.testing")
    testing.check_gate = testing.check_strategy = check
    monkeypatch.setitem(sys.modules, "ars_kit.testing", testing)
    monkeypatch.setattr("ars_kit.cli.plugins.make_host", lambda: host)
    done = CliRunner().invoke(cli, ["plugins", "check", "good"])
    assert (done.exit_code, done.output) == (0, "good (Arskit_A 1): ok\n")
    done = CliRunner().invoke(cli, ["plugins", "check", "arskit-a"])
    assert isinstance(done.exception, PluginError)
    assert done.exception.exit_code == 4
    assert str(done.exception) == "3 of 4 offers of 'arskit-a' failed"
    assert len(done.output.splitlines()) == 4
    done = CliRunner().invoke(cli, ["plugins", "check", "bad", "--json"])
    assert isinstance(done.exception, PluginError)
    assert [Finding(**finding) for finding in json.loads(done.output)] == [
        Finding("bad", "Arskit_A", "1", "step 3: factor is 2.0")
    ]
