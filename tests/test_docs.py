from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch

from ars_kit.damping import DampedOptimizer
from ars_kit.host import Host, Plugin
from ars_kit.schema import Choice
from ars_kit.spec import Hooks

ROOT = Path(__file__).parent.parent


def test_every_hook_is_documented_with_its_signature() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    for name, hook in vars(Hooks).items():
        if name.startswith("arskit_"):
            answer = inspect.signature(hook).return_annotation
            assert f"### `{name}() -> {answer}`" in page


def test_the_readmes_gate_works() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    module: Any = type("Module", (), {})()
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    module.arskit_gates = namespace["arskit_gates"]
    host = Host()
    host.register(module, Plugin("mine", "mine", "1"))
    assert not host.quarantined
    gate = host.make("gates", Choice("halve-early", {"steps": "1"}))
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = DampedOptimizer(torch.optim.SGD([weight], lr=0.1), {"halve-early": gate})
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step(loss=torch.ones(()))
    assert abs(weight.item() - 0.85) < 1e-6
