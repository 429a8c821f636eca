"""The chosen data source, named where it breaks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from ars_kit.host import Host
from ars_kit.schema import Choice, parse_choice
from ars_kit.spec import DataSource, Document

FILES = "files"
"""The source of what is no source's name: a path."""

_END = object()


class NamedSource:
    """A plugin's data source; what it raises comes out as a complaint about that plugin.

    Args:
        host: the installed plugins.
        choice: the source, and its settings.

    Raises:
        PluginError: nobody offers it, or it could not be made.
        ConfigError: a setting does not fit.
    """

    def __init__(self, host: Host, choice: Choice) -> None:
        self._host, self._name = host, choice.name
        self._source: DataSource = host.make("data_sources", choice)

    def fingerprint(self) -> Mapping[str, Any]:
        """Return the source's own."""
        with self._host.blaming("data_sources", self._name, "saying what it holds"):
            found = dict(self._source.fingerprint())
            json.dumps(found, sort_keys=True, default=str)  # or the cache could not be named by it
            return found

    def documents(self) -> Iterator[Document]:
        """Yield the source's own."""
        with self._host.blaming("data_sources", self._name, "at its first document"):
            documents = iter(self._source.documents())
        number = 0
        while True:
            with self._host.blaming("data_sources", self._name, f"at document {number}"):
                document: object = next(documents, _END)
                if document is _END:
                    return
                if not isinstance(document, Document) or not isinstance(document.text, str):
                    raise TypeError(f"it yielded {document!r:.80}, no Document of text")
                if not isinstance(cast("Any", document.origin), str):
                    raise TypeError(f"the origin of a document is no text: {document.origin!r}")
            yield document
            number += 1


def parse_source(text: str, host: Host) -> Choice:
    """Read ``--data``: a source's name, ``hf:owner/name``, ``NAME:key=value``, or a path."""
    name, colon, rest = text.partition(":")
    if name not in host.shelves["data_sources"]:
        return Choice(FILES, {"path": text})
    if colon and rest and "=" not in rest.partition(",")[0]:
        return Choice(name, {"name" if name != FILES else "path": rest})
    return parse_choice(text)
