"""Base optimizers over sharded weights (two processes, gloo): as over whole ones, or refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_two

TRAIN = ("adamw", "sgd", "sgd:momentum=0", "muon")


class LocalNorm(torch.optim.SGD):
    """Divides by the norm of what this process holds, as if it were the whole."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                own = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                p.grad = p.grad / own.norm()
        return super().step(closure)


def raising(_: Any) -> Any:
    raise NotImplementedError("no sharded weights\nand a second line")


OWN = {"local-norm": lambda groups: LocalNorm(groups, lr=1e-3), "raising": raising}
REFUSED = {
    "adafactor": "",
    "adamw-8bit": "moments of few bits are not kept in parts",
    "adamw-4bit": "moments of few bits are not kept in parts",
    "local-norm": "it steps them otherwise than whole ones",
    "raising": "it ends in NotImplementedError: no sharded weights)",
}


class Uneven(torch.nn.Module):
    """Has weights of fewer rows than processes, of a number that does not divide, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.one = torch.nn.Linear(5, 7), torch.nn.Linear(7, 1)
        self.factor = torch.nn.Buffer(torch.tensor(3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.one(self.many(x))


def dealt_out(rank: int) -> bool:
    """Whether parts of weights that the first process alone has compute what the whole does."""
    from accelerate import init_empty_weights
    from torch.distributed.fsdp import fully_shard

    from ars_kit.sharding import materialise, receive_weights, scattered

    torch.manual_seed(0)
    whole, x = Uneven(), torch.ones(2, 5)
    with init_empty_weights(include_buffers=False):
        model = Uneven()
    weights = dict((model if rank else whole).named_parameters())
    weights = {name: w.detach() for name, w in weights.items()}
    fully_shard(model.many)
    fully_shard(model)
    materialise(model, torch.device("cpu"))
    receive_weights(model, weights)
    same = torch.equal(model(x), whole(x))
    kept = torch.tensor([3.0])
    same &= scattered(kept, model.many.weight) is kept  # a step count, say
    plain = torch.arange(4.0)
    sent = scattered(plain.to("meta") if rank else plain, torch.zeros(4))
    return same and torch.equal(sent, plain)


def rank_main(rank: int, folder: Path) -> None:
    from ars_kit import shardable
    from ars_kit.errors import ConfigError
    from ars_kit.host import Host
    from ars_kit.schema import parse_choice
    from ars_kit.settings import OptimizerSettings

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    accelerator: Any = SimpleNamespace(is_fsdp2=True, device=torch.device("cpu"), num_processes=2)
    found = {"dealt out": str(dealt_out(rank))}
    host, make = Host.installed(), shardable.make_base
    for name in (*TRAIN, *REFUSED):
        own = OWN.get(name)
        shardable.make_base = (lambda _, __, groups, own=own: own(groups)) if own else make
        settings = OptimizerSettings(base=parse_choice("adamw" if own else name))
        try:
            shardable.require_shardable(host, settings, accelerator)
            found[name] = ""
        except ConfigError as error:
            found[name] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each process said of each optimizer, nothing where it trains."""
    folder = tmp_path_factory.mktemp("shardable")
    run_two(__file__, folder)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    found: dict[str, str] = first
    return found


def test_weights_of_any_shape_are_dealt_out_as_they_are(said: dict[str, str]) -> None:
    assert said["dealt out"] == "True"


@pytest.mark.parametrize("name", TRAIN)
def test_what_steps_parts_as_the_whole_trains(said: dict[str, str], name: str) -> None:
    assert said[name] == ""


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_is_refused_with_the_reason(said: dict[str, str], name: str) -> None:
    assert "cannot train weights that FSDP2 shards (" in said[name]
    assert REFUSED[name] in said[name]
    assert "\n" not in said[name]


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
