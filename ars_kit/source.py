"""The chosen data source, named where it breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ars_kit.host import Host
from ars_kit.schema import Choice
from ars_kit.spec import DataSource, Document


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
            return dict(self._source.fingerprint())

    def documents(self) -> Iterator[Document]:
        """Yield the source's own."""
        with self._host.blaming("data_sources", self._name, "at its first document"):
            documents = iter(self._source.documents())
        number = 0
        while True:
            with self._host.blaming("data_sources", self._name, f"at document {number}"):
                document: object = next(documents, None)
                if document is None:
                    return
                if not isinstance(document, Document) or not isinstance(document.text, str):
                    raise TypeError(f"it yielded {document!r:.80}, no Document of text")
            yield document
            number += 1
