"""Conformance kits for plugin authors: does it keep the promises that the training loop relies on?

.. code-block:: python

    def test_my_gate() -> None:
        check_gate(lambda: MyGate(limit=0.5))


    def test_my_strategy() -> None:
        check_strategy(lambda: MyStrategy(rewarm_steps=5))
"""

from ars_kit.testing.gates import check_gate, loss_sequences
from ars_kit.testing.rules import WAITS, ConformanceError
from ars_kit.testing.strategies import check_strategy

__all__ = ["WAITS", "ConformanceError", "check_gate", "check_strategy", "loss_sequences"]
