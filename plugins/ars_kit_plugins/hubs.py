"""Data from hubs: Hugging Face through ``datasets``, Kaggle through ``kagglehub``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ars_kit.errors import DataError
from ars_kit.spec import Document
from ars_kit_plugins.text_files import TextFiles, one_line, quiet_datasets, table_rows

TIMEOUT = 10.0
"""Seconds to wait for a hub's first answer."""


class HubDataset:
    """A dataset of the Hugging Face hub, streamed row by row.

    Args:
        name: owner/name.
        config: the dataset's configuration, or None.
        split: which of its splits.
        column: where the text stands.
        revision: branch, tag or commit.
    """

    def __init__(
        self, name: str, config: str | None, split: str, column: str, revision: str | None
    ) -> None:
        self.name, self.config, self.split = name, config, split
        self.column, self.revision = column, revision

    def fingerprint(self) -> dict[str, Any]:
        """Return the dataset's name and the commit it is at; that commit is what will be read.

        Raises:
            DataError: the hub cannot be reached, or has no such dataset.
        """
        import huggingface_hub  # noqa: PLC0415 -- slow to import

        try:
            info = huggingface_hub.HfApi().dataset_info(
                self.name, revision=self.revision, timeout=TIMEOUT
            )
        except Exception as error:  # httpx's, the hub's and the operating system's share no class
            raise DataError(
                f"cannot reach dataset hf:{self.name}: {one_line(error)} (check the name and the "
                "network; a private one needs HF_TOKEN)"
            ) from error
        self.revision = info.sha
        return {
            "hf": self.name,
            "config": self.config,
            "split": self.split,
            "column": self.column,
            "commit": info.sha,
        }

    def documents(self) -> Iterator[Document]:
        """Yield one document a row.

        Raises:
            DataError: it has no such configuration, split or column, or breaks off.
        """
        import datasets  # noqa: PLC0415 -- slow to import

        try:
            with quiet_datasets():
                rows = datasets.load_dataset(
                    self.name,
                    self.config,
                    split=self.split,
                    revision=self.revision,
                    streaming=True,
                )
                yield from table_rows(rows, self.column, f"hf:{self.name}")
        except DataError:
            raise
        except Exception as error:  # every file format's own, and the network's
            raise DataError(f"cannot read dataset hf:{self.name}: {one_line(error)}") from error


class KaggleDataset:
    """A dataset of Kaggle, downloaded once by kagglehub, then read as files.

    Args:
        name: owner/name.
        column: where the text stands in a table.
    """

    def __init__(self, name: str, column: str) -> None:
        self.name, self.column = name, column
        self._files: TextFiles | None = None

    def files(self) -> TextFiles:
        """Download the dataset, unless kagglehub has it already.

        Raises:
            DataError: kagglehub is not installed, or the dataset cannot be had.
        """
        if self._files is None:
            try:
                import kagglehub  # noqa: PLC0415 -- an extra
            except ImportError:
                raise DataError(
                    f"kaggle:{self.name} needs an extra; install it: pip install 'ars-kit[kaggle]'"
                ) from None
            try:
                path = kagglehub.dataset_download(self.name)
            except Exception as error:  # requests', Kaggle's and the operating system's
                raise DataError(f"cannot download kaggle:{self.name}: {one_line(error)}") from error
            self._files = TextFiles(str(path), self.column)
        return self._files

    def fingerprint(self) -> dict[str, Any]:
        """Return each file's path, size and time of change."""
        return {"kaggle": self.name, **self.files().fingerprint()}

    def documents(self) -> Iterator[Document]:
        """Yield the files' texts and the tables' rows."""
        return self.files().documents()
