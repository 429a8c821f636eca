"""Several devices: what accelerate reads of the files in docs, and what is refused in words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from ars_kit import shardable
from ars_kit.dealing import _require_whole
from ars_kit.errors import ArsKitError, ConfigError, PluginError
from ars_kit.host import Host
from ars_kit.ranks import _require_fsdp2, not_alone, require_seen
from ars_kit.settings import OptimizerSettings
from ars_kit.spec import Seed

FILES = Path(__file__).parent.parent / "docs" / "examples" / "accelerate"
SIZES = {"1-gpu": (1, 1), "8-gpu-ddp": (1, 8), "8-gpu-fsdp2": (1, 8), "2x8-gpu-fsdp2": (2, 16)}


def test_every_file_is_tested() -> None:
    assert {path.stem for path in FILES.glob("*")} == SIZES.keys()


@pytest.mark.filterwarnings("ignore")  # accelerate's, of a machine without GPUs
@pytest.mark.parametrize("name", SIZES)
def test_accelerate_launches_what_a_file_says(name: str) -> None:
    command = ["--config_file", str(FILES / f"{name}.yaml"), "-m", "ars_kit", "run"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert (args.num_machines, args.num_processes) == SIZES[name]
    assert args.use_fsdp is ("fsdp" in name)
    assert args.multi_gpu is ("ddp" in name)
    if args.num_processes == 1:
        return
    env = prepare_multi_gpu_env(args)
    assert env["ACCELERATE_MIXED_PRECISION"] == "no"
    if args.use_fsdp:
        assert env["ACCELERATE_USE_FSDP"] == "true"
        assert env["FSDP_VERSION"] == "2"
        assert env["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
        assert env["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
        assert env["FSDP_ACTIVATION_CHECKPOINTING"] == "false"


def fake(**facts: Any) -> Any:
    """Return what stands in for an accelerator of two processes."""
    return SimpleNamespace(num_processes=2, device="cpu", process_index=1, **facts)


def test_a_run_folder_that_another_machine_does_not_see_is_refused(tmp_path: Path) -> None:
    one_is_blind = fake(reduce=lambda flag, reduction: flag + 1)
    all_see = fake(reduce=lambda flag, reduction: flag)
    require_seen(tmp_path, all_see)
    with pytest.raises(ConfigError, match="1 of 2 processes do not see"):
        require_seen(tmp_path, one_is_blind)


@pytest.mark.parametrize(
    ("second", "checkpointing", "line"),
    [(False, False, "fsdp_version: 2"), (True, True, "fsdp_activation_checkpointing: false")],
)
def test_what_of_fsdp_is_not_supported_says_what_to_set(
    second: bool, checkpointing: bool, line: str
) -> None:
    plugin = SimpleNamespace(activation_checkpointing=checkpointing)
    state = SimpleNamespace(fsdp_plugin=plugin)
    with pytest.raises(ConfigError, match=line):
        _require_fsdp2(fake(is_fsdp2=second, state=state))


def test_a_loss_that_looks_at_weights_is_refused_where_they_are_sharded() -> None:
    watching = Seed({}, loss=lambda lesson: lesson.cross_entropy)
    _require_whole(watching, "strategy 'x'", taught=True)
    _require_whole(Seed({}), "strategy 'x'", taught=False)
    with pytest.raises(ConfigError, match="use DDP"):
        _require_whole(watching, "strategy 'x'", taught=False)


@pytest.mark.parametrize("text", ["Connection closed by peer", "NCCL watchdog timed out"])
def test_a_lost_process_is_told_in_words(text: str) -> None:
    with pytest.raises(ArsKitError, match="process 1 of 2 has lost another"), not_alone(fake()):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="shapes"), not_alone(fake()):
        raise RuntimeError("shapes cannot be multiplied")


def test_a_plugin_that_a_lost_process_broke_is_not_blamed() -> None:
    broke = PluginError("the base optimizer failed at step 1")
    broke.__cause__ = RuntimeError("[gloo/pair.cc] Read error: Connection reset by peer")
    with pytest.raises(ArsKitError, match="process 1 of 2 has lost another"), not_alone(fake()):
        raise PluginError(f"{broke}; nothing was kept yet") from broke
    with pytest.raises(PluginError, match="of its own"), not_alone(fake()):
        raise PluginError("timed out of its own")


def test_an_optimizer_s_trial_that_a_lost_process_cut_off_does_not_refuse_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reason(*_: object) -> str:
        raise error

    monkeypatch.setattr(shardable, "_reason", reason)
    for error, told in (
        (RuntimeError("Connection closed by peer"), RuntimeError),
        (RuntimeError("cannot be sharded"), ConfigError),
    ):
        with pytest.raises(told, match=str(error)):
            shardable.require_shardable(Host.installed(), OptimizerSettings(), fake(is_fsdp2=True))
