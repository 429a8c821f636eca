"""The strategy keeps every strategy's rules, and does what it says."""

from __future__ import annotations

from ars_kit.shapes import embedded_config
from ars_kit.testing import check_strategy

from arskit_on_top import OnTop


def test_the_strategy_keeps_the_rules() -> None:
    check_strategy(OnTop)


def test_a_wider_child_is_refused_in_words() -> None:
    parent, child = (embedded_config(d, vocab_size=300, context=32) for d in (4, 18))
    assert OnTop().supports(parent, child) == "hidden_size changes, and only the depth may"
