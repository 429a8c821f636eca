"""Nested training state as safetensors plus JSON: no pickle, exact round trip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Json = Any


def pack(tree: Any) -> tuple[dict[str, Tensor], Json]:
    """Split ``tree`` into its tensors by path and a JSON skeleton.

    Dicts (with text or whole-number keys), lists, tuples, None, booleans, numbers, text and
    tensors are kept exactly.

    Raises:
        TypeError: anything else, named by its path.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Json:
        if isinstance(value, Tensor):
            # safetensors refuses tensors that share memory; a copy is what was meant anyway.
            tensors[path] = value.detach().cpu().contiguous().clone()
            return {"tensor": path}
        if value is None or isinstance(value, bool | int | str):
            return {"value": value}
        if isinstance(value, float):
            return {"value": value} if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, Mapping):
            items = []
            for key, inner in value.items():
                if isinstance(key, bool) or not isinstance(key, str | int):
                    raise TypeError(f"{path or 'state'}: a {type(key).__name__} as a key")
                items.append([key, walk(inner, f"{path}/{key}")])
            return {"dict": items}
        if isinstance(value, list | tuple):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [walk(inner, f"{path}/{i}") for i, inner in enumerate(value)]}
        raise TypeError(f"{path or 'state'} holds a {type(value).__name__}, which cannot be saved")

    return tensors, walk(tree, "")


def unpack(tensors: Mapping[str, Tensor], skeleton: Json) -> Any:
    """Put back together what :func:`pack` took apart."""
    ((kind, body),) = skeleton.items()
    if kind == "tensor":
        return tensors[body]
    if kind == "value":
        return body
    if kind == "float":
        return float(body)
    if kind == "dict":
        return {key: unpack(tensors, inner) for key, inner in body}
    parts = [unpack(tensors, inner) for inner in body]
    return tuple(parts) if kind == "tuple" else parts
