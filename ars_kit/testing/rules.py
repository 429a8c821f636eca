"""What every conformance kit needs: the complaint, and a watch over what the host waits for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ars_kit.errors import ArsKitError

WAITS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"})
"""Operators whose result the host must wait for: ``item()``, ``float()``, ``if tensor:``, masks."""

READS = frozenset({"tolist", "numpy", "cpu", "__array__", "__dlpack__", "__repr__"})
"""Methods that bring numbers to the host, and on the CPU go through no operator."""


class ConformanceError(ArsKitError, AssertionError):
    """A plugin breaks a rule; the message names the rule, the place and the value."""


@dataclass(slots=True)
class Watch:
    """What was seen: the first operator or method that makes the host wait for a device."""

    found: str | None = None

    def saw(self, name: str) -> None:
        """Note one, if it is the first."""
        self.found = self.found or name


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch for waits on the CPU too, where waiting costs nothing and so raises nothing."""
    watch = Watch()
    methods, operators = _Methods(watch), _Operators(watch)
    with methods, operators:
        yield watch


class _Methods(TorchFunctionMode):
    """Sees what is called on tensors."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.watch.saw(name)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Sees what is computed, by whatever way it was called."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in WAITS:
            self.watch.saw(name)
        return func(*args, **(kwargs or {}))
