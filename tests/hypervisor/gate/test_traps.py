"""The entry code of exceptions in a process of its own (alone.c), which runs the cases of tests/native; then changed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import TIMEOUT
from tests.models.mutant import ROOT, compile_copies
from tests.native.exceptions import SAID, as_expected

ENTRY, FAULT = "hypervisor/gate/traps.c", "hypervisor/gate/fault.c"
NATIVE = [f"tests/native/exceptions{part}.c" for part in ("", "_each", "_hostile", "_returns", "_events")]
PUBLIC = ROOT / "hypervisor" / "public"
FLAGS = ["-Werror", "-fno-stack-protector", "-pthread", f"-I{PUBLIC}", f"-I{ROOT / 'hypervisor' / 'gate'}"]
UNHANDLED = {"table", "stack-lost-page", "page-faults"}  # they need the real thing
CASES = [name for name in SAID if name not in UNHANDLED]
LAST_WORDS = {
    **{f"stack-{name}": "double 6" for name in """
        null 0 not-canonical last commands traps shared-info below-top grants entry-code
    """.split()},
    "sigreturn-unreadable": "double 13", "events-stack": "double 256", "none-ud2": "ends 6", "none-div": "ends 0",
    "none-cli": "ends 13", "none-int3": "ends 3", "none-outside": "ends 14",
}  # fmt: skip


def build(folder: Path, *changes: tuple[str, str]) -> Path:
    """The program; objects that nothing changes are the same each time."""
    sources = [ENTRY, FAULT, *NATIVE, "tests/hypervisor/gate/alone.c"]
    return compile_copies(folder / "alone", sources, {ENTRY: changes}, [*FLAGS, f"-I{ROOT / 'tests' / 'native'}"])


def says(program: Path, case: str) -> list[str]:
    """Its lines; the end of a process that died is one too."""
    try:
        done = subprocess.run([program, case], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return ["hangs"]
    died = [f"exit code {done.returncode} {done.stderr}"] if done.returncode else []
    return [line for line in done.stdout.splitlines() if not line.startswith("hypervisor: ")] + died


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("case", CASES)
def test_what_is_raised_is_delivered(program: Path, case: str) -> None:
    said = says(program, case)
    assert as_expected(case, said), said


@pytest.mark.parametrize("case", LAST_WORDS)
def test_what_cannot_be_delivered_is_told(program: Path, case: str) -> None:
    assert says(program, case) == [LAST_WORDS[case]]


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("every", "0x60227d00u", "0x60225d00u"),
        ("arithmetic", "0x60227d00u", "0x60207d00u"),
        ("frame", "entry_at.rsp - RING1_RED_ZONE, word;", "entry_at.rsp, word;"),
        ("frame", "(top & ~(uint64_t)15) - 1", "(top & ~(uint64_t)7) - 2"),
        ("frame", "frame->rflags = (uint64_t)reg[REG_EFL];", "frame->rflags = 2;"),
        ("steps", "~(greg_t)(TRAP_FLAG | DIRECTION_FLAG", "~(greg_t)(DIRECTION_FLAG"),
        ("masks", "| masked << 32", "| (masked & 0) << 32"),
        ("masks", "if (FLAG(word, RING1_TI_MASK_EVENTS))", "if (0)"),
        ("events", "if (FLAG(word, RING1_TI_MASK_EVENTS))", "if (0)"),
        ("events", "(greg_t)(word & ADDRESS)", "(greg_t)word"),
        ("flags", "~(uint64_t)(ALIGN_FLAG | NESTED_FLAG)", "~(uint64_t)ALIGN_FLAG"),
        ("software", "if (FLAG(word, RING1_TI_DPL))", "if (word)"),
        ("software", "            reg[REG_RIP] += 2;\n", ""),
        ("software", "enter(reg, top, word, 0, 0);\n            return;", "enter(reg, top, word, 1, 0);\n            return;"),
        ("every", "return vector != OVERFLOW || !(is_int(code - 2, OVERFLOW) || code[-1] == 0xce);", "return vector < 99;"),
        ("sigreturn-failsafe", "if (!(reg[REG_EFL] & RESUME_FLAG))", "if (0)"),
        ("sigreturn-failsafe", "!(reg[REG_EFL] & RESUME_FLAG))\n        return vector", "0)\n        return vector"),
        ("iretq-failsafe", "(code[0] == 0x48 && code[1] == 0xcf)", "0"),
        ("iretq-failsafe-stack", "TRAPS->kernel_sp ? TRAPS->kernel_sp : top", "top"),
        ("iretq", "if (word) {\n            entry_at.value", "if (1) {\n            entry_at.value"),
        ("every", "RING1_PF_DELIVERY);\n    entry_depth--;", "RING1_PF_DELIVERY);"),
        ("events-masked", "if (!word || __atomic_load_n(&VCPU->evtchn_upcall_mask, __ATOMIC_SEQ_CST) ||", "if (!word ||"),
        ("events-masked", "||\n        !__atomic_load_n(&VCPU->evtchn_upcall_pending, __ATOMIC_SEQ_CST))", ")"),
        ("events-nobody", "if (!word ||", "if ("),
        ("stack-shared-info", ">= RING1_HYPERVISOR_VIRT_START);\n}", ">= RING1_SPACE_BYTES);\n}"),
        ("stack-entry-code", " || at - (uint64_t)(uintptr_t)stack < sizeof stack", ""),
        ("events-stack", "(struct entry){RING1_EVENT,", "(struct entry){0,"),
        ("none-ud2", "    if (!word)\n        entry_ends(0, error);\n", ""),
        ("changes", "signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}", "signals[] = {SIGSEGV}"),
    ],
)  # fmt: skip
def test_a_seeded_defect_is_found(tmp_path: Path, case: str, old: str, new: str) -> None:
    said = says(build(tmp_path, (old, new)), case)
    assert not (said == [LAST_WORDS[case]] if case in LAST_WORDS else as_expected(case, said))
