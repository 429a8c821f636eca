"""A plugin package to begin with: installable, tested, and right before its first edit.

Each kind of offer that can be begun is one :class:`Kind` in :data:`KINDS`: the text of its module,
of its test and of an example of its use. The rest of a package is the same for every kind.
"""

from __future__ import annotations

import ast
import keyword
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from ars_kit.errors import ConfigError
from ars_kit.schema import did_you_mean


@dataclass(frozen=True, slots=True)
class Kind:
    """The texts of a package that offers one thing; each is a :class:`string.Template`.

    They are filled with ``$name`` (what the user types), ``$package``, ``$distribution`` and
    ``$type`` (the class).

    Attributes:
        noun: what is offered, for sentences.
        shelf: where the host puts it, the part of the hook's name after ``arskit_``.
        usage: a command that uses it.
        module: its source.
        test: its test.
    """

    noun: str
    shelf: Literal["gates", "strategies", "evaluators"]
    usage: str
    module: str
    test: str


GATE = Kind(
    noun="damping gate",
    shelf="gates",
    usage="arskit run --gate $name:steps=20",
    module='''\
"""The damping gate $name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ars_kit.spec import DampingGate, Offer, StepSignal, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class $type:
    """Halve the step size of the first steps.

    Args:
        steps: how many.
    """

    acts_on = "step"

    def __init__(self, *, steps: int = 10) -> None:
        self.steps = steps

    def __call__(self, signal: StepSignal) -> Tensor:
        """Return this step's factor, made on its device without waiting for it."""
        return signal.loss.new_full((), 0.5 if signal.step < self.steps else 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the gate remembers nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""


@hookimpl
def arskit_gates() -> list[Offer[DampingGate]]:
    """Offer the gate."""
    return [Offer("$name", "halve the first steps", $type)]
''',
    test='''\
"""The gate keeps every gate's rules, and does what it says."""

from __future__ import annotations

import pytest
import torch
from ars_kit.damping import DampedOptimizer
from ars_kit.testing import check_gate

from $package import $type


def test_the_gate_keeps_the_rules() -> None:
    check_gate($type)


def test_the_first_step_is_halved() -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    gates = {"$name": $type(steps=1)}
    optimizer = DampedOptimizer(torch.optim.SGD([weight], lr=0.1), gates)
    for _ in range(2):
        weight.grad = torch.ones(())
        optimizer.step(loss=torch.ones(()))
    assert weight.item() == pytest.approx(1 - 0.05 - 0.1)
''',
)

KINDS: Mapping[str, Kind] = {"gate": GATE}

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "The $noun $name for ars-kit."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["ars-kit>=0.1"]

[project.optional-dependencies]
test = ["pytest>=8.4"]

[project.entry-points.ars_kit]
$name = "$package"

[tool.setuptools]
package-dir = { "" = "src" }
py-modules = ["$package"]
"""

README = """\
# $distribution

The $noun `$name` for ars-kit.

    pip install --editable '.[test]'
    pytest
    arskit plugins show $name
    arskit plugins check $name
    $usage

The source is `src/$package.py`. The keyword-only parameters of the class are its settings, and its
docstring is what `arskit plugins show` prints.
"""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def package_files(kind: str, name: str) -> dict[str, str]:
    """Return the files of a new package by path.

    Args:
        kind: of what it offers, one of :data:`KINDS`.
        name: of what it offers.

    Raises:
        ConfigError: the kind is unknown, or the name cannot be a package's and a class's.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"no package can be begun for {kind!r}{did_you_mean(kind, KINDS)}. "
            f"There is: {', '.join(KINDS)}"
        )
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be a name: write lower-case letters and digits, the first a letter, "
            "in words joined by dashes"
        )
    texts = KINDS[kind]
    fields = {
        "name": name,
        "noun": texts.noun,
        "distribution": distribution_of(name),
        "package": f"arskit_{name.replace('-', '_')}",
        "type": "".join(word.capitalize() for word in name.split("-")),
    }
    fields["usage"] = Template(texts.usage).substitute(fields)
    files = {
        "pyproject.toml": PYPROJECT,
        "README.md": README,
        f"src/{fields['package']}.py": texts.module,
        f"tests/test_{name.replace('-', '_')}.py": texts.test,
    }
    made = {path: Template(text).substitute(fields) for path, text in files.items()}
    if keyword.iskeyword(fields["type"]) or fields["type"] in _imported(made):
        raise ConfigError(f"{name!r} cannot be a name: the class {fields['type']} exists already")
    return made


def write_package(kind: str, name: str, into: Path) -> Path:
    """Write a new package whole, or nothing; returns its directory.

    Args:
        kind: of what it offers, one of :data:`KINDS`.
        name: of what it offers.
        into: the directory to put it in; made where it is missing.

    Raises:
        ConfigError: as :func:`package_files`, or there is something in its place, or the
            directory cannot be written.
    """
    files = package_files(kind, name)
    target = into / distribution_of(name)
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} already exists; remove it, or choose another --into")
    try:
        into.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".arskit-", dir=into))
        try:
            for path, text in files.items():
                file = scratch / target.name / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8", newline="\n")
            (scratch / target.name).rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def distribution_of(name: str) -> str:
    """Return the distribution, and so the directory, that offers ``name``."""
    return f"arskit-{name}"


def _imported(files: Mapping[str, str]) -> set[str]:
    """Return the names that the Python files import."""
    trees = [ast.parse(text) for path, text in files.items() if path.endswith(".py")]
    return {
        alias.asname or alias.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("arskit_")
        for alias in node.names
    }
