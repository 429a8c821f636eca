"""The package as a stranger installs it: from a wheel, into a clean environment, with a plugin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ("arskit-halve-early", "arskit-on-top")
PACKAGES = {
    "ars_kit": ROOT,
    "ars_kit_plugins": ROOT / "plugins",
    "ars_kit_serving": ROOT / "serving",
}

pytestmark = pytest.mark.timeout(900)  # the first test's set-up installs torch

Done = subprocess.CompletedProcess


@dataclass(frozen=True)
class Installed:
    """A clean environment.

    Attributes:
        wheel: the one that was installed.
        run: runs a script of the environment in an empty folder.
        folder: that folder.
    """

    wheel: Path
    run: Callable[..., Done[str]]
    folder: Path


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def build(source: Path, wheels: Path) -> Path:
    """Build a wheel; the source must be a copy, for setuptools leaves its traces in it."""
    before = set(wheels.glob("*.whl"))
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(source))
    (made,) = set(wheels.glob("*.whl")) - before
    return made


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home = tmp_path_factory.mktemp("package")
    source, wheels, folder = home / "source", home / "wheels", home / "empty"
    for path in (source, wheels, folder):
        path.mkdir()
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("ars_kit", "plugins", "serving"):
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel = build(source, wheels)
    examples = []
    for name in EXAMPLES:
        shutil.copytree(ROOT / "docs" / "examples" / name, home / name, ignore=leave)
        examples.append(str(build(home / name, wheels)))
    venv.create(home / "env", with_pip=False, symlinks=True)
    scripts = home / "env" / ("Scripts" if os.name == "nt" else "bin")
    pip(
        "--python", str(scripts / "python"), "install", "--quiet", "--no-compile",
        "--constraint", str(ROOT / "constraints.txt"), str(wheel), *examples, "pytest",
    )  # fmt: skip
    mine = ("ARSKIT_", "PYTHON", "VIRTUAL_ENV", "COVERAGE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(mine)}
    environment |= {"ARSKIT_CACHE": str(home / "cache"), "COLUMNS": "200"}

    def run(script: str, *arguments: str, cwd: Path = folder) -> Done[str]:
        return subprocess.run(
            [scripts / script, *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return Installed(wheel, run, folder)


def test_the_wheel_holds_every_module_and_page_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    expected = {
        path.relative_to(root).as_posix()
        for package, root in PACKAGES.items()
        for path in (root / package).rglob("*")
        if path.suffix in {".py", ".css", ".html"} or path.name == "py.typed"
    }
    assert names == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {"ars_kit/report.css", "ars_kit_serving/chat.html"} <= names


def test_three_names_are_importable_and_no_others(installed: Installed) -> None:
    code = """
import importlib.metadata, json
tops = {p.parts[0] for p in importlib.metadata.files("ars-kit") if p.parts[0] != ".."}
print(json.dumps(sorted(t for t in tops if not t.endswith(".dist-info"))))
for name in ("plugins", "serving", "tests", "docs", "benchmarks"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")
"""
    done = installed.run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == sorted(PACKAGES)


def test_the_commands_answer(installed: Installed) -> None:
    assert installed.run("arskit", "--version").stdout.startswith("arskit, version 0.")
    assert installed.run("python", "-m", "ars_kit", "--help").returncode == 0
    done = installed.run("arskit", "plugins", "list", "--json")
    listed = json.loads(done.stdout)
    assert listed["quarantined"] == []
    (mine,) = [o for o in listed["offers"] if o["name"] == "halve-early"]
    assert mine["distribution"] == "arskit-halve-early"
    assert (
        "steps (a whole number, default 10)"
        in installed.run("arskit", "plugins", "show", "halve-early").stdout
    )


def test_a_family_trains_under_the_plugins(installed: Installed, text_folder: Path) -> None:
    done = installed.run(
        "arskit", "run", "--members", "d2,d3", "--iterations", "6,4", "--data", str(text_folder),
        "--sequence-length", "32", "--batch-size", "4", "--set", "family.vocab_size=300",
        "--gate", "halve-early:steps=9", "--strategy", "on-top:rewarm_steps=2", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    members = json.loads(done.stdout)["members"]
    # 9 of the first member's 18 steps at a half, and 9 of the second's 12.
    assert [m["gates"]["halve-early"] for m in members] == pytest.approx([0.75, 0.625])
    birth = members[1]["birth"]
    assert (birth["note"], birth["optimizer_state"]) == ("blocks on top", "carried")
    assert birth["birth_logits_difference"] < 1e-5
    assert installed.run("arskit", "verify").returncode == 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_plugins_keep_the_rules(installed: Installed, name: str) -> None:
    done = installed.run("arskit", "plugins", "check", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{name.removeprefix('arskit-')} ({name} 0.1.0): ok\n"


def test_the_plugins_own_tests_pass(installed: Installed, tmp_path: Path) -> None:
    for name in EXAMPLES:
        shutil.copytree(ROOT / "docs" / "examples" / name / "tests", tmp_path / name)
    done = installed.run("python", "-m", "pytest", "-q", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
