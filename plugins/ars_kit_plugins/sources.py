"""The built-in data sources, as offers."""

from __future__ import annotations

from ars_kit.spec import DataSource, Offer, hookimpl


def stdlib() -> DataSource:
    """Documentation of Python's standard library, which every machine already has."""
    from ars_kit_plugins.stdlib_docs import StandardLibrary  # noqa: PLC0415 -- only when chosen

    return StandardLibrary()


def files(*, path: str, column: str = "text") -> DataSource:
    """A file or a folder of .txt, .md, .jsonl, .json, .csv (each gzipped or not) or .parquet.

    Args:
        path: the file or the folder, which is searched through.
        column: where the text stands in a table.
    """
    from ars_kit_plugins.text_files import TextFiles  # noqa: PLC0415 -- only when chosen

    return TextFiles(path, column)


def hub(
    *,
    name: str,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    revision: str | None = None,
) -> DataSource:
    """A dataset of the Hugging Face hub, streamed.

    Args:
        name: owner/name.
        config: the dataset's configuration.
        split: which of its splits.
        column: where the text stands.
        revision: branch, tag or commit.
    """
    from ars_kit_plugins.hubs import HubDataset  # noqa: PLC0415 -- only when chosen

    return HubDataset(name, config, split, column, revision)


def kaggle(*, name: str, column: str = "text") -> DataSource:
    """A Kaggle dataset, downloaded by kagglehub.

    Args:
        name: owner/name.
        column: where the text stands in a table.
    """
    from ars_kit_plugins.hubs import KaggleDataset  # noqa: PLC0415 -- only when chosen

    return KaggleDataset(name, column)


@hookimpl
def arskit_data_sources() -> list[Offer[DataSource]]:
    """Offer the built-in data sources."""
    return [
        Offer("stdlib", "documentation of Python's standard library on this machine", stdlib),
        Offer("files", "text files and tables under a path", files),
        Offer("hf", "a dataset of the Hugging Face hub", hub),
        Offer("kaggle", "a Kaggle dataset (extra: kaggle)", kaggle),
    ]
