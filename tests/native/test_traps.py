"""Exceptions of a kernel in C: each enters its own handler, in its own process, and nobody else hears of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import TIMEOUT
from tests.native.build import HERE, build

ONE = 1
AT = (
    "count vector error distance mask alignment room trap_flag ring stack_ring"  # what the kernel says, in this order
).split()
FAULT = 0  # rip is that of the instruction
PUSHED = 40 + 128  # bytes below the interrupted stack pointer, at least: the frame, and the red zone
RAISED = {  # vector, error code, distance
    "divide": (0, 0, FAULT),
    "step": (1, 0, 1),
    "breakpoint": (3, 0, 1),
    "overflow": (4, 0, 2),
    "opcode": (6, 0, FAULT),
    "cli": (13, 0, FAULT),
    "hlt": (13, 0, FAULT),
    "cr3": (13, 0, FAULT),
    "lgdt": (13, 0, FAULT),
    "out": (13, 0, FAULT),
    "canonical": (13, 0, FAULT),
    "x87": (16, 0, FAULT),
    "alignment": (17, 0, FAULT),
    "simd": (19, 0, FAULT),
    "int": (0x55, 0, 2),
}
ENDS = {  # of a command line: why the domain ends
    "raise=opcode handler=none": r"invalid opcode \(6\) at 0x[0-9a-f]+, and no handler",
    "raise=divide handler=none": r"divide error \(0\) at 0x[0-9a-f]+, and no handler",
    "raise=cli handler=none": r"general protection \(13\) at 0x[0-9a-f]+, and no handler",
    "raise=breakpoint handler=none": r"breakpoint \(3\) at 0x[0-9a-f]+, and no handler",
    "raise=stack-gone": r"double fault: no stack at 0x[0-9a-f]+ for invalid opcode \(6\)",
    "raise=stack-hypervisor": r"double fault: no stack at 0x[0-9a-f]+ for invalid opcode \(6\)",
    "raise=stack-nowhere": r"double fault: no stack at 0xf[0-9a-f]{2} for invalid opcode \(6\)",
    "raise=opcode handler=itself": r"double fault: no stack at 0x[0-9a-f]+ for invalid opcode \(6\)",
    "raise=opcode handler=data": r"page fault at guest address 0x[0-9a-f]+ \(execute\): not mapped, and no handler",
}
MANY = "raise=breakpoint times=many"
DPL_0 = "raise=int handler=dpl-0"
REFUSED, UNCHECKED, BAD = "raise=refused", "raise=refused unchecked", 7


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kernel = str(build("traps", tmp_path_factory.mktemp("kernels")))
    lines = [*(f"raise={name}" for name in RAISED), *ENDS, MANY, DPL_0, REFUSED, UNCHECKED]
    jobs = [{"kernel": kernel, "cmdline": line, "unchecked": line == UNCHECKED} for line in lines]
    state = tmp_path_factory.mktemp("state")
    state.chmod(0o700)
    done = subprocess.run(
        [sys.executable, HERE / "machine.py", state, json.dumps(jobs)], capture_output=True, text=True, timeout=TIMEOUT,
        check=False, cwd=HERE.parent.parent, env={"PYTHONPATH": str(HERE.parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, json.loads(done.stdout.splitlines()[-1]), strict=True))


def said(end: dict[str, Any]) -> dict[str, int]:
    assert (end["reason"], end["exit_code"]) == ("poweroff", 0), end
    (line,) = end["said"]
    return dict(zip(AT, map(int, line.split()), strict=True))


@pytest.mark.parametrize("name", RAISED)
def test_an_exception_enters_its_handler(ends: dict[str, Any], name: str) -> None:
    vector, error, distance = RAISED[name]
    end = ends[f"raise={name}"]
    found = said(end)
    assert (found["count"], found["vector"], found["error"], found["distance"]) == (ONE, vector, error, distance)
    assert found["mask"] == (vector == 6), "events are masked on entry where the table says so"
    assert found["alignment"] == 0, "of the frame with an error code, or of one pushed in its place"
    assert PUSHED <= found["room"] < PUSHED + 32 and found["trap_flag"] and (found["ring"], found["stack_ring"]) == (3, 3)
    assert end["faults"] == end["fills"], "no page fault but those that were filled: the hypervisor heard of nothing"


def test_a_hundred_thousand_cost_no_hypercall_and_no_message(ends: dict[str, Any]) -> None:
    few, many = ends["raise=breakpoint"], ends[MANY]
    assert said(many)["count"] == 100_000
    assert many["hypercalls"] == few["hypercalls"] and abs(many["faults"] - few["faults"]) <= 2


@pytest.mark.parametrize("line", ENDS)
def test_what_cannot_be_delivered_ends_the_domain(ends: dict[str, Any], line: str) -> None:
    assert re.fullmatch(ENDS[line], ends[line]["reason"]) and not ends[line]["said"]


def test_a_gate_of_dpl_0_is_general_protection_with_its_number(ends: dict[str, Any]) -> None:
    found = said(ends[DPL_0])
    assert (found["vector"], found["error"], found["distance"]) == (13, 0x55 * 8 + 2, FAULT)


def test_a_bad_table_is_refused_at_its_bad_entry(ends: dict[str, Any]) -> None:
    end = ends[REFUSED]
    assert end["said"] == ["-22 " * BAD + "1"]
    assert re.fullmatch(r"general protection \(13\) at 0x[0-9a-f]+, and no handler", end["reason"]), "what came behind"


def test_without_the_checks_it_is_not_refused(ends: dict[str, Any]) -> None:
    """And then vector 3 is entered in the hypervisor's code, or nowhere."""
    end = ends[UNCHECKED]
    assert end["said"][0] == "0 " * BAD + "1"
