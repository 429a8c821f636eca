"""Text that every machine has: the documentation of Python's standard library."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ars_kit.errors import DataError
from ars_kit.spec import Document

SKIPPED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__",
     "ensurepip", "turtledemo", "pydoc_data"}
)  # fmt: skip


class StandardLibrary:
    """Each topic of ``pydoc_data`` is a document, and so are each module's docstrings.

    Modules are parsed, never imported: importing some of them does things.

    Args:
        root: the library's folder; this interpreter's unless given.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(sysconfig.get_path("stdlib"))

    def fingerprint(self) -> dict[str, Any]:
        """Return the interpreter's version and a hash of its modules' names, sizes and times.

        Raises:
            DataError: this Python comes without its sources and its documentation.
        """
        modules = self._modules()
        if not modules and not _topics():
            raise DataError(
                f"this Python has no library sources in {self.root} and no pydoc topics to train "
                "on; name a text with --data PATH"
            )
        stats = [(p.relative_to(self.root).as_posix(), p.stat()) for p in modules]
        listing = repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats])
        return {
            "stdlib": platform.python_version(),
            "modules": hashlib.sha256(listing.encode()).hexdigest(),
        }

    def documents(self) -> Iterator[Document]:
        """Yield the topics, then the modules, each in alphabetical order.

        Raises:
            DataError: a module cannot be read.
        """
        topics = _topics()
        for name in sorted(topics):
            yield Document(topics[name], f"topic:{name}")
        for path in self._modules():
            try:
                text = docstrings(path.read_bytes())
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror or error}") from error
            if text:
                yield Document(text, f"module:{path.relative_to(self.root).as_posix()}")

    def _modules(self) -> list[Path]:
        found: list[Path] = []
        for folder, below, names in os.walk(self.root):
            below[:] = [name for name in below if name not in SKIPPED]
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        return sorted(found)


def docstrings(source: bytes) -> str:
    """Return every docstring of a module's source, in its order, under the name it documents."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in others' code
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""  # a deliberately broken fixture
    return "\n\n".join(_of(tree))


def _of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node)
        if doc:
            yield doc if isinstance(node, ast.Module) else f"{node.name}\n{doc}"
    elif isinstance(node, ast.expr):
        return  # nothing below an expression is documented
    for child in ast.iter_child_nodes(node):
        yield from _of(child)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data import topics  # noqa: PLC0415 -- 700 KB; some builds lack it
    except ImportError:
        return {}
    found: dict[str, str] = topics.topics
    return found
