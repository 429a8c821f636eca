"""ARS on two processes (gloo, CPU): DDP and FSDP2 damp alike, as one process would, and resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_two

from ars_kit_plugins.ars import ARS
from ars_kit_plugins.gating import TensorState

STEPS, HALF, BAD = 40, 20, 30
HOWS = ("ddp", "fsdp")


class Note(TensorState):
    """Keeps the loss, the alignment and the norms it saw, to compare ranks."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, signal: Any) -> torch.Tensor:
        turn = signal.alignment().nan_to_num(nan=-2.0)
        self.seen.append(torch.cat([signal.loss[None], turn[None], signal.norms()]))
        return torch.ones_like(signal.loss)


def problem() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    return model, torch.randn(64, 8), torch.randn(64, 4)


def train(model: Any, optimizer: ARS, data: Any, steps: range) -> None:
    """Train on rows of the data; at one step the second half of all rows is bad."""
    x, y, rows = data
    spoilt = torch.where(torch.arange(64) < 32, 1.0, 30.0)[rows, None]
    for step in steps:
        bad = spoilt if step == BAD else torch.ones(())
        optimizer.zero_grad()
        loss = (model(bad * x[rows]) - bad * y[rows]).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def wrap(how: str) -> tuple[Any, torch.nn.Module, torch.Tensor, torch.Tensor]:
    model, x, y = problem()
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model), model, x, y
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh), model, x, y


def optimizer_for(model: torch.nn.Module, *, fold: bool | None = None) -> ARS:
    base = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fold)
    return ARS(base, gates={"note": Note()}, fold=fold)


def whole(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.data for p in model.parameters()]


def results(model: torch.nn.Module, optimizer: ARS) -> dict[str, Any]:
    note: Any = optimizer.gates["note"]
    return {"rows": optimizer.drain(), "seen": note.seen, "weights": whole(model)}


def rank_main(rank: int, how: str, folder: Path) -> None:
    """Train on this rank's own half; leave what came out of it in each of four ways."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = torch.arange(32 * rank, 32 * rank + 32)
    found = {}

    for name, fold in (("plain", None), ("folded", True)):
        wrapped, model, x, y = wrap(how)
        optimizer = optimizer_for(model, fold=fold)
        train(wrapped, optimizer, (x, y, mine), range(STEPS))
        found[name] = results(model, optimizer)

    wrapped, model, x, y = wrap(how)
    optimizer = optimizer_for(model)
    train(wrapped, optimizer, (x, y, mine), range(HALF))
    own = folder / f"own{rank}.pt"
    torch.save([model.state_dict(), optimizer.state_dict()], own)
    save_together(model, optimizer, folder)

    for name in ("resumed", "together"):
        wrapped, model, x, y = wrap(how)
        optimizer = optimizer_for(model)
        if name == "resumed":
            weights, state = torch.load(own, weights_only=True)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        else:
            load_together(model, optimizer, folder)
        train(wrapped, optimizer, (x, y, mine), range(HALF, STEPS))
        found[name] = results(model, optimizer)

    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def save_together(model: torch.nn.Module, optimizer: ARS, folder: Path) -> None:
    """Save as torch.distributed.checkpoint does it: every rank its shards, one directory."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=folder / "dcp")
    if dist.get_rank() == 0:
        torch.save(optimizer.damping_state(), folder / "damping.pt")
    dist.barrier()


def load_together(model: torch.nn.Module, optimizer: ARS, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optim": moments}, checkpoint_id=folder / "dcp")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    optimizer.load_damping_state(torch.load(folder / "damping.pt", weights_only=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank found, by the way it was trained."""
    found = {}
    for how in HOWS:
        folder = tmp_path_factory.mktemp(how)
        run_two(__file__, how, folder, environment={"OMP_NUM_THREADS": "1"})
        found[how] = [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]
    return found


@pytest.mark.parametrize("name", ["plain", "folded", "resumed", "together"])
@pytest.mark.parametrize("how", HOWS)
def test_ranks_decide_alike_to_the_bit(trained: Any, how: str, name: str) -> None:
    one, two = (rank[name] for rank in trained[how])
    assert repr(one["rows"]) == repr(two["rows"])  # as text, where NaN equals itself
    assert all(map(torch.equal, one["weights"], two["weights"]))
    assert all(map(torch.equal, one["seen"], two["seen"]))


@pytest.mark.parametrize("name", ["plain", "folded"])
@pytest.mark.parametrize("how", HOWS)
def test_two_ranks_train_as_one_process(trained: Any, how: str, name: str) -> None:
    model, x, y = problem()
    optimizer = optimizer_for(model)
    train(model, optimizer, (x, y, torch.arange(64)), range(STEPS))
    wanted, found = results(model, optimizer), trained[how][0][name]
    for one, two in zip(wanted["seen"], found["seen"], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    for one, two in zip(wanted["weights"], found["weights"], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    # One rank alone saw the bad batch; both damped it, and as hard as one process does.
    assert found["rows"][BAD]["surprise"] < 0.1
    for row, same in zip(found["rows"], wanted["rows"], strict=True):
        assert row["gradient"] == pytest.approx(same["gradient"], rel=1e-3)
        assert row["step_size"] == pytest.approx(same["step_size"], rel=1e-3)


@pytest.mark.parametrize("name", ["resumed", "together"])
@pytest.mark.parametrize("how", HOWS)
def test_ranks_resume_exactly(trained: Any, how: str, name: str) -> None:
    plain, resumed = (trained[how][0][n] for n in ("plain", name))
    assert repr(resumed["rows"]) == repr(plain["rows"][HALF:])
    assert all(map(torch.equal, plain["weights"], resumed["weights"]))


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
