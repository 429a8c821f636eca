"""Text that every machine has: the documentation of Python's standard library."""

from __future__ import annotations

import ast
import inspect
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ars_kit.spec import Document

SKIPPED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__",
     "ensurepip", "turtledemo", "pydoc_data"}
)  # fmt: skip


class StandardLibrary:
    """Each topic of ``pydoc_data`` is a document, and so are each module's docstrings.

    Modules are parsed, never imported: importing some of them does things.
    """

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_path("stdlib"))

    def fingerprint(self) -> dict[str, Any]:
        """Return the interpreter's version and where its library lies."""
        return {"stdlib": platform.python_version(), "path": str(self.root)}

    def documents(self) -> Iterator[Document]:
        """Yield the topics, then the modules, each in alphabetical order."""
        try:
            from pydoc_data import topics as module  # noqa: PLC0415 -- 700 KB; some builds lack it

            topics: dict[str, str] = module.topics
        except ImportError:
            topics = {}
        for name in sorted(topics):
            yield Document(topics[name], f"topic:{name}")
        for path in sorted(self._modules()):
            text = docstrings(path.read_bytes())
            if text:
                yield Document(text, f"module:{path.relative_to(self.root).as_posix()}")

    def _modules(self) -> Iterator[Path]:
        for folder, below, names in os.walk(self.root):
            below[:] = [name for name in below if name not in SKIPPED]
            yield from (Path(folder, name) for name in names if name.endswith(".py"))


def docstrings(source: bytes) -> str:
    """Return every docstring of a module's source under the name it documents."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""  # a deliberately broken fixture
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False)
            if doc:
                name = "" if isinstance(node, ast.Module) else f"{node.name}\n"
                parts.append(name + inspect.cleandoc(doc))
    return "\n\n".join(parts)
