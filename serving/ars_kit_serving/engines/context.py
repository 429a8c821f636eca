"""How long a sequence may be."""

from __future__ import annotations

from typing import Any

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
