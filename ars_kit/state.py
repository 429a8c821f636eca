"""Nested training state as safetensors plus JSON: no pickle, exact round trip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Json = Any


def pack(tree: Any) -> tuple[dict[str, Tensor], Json]:
    """Split ``tree`` into its tensors by path and a JSON skeleton.

    Dicts (with text or whole-number keys, in their order), lists, tuples, None, booleans, whole and
    floating-point numbers, text, and tensors of any dtype and shape are kept exactly. Tensors come
    back contiguous, on the CPU, each with memory of its own.

    Raises:
        TypeError: anything else, named by its path.
    """
    tensors = _Tensors()
    skeleton = _walk(tree, "", tensors)
    return tensors.by_name, skeleton


class _Tensors:
    """Tensors under names of their own, none sharing memory."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._storages: set[int] = set()

    def add(self, tensor: Tensor, path: str) -> str:
        """Keep a tensor; returns the name it got."""
        flat = tensor.detach().cpu().contiguous()
        storage = flat.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory; only for those is a copy worth its room.
        flat = flat.clone() if storage in self._storages else flat
        self._storages.add(storage)
        while path in self.by_name:  # {"a/b": x} and {"a": {"b": y}}, or {1: x} and {"1": y}
            path += "'"
        self.by_name[path] = flat
        return path


def _walk(value: Any, path: str, tensors: _Tensors) -> Json:
    if isinstance(value, Tensor):
        return {"tensor": tensors.add(value, path)}
    if value is None or isinstance(value, bool | int | str):
        return {"value": value}
    if isinstance(value, float):
        return {"value": value} if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Mapping):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise TypeError(f"{path or 'state'} has a {type(key).__name__} as a key")
        return {"dict": [[k, _walk(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    # A named tuple would come back as a plain one.
    if type(value) in (list, tuple):
        inner = [_walk(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return {type(value).__name__: inner}
    raise TypeError(f"{path or 'state'} holds a {type(value).__name__}, which cannot be saved")


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
