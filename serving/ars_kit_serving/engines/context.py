"""How long a sequence may be, and whether all of it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ars_kit.errors import ConfigError
from ars_kit.spec import Service

UNBOUNDED = 4096
"""Tokens for a model whose configuration names no limit."""


def context_of(config: Any, service: Service) -> int:
    """Return the tokens a sequence may have: what was asked for, or what the model was made for.

    Args:
        config: a transformers configuration.
        service: what was asked for.

    Raises:
        ConfigError: it was asked for more than the model was made for.
    """
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    asked = service.context
    if own is not None and asked is not None and asked > own:
        raise ConfigError(
            f"{service.name} was made for {own} tokens of context, not for {asked}; "
            "give a smaller --context"
        )
    return int(asked or own or UNBOUNDED)


def keeps_all(config: Any) -> bool:
    """Whether a model's layers keep all keys and values of a sequence, and nothing else.

    Args:
        config: a transformers configuration.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def depends_on_the_longest(config: Any) -> bool:
    """Whether a batch's longest sequence decides how all of it encodes positions (LongRoPE).

    Args:
        config: a transformers configuration.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    return any(kind.get("rope_type") == "longrope" for kind in kinds)


def require_exportable(config: Any, form: str) -> None:
    """Refuse what an export format cannot hold, and no comparison of short texts would show.

    Raises:
        ConfigError: the model's cache is more than all keys and values, or its sequences do not
            keep to themselves.
    """
    if depends_on_the_longest(config):
        raise ConfigError(
            f"{form} cannot export {config.model_type}: the longest sequence of a batch would "
            "decide how the others encode their positions (LongRoPE)"
        )
    if not keeps_all(config):
        raise ConfigError(
            f"{form} cannot export {config.model_type}: its layers keep more than all keys and "
            "values (sliding windows, or another state)"
        )
