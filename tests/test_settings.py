from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest

from ars_kit.errors import ConfigError
from ars_kit.resolving import resolve
from ars_kit.roster import parse_depths
from ars_kit.schema import Choice, bind, coerce, parse_choice, signature_of
from ars_kit.settings import differences, keys, to_toml


def test_choice_round_trips() -> None:
    choice = parse_choice("clip:limit=0.5,names=a,b")
    assert choice == Choice("clip", {"limit": "0.5", "names": "a,b"})
    assert parse_choice(str(choice)) == choice


@pytest.mark.parametrize("text", ["", ":a=1", "clip:0.5", "clip:=1"])
def test_choice_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_choice(text)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("1e6", int, 1_000_000),
        ("0.5", float, 0.5),
        ("no", bool, False),
        ("none", int | None, None),
        ("3", int | None, 3),
        ("100,50", tuple[int, int], (100, 50)),
        ("b", Literal["a", "b"], "b"),
        (2, float, 2.0),
        ("9007199254740993", int, 2**53 + 1),  # a float would make it one less
    ],
)
def test_coerce(value: object, annotation: object, expected: object) -> None:
    assert coerce(value, annotation, "x") == expected


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("1.5", int),
        ("x", float),
        ("nan", float),
        (math.nan, float),
        ("maybe", bool),
        ("1", tuple[int, int]),
        (True, int),
        ("c", Literal["a"]),
    ],
)
def test_coerce_refuses_in_words(value: object, annotation: object) -> None:
    with pytest.raises(ConfigError, match="x must be"):
        coerce(value, annotation, "x")


def test_a_signature_is_the_schema() -> None:
    def make(*, limit: float = 1.0, name: str) -> None:
        """Make it.

        Args:
            limit: where it stops,
                at the latest.
            name: what it is called.
        """

    settings = signature_of(make)
    assert settings["limit"].doc == "where it stops, at the latest."
    assert settings["name"].required
    assert bind("'it'", make, {"limit": "2", "name": "n"}) == {"limit": 2.0, "name": "n"}
    with pytest.raises(ConfigError, match=r"'it' has no setting 'limt' \(did you mean 'limit'\?\)"):
        bind("'it'", make, {"limt": "2", "name": "n"})
    with pytest.raises(ConfigError, match="needs a value for name"):
        bind("'it'", make, {})


