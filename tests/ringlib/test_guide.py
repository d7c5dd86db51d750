"""GUIDE.md: every block of code is a program that runs, and prints what stands below it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import posix_ipc
import pytest

from tests.conftest import TIMEOUT
from tests.ringlib.peers import new_name

ROOT = Path(__file__).resolve().parent.parent.parent
GUIDE = (ROOT / "ringlib" / "GUIDE.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = "/jobs"  # of the ring, in every program


def programs(text: str) -> list[tuple[str, str]]:
    """Each with what it prints."""
    blocks = FENCE.findall(text)
    assert [language for language, _ in blocks] == ["python", "text"] * (len(blocks) // 2), "a program, then what it prints"
    return [(blocks[i][1], blocks[i + 1][1]) for i in range(0, len(blocks), 2)]


PROGRAMS = programs(GUIDE)


def check(program: str, printed: str, folder: Path) -> None:
    name, path = new_name(), folder / "program.py"
    assert f'"{NAME}"' in program
    path.write_text(program.replace(f'"{NAME}"', f'"{name}"'))
    command = [sys.executable, "-W", "error", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    finally:
        try:
            posix_ipc.unlink_shared_memory(name)
        except posix_ipc.ExistentialError:
            pass
    assert (done.returncode, done.stderr) == (0, "")
    # The two processes of a program print when they will; what each prints, it prints in order.
    assert sorted(done.stdout.replace(name, NAME).splitlines()) == sorted(printed.splitlines())


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs_print_what_is_said(number: int, tmp_path: Path) -> None:
    program, printed = PROGRAMS[number]
    if "import numpy" in program:
        pytest.importorskip("numpy", reason="numpy is not installed: pip install numpy")
    check(program, printed, tmp_path)


def test_all_of_it_is_there() -> None:
    words = "create attach put get get_into drain aput aget replace= payload= Slots lease release statistics Broken Busy"
    code = "".join(program for program, _ in PROGRAMS)
    assert not [word for word in words.split() if word not in code]
    named = {word for quote in re.findall(r"`([^`\n]+)`", FENCE.sub("", GUIDE)) for word in quote.split()}
    paths = [word for word in named if re.fullmatch(r"(ringlib|examples|tests|scripts)/[\w./]+", word)]
    assert len(paths) >= 4 and not [path for path in paths if not (ROOT / path).exists()]


# ---- what must be noticed


@pytest.mark.parametrize(("old", "new"), [("range(1000)", "range(1001)"), ("ring.drain()", "ring.dry()"), ("499500", "499501")])
def test_a_wrong_guide_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    program, printed = PROGRAMS[0]
    assert old in program + printed
    with pytest.raises(AssertionError):
        check(program.replace(old, new), printed.replace(old, new), tmp_path)
