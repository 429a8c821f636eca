"""The package as a stranger has it: a wheel in a clean environment, with plugins.

What the wheel says that it needs is linked from the environment of the tests: that, what that
needs, and nothing else; pip looks whether it is enough. `make package-check` has pip install it.
"""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
EXAMPLES = ("arskit-halve-early", "arskit-on-top")
PACKAGES = {
    "ars_kit": ROOT,
    "ars_kit_plugins": ROOT / "plugins",
    "ars_kit_serving": ROOT / "serving",
}

WHOLE = bool(os.environ.get("ARSKIT_PACKAGE_WHOLE"))
"""Whether pip is to find and install what the wheel needs."""

pytestmark = pytest.mark.timeout(900)  # the first test's set-up may install torch

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


def build(sources: Sequence[Path], wheels: Path) -> list[Path]:
    """Build wheels; the sources must be copies, for setuptools leaves its traces in them."""
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), *map(str, sources))
    return sorted(wheels.glob("*.whl"))


def needed(wanted: Iterable[str]) -> dict[str, Distribution]:
    """Return what requirements ask for, and what that asks for in turn, by name."""
    found: dict[str, Distribution] = {}
    waiting = [(Requirement(text), "") for text in wanted]
    seen = set()
    while waiting:
        asked, extra = waiting.pop()
        if asked.marker is not None and not asked.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(asked.name)
        for mine in ("", *asked.extras):
            if (name, mine) not in seen:
                seen.add((name, mine))
                found[name] = distribution(name)
                waiting += [(Requirement(text), mine) for text in found[name].requires or ()]
    return found


def link(found: Distribution, site: Path) -> None:
    """Link what a distribution installed; in a folder that several share, what is its own there."""
    for file in {part for path in found.files or () for part in _own(found, path.parts)}:
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(found.locate_file(file))


def _own(found: Distribution, parts: tuple[str, ...]) -> Iterator[Path]:
    """Yield the part of a path that is a distribution's own: all below it is."""
    if parts[0] in {"..", "__pycache__"} or Path(parts[0]).is_absolute():
        return
    depth = 1
    while depth < len(parts):
        folder = Path(str(found.locate_file(Path(*parts[:depth]))))
        if folder.suffix in {".dist-info", ".libs"} or (folder / "__init__.py").exists():
            break
        depth += 1
    yield Path(*parts[:depth])


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (n for n in packed.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(packed.read(name)).get_all("Requires-Dist") or []


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
    for name in EXAMPLES:
        shutil.copytree(ROOT / "docs" / "examples" / name, home / name, ignore=leave)
    made = build([source, *(home / name for name in EXAMPLES)], wheels)
    (wheel,) = (path for path in made if path.name.startswith("ars_kit-"))
    venv.create(home / "env", with_pip=False, symlinks=True)
    scripts = home / "env" / ("Scripts" if os.name == "nt" else "bin")
    there, install = ("--python", str(scripts / "python")), ("install", "--quiet", "--no-compile")
    if WHOLE:
        bounds = ("--constraint", str(ROOT / "constraints.txt"))
        pip(*there, *install, *bounds, *map(str, made), "pytest")
    else:
        (site,) = (home / "env").glob("Lib/site-packages" if os.name == "nt" else "lib/*/site-*")
        for found in needed([*requirements(wheel), "pytest"]).values():
            link(found, site)
        pip(*there, *install, "--no-deps", *map(str, made))
        pip(*there, "check")
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


def test_the_oldest_versions_tested_are_the_oldest_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    kinds = ("bench", "lm-eval", "lora", "lowbit")
    asked = [*project["dependencies"], *(text for kind in kinds for text in extras[kind])]
    bounds = {
        f"{wanted.name}=={bound.version}"
        for wanted in map(Requirement, asked)
        for bound in wanted.specifier
        if bound.operator == ">="
    }
    assert {*(ROOT / "constraints-oldest.txt").read_text("utf-8").split()} == bounds
