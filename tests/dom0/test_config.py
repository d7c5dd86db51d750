"""A domain's configuration: what is taken, what is refused, and the line and key that a refusal names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dom0 import config
from dom0.config import ConfigError, Disk, DomainConfig, Vif

FULL = """\
# a comment
name = "alice"
kernel = "alice.py"
memory = 64
maxmem = 256
cmdline = "a=1 b=2"
debug = true

[[disk]]
name = "xvda"
image = "disk.img"
mode = "w"
extents = "0:16"

[[disk]]
name = "xvdb"
image = "/abs/other.img"

[[vif]]
ip = "10.0.0.1"
mac = "00:16:3e:00:00:01"

[[vif]]
"""


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        config.parse(text, "a.toml")
    return str(refused.value)


def test_everything_that_can_be_said() -> None:
    assert config.parse(FULL) == DomainConfig(
        "alice", "alice.py", 64, 256, "a=1 b=2", 256, 0, True,
        [Disk("xvda", "disk.img", "w", "0:16"), Disk("xvdb", "/abs/other.img", "r", "")],
        [Vif("10.0.0.1", "00:16:3e:00:00:01"), Vif()],
    )  # fmt: skip


def test_what_is_not_said_has_a_default() -> None:
    assert config.parse('name = "a"\nkernel = "k"\n') == DomainConfig("a", "k", 16, 0, "", 256, 0, False, [], [])


def test_the_kernel_of_a_ramdisk_has_an_option() -> None:
    assert config.parse('name = "a"\nkernel = "k"\nfast_syscalls = true\n').fast_syscalls


def test_relative_paths_are_the_file_s(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(FULL)
    loaded = config.load(tmp_path / "a.toml")
    assert loaded.kernel == str(tmp_path / "alice.py")
    assert [disk.image for disk in loaded.disk] == [str(tmp_path / "disk.img"), "/abs/other.img"]


def test_a_tree_and_back() -> None:
    """As it goes over the control socket."""
    assert config.from_tree(config.to_tree(config.parse(FULL))) == config.parse(FULL)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("memory = 64", "memory = 0"), "line 4: memory: expected `int` >= 1"),
        (("memory = 64", "memory = 1.5"), "line 4: memory: expected `int`, got `float`"),
        (("memory = 64", "memory = 1048577"), "line 4: memory: expected `int` <= 1048576"),
        (("maxmem = 256", "maxmem = 63"), "line 5: maxmem: 63 MiB, and it starts with memory = 64"),
        (("maxmem = 256", "maxmem = -1"), "line 5: maxmem: expected `int` >= 0"),
        (("maxmem = 256", "maxmem = 1048577"), "line 5: maxmem: expected `int` <= 1048576"),
        (("debug = true", "debug = 1"), "line 7: debug: expected `bool`, got `int`"),
        (('"alice"', '"al ice"'), "line 2: name: expected `str` matching regex"),
        (('"alice"', '""'), "line 2: name: expected `str` matching regex"),
        (('"alice"', '".alice"'), "line 2: name: expected `str` matching regex"),
        (('"alice"', '"' + "a" * 33 + '"'), "line 2: name: expected `str` matching regex"),
        (('"a=1 b=2"', '"' + "x" * 1024 + '"'), "line 6: cmdline: expected `str` of length <= 1023"),
        (("debug", "debut"), "line 7: debut: no such key"),
        (('kernel = "alice.py"', ""), "line 1: kernel: this key is missing"),
        (('mode = "w"', 'mode = "rw"'), "line 12: disk[0].mode: invalid enum value 'rw'"),
        (('name = "xvdb"', 'name = "sdb"'), "line 15: disk[1]: sdb: a virtual disk is called xvda to xvdz"),
        (('name = "xvdb"', 'name = "xvda"'), "two disks have one name"),
        (('image = "disk.img"', ""), "line 9: disk[0].image: this key is missing"),
        (('"10.0.0.1"', '"10.0.0.1/8"'), "line 19: vif[0]: unexpected '/' in '10.0.0.1/8'"),
        (('"00:16:3e:00:00:01"', '"00:16:3E:00:00:01"'), "line 19: vif[0]: '00:16:3E:00:00:01' is not six hexadecimal"),
        (('"00:16:3e:00:00:01"', '"01:16:3e:00:00:01"'), "line 19: vif[0]: '01:16:3e:00:00:01' is a multicast address"),
        (("[[vif]]\nip", "[[vif]]\nipv6 = 1\nip"), "line 20: vif[0].ipv6: no such key"),
        (("[[vif]]\n", "[[vif]]\n" * 9), "vif: expected `array` of length <= 8"),
    ],
)
def test_a_refusal_names_line_and_key(change: tuple[str, str], complaint: str) -> None:
    said = refusal(FULL.replace(*change))
    assert said.startswith("a.toml: ") and complaint.lower() in said.lower()


def test_a_text_that_is_no_toml() -> None:
    assert refusal('name = "a"\nkernel\n').startswith("a.toml: ") and "line 2" in refusal('name = "a"\nkernel\n')


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file or directory"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="utf-8"):
        config.load(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    "tree", [None, 5, "x", [], {}, {"name": "a"}, {"name": "a", "kernel": 5}, {"name": "a", "kernel": "k", "vif": {}}]
)
def test_a_tree_that_is_no_configuration(tree: object) -> None:
    with pytest.raises(ConfigError, match=r"^configuration: "):
        config.from_tree(tree)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda leaf: st.lists(leaf) | st.dictionaries(st.text(), leaf)
    )
)
def test_no_tree_does_more_than_be_refused(tree: object) -> None:
    try:
        config.from_tree(tree)
    except ConfigError as error:
        assert "\n" not in str(error)


@given(st.text())
def test_no_text_does_more_than_be_refused(text: str) -> None:
    try:
        config.parse(text)
    except ConfigError:
        pass


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("name", 2), ("memory", 4), ("disk[0]", 9), ("disk[0].name", 10), ("disk[1].name", 16), ("disk[1].mode", 15),
        ("vif[0].mac", 21), ("vif[1]", 23), ("nothing", 1), ("", 1), ("disk[...].mode", 1),
    ],
)  # fmt: skip
def test_the_line_of_a_key(key: str, line: int) -> None:
    assert config.line_of(FULL, key) == line


def test_its_share_of_the_cpus() -> None:
    assert config.parse('name = "a"\nkernel = "k"\nweight = 512\ncap = 40\n').weight == 512
    assert refusal('name = "a"\nkernel = "k"\nweight = 0\n').startswith("a.toml: line 3: weight")
    assert refusal('name = "a"\nkernel = "k"\n\ncap = 101\n').startswith("a.toml: line 4: cap")
