"""The table of system calls: documented as it is, and what an application asks most is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from domain.posix import calls
from domain.posix.table import TABLE, documentation, signed32, signed64, syscall

# read, write, openat ...: what three or more of busybox, sqlite, CPython, redis, fio and iperf3 use, without sockets and rseq
RANKED = [
    262, 0, 1, 257, 9, 3, 13, 10, 8, 12, 16, 59, 72, 11, 273, 21, 302, 231, 318, 158, 218, 17, 39, 87, 14, 61, 202, 56, 293,
    217, 102, 107, 7, 79, 89, 28, 99, 435, 80, 83, 77,
]  # fmt: skip


def test_the_document_is_made_from_the_decorators() -> None:
    assert (Path(calls.__file__).with_name("SYSCALLS.md")).read_text() == documentation()


@pytest.mark.parametrize("number", RANKED)
def test_what_most_programs_use_is_there(number: int) -> None:
    assert TABLE[number].level != "none", TABLE[number].name


def test_a_level_below_full_says_why() -> None:
    def sys_nonesuch(task: object) -> int:
        return 0

    with pytest.raises(AssertionError, match="what is missing is not said"):
        syscall(9999, "partial")(sys_nonesuch)
    with pytest.raises(AssertionError, match="is read already"):
        syscall(0)(sys_nonesuch)
    assert 9999 not in TABLE


def test_words_as_c_has_them() -> None:
    assert [signed32(word) for word in (0, 5, 0xFFFF_FF9C, (1 << 64) - 100)] == [0, 5, -100, -100]
    assert signed64((1 << 64) - 1) == -1
