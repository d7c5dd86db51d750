"""notify.pml, the notify protocol of ringlib/ring.h under x86's store buffers: every interleaving of the right one, and the
wrong ones refuted. The other half of the argument, that the C does what the model says, is in the lines they share."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TIMEOUT

MODEL = Path(__file__).with_name("notify.pml")
RING = Path(__file__).resolve().parent.parent.parent / "ringlib" / "ring.h"
DEPTH = 10_000  # steps of one run, at most; a run that is longer is an error of the search

needs_spin = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="the model checker is missing: apt-get install spin gcc"
)


def search(folder: Path, *macros: str) -> str:
    """What the checker says of every interleaving."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("spin", "-a", *(f"-D{macro}" for macro in macros), str(MODEL))
    run("gcc", "-O1", "-w", "-DSAFETY", "-o", "pan", "pan.c")
    return run("./pan", f"-m{DEPTH}")


def states(report: str) -> int:
    found = re.search(r"(\d+) states, stored", report)
    assert found, report
    return int(found[1])


@needs_spin
def test_no_interleaving_loses_a_wake_up_or_shows_half_a_slot(tmp_path: Path) -> None:
    report = search(tmp_path)
    assert "errors: 0" in report and "max search depth too small" not in report, report
    assert states(report) > 100_000, "hardly anything was tried"


@needs_spin
@pytest.mark.parametrize(
    ("macro", "says"),
    [
        ("NO_PRODUCER_BARRIER", "invalid end state"),
        ("NO_CONSUMER_BARRIER", "invalid end state"),
        ("NO_FINAL_CHECK", "invalid end state"),
        ("EQUAL_ONLY", "invalid end state"),
        ("PUBLISH_FIRST", "assertion violated"),
    ],
)
def test_wrong_protocols_are_refuted(tmp_path: Path, macro: str, says: str) -> None:
    report = search(tmp_path, macro)
    assert "errors: 1" in report and says in report, report


@needs_spin
@pytest.mark.parametrize("macro", ["NO_PRODUCER_BARRIER", "NO_CONSUMER_BARRIER"])
def test_without_store_buffers_nobody_would_miss_a_barrier(tmp_path: Path, macro: str) -> None:
    assert "errors: 0" in search(tmp_path, "SC", macro)


def test_the_model_quotes_the_code() -> None:
    """Whoever changes these lines of ring.h has the model to change as well, and this to tell him."""
    quoted = re.findall(r"/\* C: (.*) \*/", MODEL.read_text())
    lines = [line.strip() for line in RING.read_text().splitlines()]
    assert len(quoted) >= 8
    assert not [line for line in quoted if line not in lines]
    push = lines.index(next(line for line in lines if "ring_push(_Atomic" in line))
    check = lines.index(next(line for line in lines if "ring_final_check(_Atomic" in line))
    for start, part in ((push, quoted[1:4]), (check, quoted[4:])):
        body = lines[start + 1 : lines.index("}", start)]
        assert [line for line in body if line not in ("{", "return 1;")] == part
