"""A plugin package to begin with: installable, tested, and right before its first edit.

What differs between kinds of offers stands in :mod:`ars_kit.kinds`; the rest of a package is the
same for all.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template

from ars_kit.errors import ConfigError
from ars_kit.kinds import KINDS
from ars_kit.schema import did_you_mean
from ars_kit.workbench import workbench

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
            f"There are: {', '.join(KINDS)}"
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
        with workbench(into) as scratch:
            for path, text in files.items():
                file = scratch / target.name / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8", newline="\n")
            (scratch / target.name).rename(target)
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
