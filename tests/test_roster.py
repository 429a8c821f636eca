"""A family of given shapes is read from its file, kept in one line, and refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ars_kit.errors import ConfigError
from ars_kit.host import Host
from ars_kit.plan import plan_run
from ars_kit.resolving import resolve
from ars_kit.roster import Member, bad_name, parse_roster, read_roster
from ars_kit.settings import to_toml

TEXT = """
[[member]]
name = "small"
num_hidden_layers = 2
hidden_size = 16

[[member]]
name = "large"
num_hidden_layers = 3
hidden_size = 24
num_attention_heads = 6
num_key_value_heads = 3
head_dim = 4
intermediate_size = 50
tokens = 4000
"""


def test_a_file_of_shapes_becomes_one_line_that_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "members.toml"
    path.write_text(TEXT)
    line = read_roster(path)
    small, large = parse_roster(line)
    assert small == Member("small", 2, 16)
    assert large == Member("large", 3, 24, 50, 6, 3, 4, tokens=4000)
    assert "; ".join(map(str, (small, large))) == line


def test_the_run_keeps_the_shapes_and_not_the_file(tmp_path: Path) -> None:
    path, frozen = tmp_path / "members.toml", tmp_path / "run.toml"
    path.write_text(TEXT)
    settings = resolve({"family.members": str(path)}, {})
    frozen.write_text(to_toml(settings))
    path.unlink()
    assert resolve({}, {}, frozen).family.members == settings.family.members
    assert "small:num_hidden_layers=2" in settings.family.members


def test_a_member_s_own_tokens_stand_over_the_run_s() -> None:
    settings = resolve(
        {
            "family.members": "a:num_hidden_layers=1,hidden_size=8,tokens=4096;"
            "b:num_hidden_layers=2,hidden_size=8",
            "train.tokens": "8192",
            "data.sequence_length": "32",
            "train.batch_size": "4",
        },
        {},
    )
    own, common = plan_run(settings, Host.installed()).members
    assert (own.steps, own.tokens) == (32, 4096)
    assert (common.steps, common.tokens, common.start) == (64, 8192, 32 * 4)


def test_depths_are_members_of_the_family_s_rule() -> None:
    assert parse_roster("d3,d5..d6") == (Member("d3", 3), Member("d5", 5), Member("d6", 6))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[member]]\nnum_hidden_layers = 2", "number 1 needs a name"),
        ('[[member]]\nname = "a"', "member 'a' needs num_hidden_layers"),
        ('[[member]]\nname = "a"\nhidden = 3', r"no size 'hidden' \(did you mean 'hidden_size'"),
        ('[[member]]\nname = "a"\nnum_hidden_layers = "x"', "must be a whole number, not 'x'"),
        ('[[member]]\nname = "a"\nnum_hidden_layers = 0', "num_hidden_layers = 0 must be at least"),
        ('[[member]]\nname = "../a"\nnum_hidden_layers = 1', "cannot be a member's name"),
        ('[[member]]\nname = "best"\nnum_hidden_layers = 1', "and none of best, controls"),
        ('[[member]]\nname = "a"\nnum_hidden_layers = 1\n' * 2, "'a' is named twice"),
        ("[member]\nname = 'a'", "nothing but"),
        ("member = [1, 2]", r"nothing but \[\[member\]\] tables"),
        (
            '[[member]]\nname = "a"\nnum_hidden_layers = 1_000_000_000',
            "member 'a': num_hidden_layers = 1000000000 goes beyond 10,000 layers",
        ),
        ("member = []", "at least one member"),
        ("[[member]\n", "not valid TOML"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "members.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_roster(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read members file"):
        resolve({"family.members": str(tmp_path / "none.toml")}, {})
    with pytest.raises(ConfigError, match=r"name a file of shapes that ends in \.toml"):
        resolve({"family.members": "small"}, {})


def test_a_blend_may_be_called_what_a_member_may() -> None:
    assert bad_name("soup") is None
    assert bad_name("a" * 100) is None
    for name in ("controls", "best", "", "../x", "a b", "a" * 101):
        assert "cannot be a member's name" in (bad_name(name) or "")


@pytest.mark.parametrize("size", ["hidden_size", "intermediate_size"])
def test_sizes_that_nobody_means_are_refused_in_one_line(size: str) -> None:
    line = f"a:num_hidden_layers=1,num_attention_heads=2,head_dim=8,{size}=99999999999999"
    with pytest.raises(ConfigError, match=f"^a: {size} 99999999999999 goes beyond 1,048,576"):
        plan_run(resolve({"family.members": line}, {}), Host.installed())
