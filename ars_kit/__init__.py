"""Train a family of causal language models, each inheriting its predecessor."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ars-kit")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
