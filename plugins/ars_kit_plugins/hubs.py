"""Data from hubs: Hugging Face through ``datasets``, Kaggle through ``kagglehub``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ars_kit.errors import DataError
from ars_kit.spec import Document
from ars_kit_plugins.text_files import TextFiles, table_rows


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
        """Return the dataset's name and the commit it is at.

        Raises:
            DataError: the hub cannot be reached, or has no such dataset.
        """
        import huggingface_hub  # noqa: PLC0415 -- slow to import

        try:
            info = huggingface_hub.HfApi().dataset_info(
                self.name, revision=self.revision, timeout=10
            )
        except Exception as error:
            raise DataError(f"cannot reach dataset hf:{self.name}: {_line(error)}") from error
        return {
            "hf": self.name,
            "config": self.config,
            "split": self.split,
            "column": self.column,
            "commit": info.sha,
        }

    def documents(self) -> Iterator[Document]:
        """Yield one document a row."""
        import datasets  # noqa: PLC0415 -- slow to import

        try:
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
        except Exception as error:
            raise DataError(f"cannot read dataset hf:{self.name}: {_line(error)}") from error


def kaggle_files(name: str, column: str) -> TextFiles:
    """Download a Kaggle dataset (kagglehub keeps it in its cache) and read its files.

    Raises:
        DataError: kagglehub is not installed, or the dataset cannot be had.
    """
    try:
        import kagglehub  # noqa: PLC0415 -- an extra
    except ImportError:
        raise DataError(
            f"kaggle:{name} needs an extra; install it: pip install 'ars-kit[kaggle]'"
        ) from None
    try:
        path = kagglehub.dataset_download(name)
    except Exception as error:
        raise DataError(f"cannot download kaggle:{name}: {_line(error)}") from error
    return TextFiles(path, column)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or repr(error)
