"""Regional compilation: the decoder layers alone, so that growth compiles no shape a second time.

All layers of a shape share one compiled program, whatever their number, and so do the members of a
family: an heir that is only deeper compiles nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ars_kit.errors import ArsKitError

SHAPES = 64
"""Shapes of layers that one process compiles at most; torch's own limit, 8, is for one model."""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the outermost repeated blocks: what stands in a list of modules of one class."""
    if isinstance(model, nn.ModuleList) and len({type(child) for child in model}) == 1:
        return list(model)
    return [layer for child in model.children() for layer in layers_of(child)]


@contextmanager
def compiled(model: nn.Module, *, backend: str = "inductor") -> Iterator[None]:
    """Compile the layers of a model, in place, for as long as this lasts.

    Hooks of a layer (FSDP's, checkpointing's) stay outside of what is compiled.

    Args:
        model: of transformers.
        backend: of ``torch.compile``.

    Raises:
        ArsKitError: there is no working compiler for this device.
    """
    import torch._dynamo  # noqa: PLC0415 -- slow to import, and needed by nobody else

    layers = layers_of(model)
    for layer in layers:
        # Static shapes: a symbolic width would make every later member a slower program.
        layer.forward = torch.compile(layer.forward, dynamic=False, backend=backend)
    try:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):  # noqa: SLF001 -- its only name
            yield
    except torch._dynamo.exc.BackendCompilerFailed as error:  # noqa: SLF001 -- its only name
        reason = str(error).strip().splitlines()[0]
        raise ArsKitError(
            f"cannot compile for this device: {reason}. Install a C++ compiler (on an NVIDIA GPU "
            "triton), or run without --compile"
        ) from error
    finally:
        for layer in layers:
            del layer.forward


def eagerly(*, wanted: bool) -> Any:
    """Return a context in which compiled layers run as they are written: judging has other shapes.

    Args:
        wanted: whether anything is compiled; where not, the compiler is not even imported.
    """
    return torch.compiler.set_stance("force_eager") if wanted else nullcontext()