def test_precedence_and_origins(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[train]\nlr = 0.1\nbatch_size = 4\naccumulation = 2\n")
    settings = resolve(
        {"train.lr": "0.3"}, {"ARSKIT_TRAIN_LR": "0.2", "ARSKIT_TRAIN_BATCH_SIZE": "8"}, file
    )
    assert (settings.train.lr, settings.train.batch_size, settings.train.accumulation) == (
        0.3,
        8,
        2,
    )
    origins = [
        settings.origins[f"train.{k}"] for k in ("lr", "batch_size", "accumulation", "device")
    ]
    assert origins == ["flag", "environment", "file", "default"]


def test_frozen_file_reads_back_to_the_same(tmp_path: Path) -> None:
    settings = resolve({"optimizer.gates": ["clip:limit=0.5"], "data.source": 'a "ö"\\b\x7f'}, {})
    file = tmp_path / "run.toml"
    file.write_text(to_toml(settings), encoding="utf-8")
    again = resolve({}, {}, file)
    assert again.flat() == settings.flat()
    assert differences(settings, again) == []
    assert set(settings.flat()) == set(keys())


def test_a_text_that_is_called_none_is_read_back(tmp_path: Path) -> None:
    settings = resolve({"data.source": "none"}, {})
    file = tmp_path / "run.toml"
    file.write_text(to_toml(settings), encoding="utf-8")
    again = resolve({}, {}, file)
    assert again.data.source == "none"
    assert again.train.tokens is None
    assert again.flat() == settings.flat()


def test_differences_name_what_matters() -> None:
    old, new = resolve({}, {}), resolve({"train.lr": 1, "run.price_per_hour": 9}, {})
    assert differences(old, new) == ["train.lr: 0.012 -> 1.0"]


@pytest.mark.parametrize("name", ["none", "None"])
def test_a_base_called_none_is_not_taken_for_no_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve({"family.base": name}, {}).family.base is None
    (tmp_path / name).mkdir()  # a run folder, say
    frozen = tmp_path / "run.toml"
    frozen.write_text(to_toml(resolve({"family.base": name}, {})))
    (tmp_path / name / "config.json").write_text("{}")
    for flags, environment in (({"family.base": name}, {}), ({}, {"ARSKIT_FAMILY_BASE": name})):
        with pytest.raises(
            ConfigError, match=rf"is no base.*write \./{name} for it, or leave it out"
        ):
            resolve(flags, environment)
    assert resolve({}, {}, frozen).family.base is None
    named = resolve({"family.base": f"./{name}"}, {})
    assert named.family.base == f"./{name}"
    frozen.write_text(to_toml(named))
    assert resolve({}, {}, frozen).flat() == named.flat()


def test_a_base_changes_the_defaults() -> None:
    settings = resolve({"family.base": "somewhere"}, {})
    assert (settings.family.depth, settings.train.steps_per_iteration) == ("same", 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train.lr": "-1"}, "greater than 0"),
        ({"train.lr": "nan"}, "command line: train.lr must be a number, not 'nan'"),
        ({"train.batch_size": "5", "train.accumulation": "2"}, "equal micro-batches"),
        ({"train.batchsize": "5"}, "did you mean 'train.batch_size'"),
        ({"family.members": "d3..d1"}, "run downwards"),
        ({"family.members": "d3,d3"}, "each named once"),
        ({"family.members": "big"}, "cannot read members"),
        ({"family.depth": "grow"}, "needs a base"),
        ({"family.vocab_size": "200"}, "too small"),
        ({"data.heldout_fraction": "1"}, "must lie in"),
        ({"train.lr": "inf"}, "greater than 0"),
        ({"run.price_per_hour": "-1"}, "run.price_per_hour must be 0 or more"),
        ({"run.price_per_hour": "nan"}, "run.price_per_hour must be a number"),
        ({"optimizer.entropy_threshold": "nan,0.4"}, "must be 2 values with a comma between"),
        ({"optimizer.surprise_damping": "0.1,inf"}, "must be two finite numbers, not 0.1,inf"),
        ({"train.warmup_steps": "-5"}, "train.warmup_steps must be 0 or more"),
        ({"train.weight_decay": "-1"}, "train.weight_decay must be 0 or more"),
        ({"data.heldout_tokens": "0"}, "data.heldout_tokens must be greater than 0"),
        ({"data.sequence_length": "1"}, "data.sequence_length must be 2 or more"),
        ({"data.sequence_length": str(10**12)}, "10{12} goes beyond 16,777,216 tokens"),
        ({"data.source": " "}, "data.source is empty"),
        ({"data.source": "Gr\udcf6\udcdfe"}, "data.source is not UTF-8"),
        ({"family.base": "", "family.depth": "same"}, "family.base is empty"),
        ({"optimizer.gates": ["clip", "clip:limit=2"]}, "'clip' is added twice"),
        ({"train.iterations": "5"}, r"must be 2 values with a comma between \(a whole number\)"),
    ],
)
def test_bad_settings_get_one_line(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(flags, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", ["lr = 1", "[train\n", "[train]\nlr = 'x'", "[trian]\nlr = 1"])
def test_bad_files_get_one_line(tmp_path: Path, body: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(body)
    with pytest.raises(ConfigError):
        resolve({}, {}, file)


def test_a_misspelt_variable_is_refused_and_other_programs_are_left_alone() -> None:
    with pytest.raises(ConfigError, match=r"environment: no setting 'train.lrr' \(did you mean"):
        resolve({}, {"ARSKIT_TRAIN_LRR": "1"})
    assert resolve({}, {"ARSKIT_CACHE": "x", "ARSKIT_TEST_KILLS": "1", "TRAIN_LR": "1"})


def test_members() -> None:
    assert parse_depths("d10..d12,d15") == (10, 11, 12, 15)
    with pytest.raises(ConfigError, match="go beyond 10,000 layers"):
        parse_depths("d10..d180000000000")
