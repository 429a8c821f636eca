"""Nested training state as safetensors plus JSON: no pickle, exact round trip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ars_kit.factors import is_quantised

Json = Any


def pack(tree: Any) -> tuple[dict[str, Tensor], Json]:
    """Split ``tree`` into its tensors by path and a JSON skeleton.

    Dicts (with text or whole-number keys, in their order), lists, tuples, None, booleans, whole and
    floating-point numbers, text, and tensors of any dtype and shape are kept exactly. Tensors come
    back contiguous, on the CPU, each with memory of its own. torchao's optimizer states of few bits
    are kept as the tensors they are made of; a sharded tensor stays as it is.

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
        flat = tensor.detach()
        if not hasattr(tensor, "device_mesh"):
            flat = flat.cpu().contiguous()
            storage = flat.untyped_storage().data_ptr()
            # safetensors refuses shared memory; only for that is a copy worth its room.
            flat = flat.clone() if storage in self._storages else flat
            self._storages.add(storage)
        while path in self.by_name:  # {"a/b": x} and {"a": {"b": y}}, or {1: x} and {"1": y}
            path += "'"
        self.by_name[path] = flat
        return path


def _walk(value: Any, path: str, tensors: _Tensors) -> Json:
    if isinstance(value, Tensor) and is_quantised(value):
        names, facts = value.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: getattr(value, name) for name in names}
        kind = f"{type(value).__module__}:{type(value).__name__}"
        facts = {"kind": kind, "facts": [_plain(fact) for fact in facts], "parts": parts}
        return {"quantised": _walk(facts, path, tensors)}
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
    if kind == "quantised":
        return _quantised(**unpack(tensors, body))
    if kind == "dict":
        return {key: unpack(tensors, inner) for key, inner in body}
    parts = [unpack(tensors, inner) for inner in body]
    return tuple(parts) if kind == "tuple" else parts


def _plain(fact: Any) -> Json:
    """Spell a shape or a dtype in what JSON has; a truth is one already."""
    if isinstance(fact, torch.dtype):
        return str(fact).removeprefix("torch.")
    return list(fact) if isinstance(fact, torch.Size) else fact


def _fact(plain: Json) -> Any:
    if isinstance(plain, str):
        return getattr(torch, plain)
    return torch.Size(plain) if isinstance(plain, list) else plain


def _quantised(kind: str, facts: list[Json], parts: dict[str, Tensor]) -> Tensor:
    """Put a state of few bits together.

    Raises:
        TypeError: it is none that torch itself would load without running code.
    """
    module, _, name = kind.partition(":")
    made = getattr(import_module(module), name) if module.startswith("torchao.optim.") else None
    if made is None or made not in torch.serialization.get_safe_globals():
        raise TypeError(f"a training state holds {kind!r}, which is not known here")
    whole: Tensor = made.__tensor_unflatten__(parts, [_fact(fact) for fact in facts])
    return whole
