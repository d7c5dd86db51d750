"""The entry code of page faults, in a process of its own whose hypervisor is a thread (faults.c); then as a domain has it."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from hypervisor.gate._gate import lib
from hypervisor.public import traps
from hypervisor.public.layout import KERNEL_WINDOW
from tests.conftest import TIMEOUT
from tests.models.mutant import ROOT, compile_copies

ENTRY, TRAPS, PROCESS = "hypervisor/gate/fault.c", "hypervisor/gate/traps.c", "tests/hypervisor/gate/faults.c"
FLAGS = ["-Werror", "-fno-stack-protector", "-pthread", f"-I{ROOT / 'hypervisor' / 'public'}"]
ENDS = {
    0: "reads writes fetches upgrades last-byte stack bounces steps skips skips-relative other-stores loses-its-stack",
    -signal.SIGSEGV: """
        null below above privileged privileged-everywhere sent hung-up closed nonsense too-short no-stack skipped-read bus
    """,
}
LAST_WORDS = {  # value, error code
    "null": (14, 6), "below": (14, 4), "above": (14, 4), "privileged": (13, 0), "privileged-everywhere": (13, 0),
    "sent": (traps.SENT + signal.SIGSEGV, 0), "bus": (traps.SENT + signal.SIGBUS, 0), "no-stack": (14, traps.PF_DELIVERY),
}  # fmt: skip
CASES = [(case, end) for end, names in ENDS.items() for case in names.split()]


def build(folder: Path, *changes: tuple[str, str]) -> Path:
    """With each change in the one of the two files that has such a line."""
    text = (ROOT / ENTRY).read_text()
    here = [change for change in changes if change[0] in text]
    there = [change for change in changes if change not in here]
    return compile_copies(folder / "faults", [ENTRY, TRAPS, PROCESS], {ENTRY: here, TRAPS: there}, FLAGS)


def check(program: Path, case: str, end: int) -> None:
    done = subprocess.run([program, case], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == end, f"{case}: {done.returncode} {done.stderr}"
    said = re.match(r"ends: value (\d+), error (\w+)", done.stderr)
    assert LAST_WORDS.get(case) == (said and (int(said[1]), int(said[2], 16))), f"{case}: {done.stderr}"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(("case", "end"), CASES)
def test_a_fault_is_filled_bounced_or_deadly(program: Path, case: str, end: int) -> None:
    check(program, case, end)


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("reads", "entry_at.rip, entry_at.rsp, 0}", "entry_at.rsp, entry_at.rsp, 0}"),
        ("writes", "{address, (uint64_t)reg[REG_ERR],", "{address, (uint64_t)reg[REG_ERR] & 4,"),
        ("bounces", "entry_at.rsp - RING1_RED_ZONE, verdict.word", "entry_at.rsp, verdict.word"),
        ("bounces", "(top & ~(uint64_t)15)", "(top & ~(uint64_t)7)"),
        ("bounces", "1, verdict.error)", "1, (uint64_t)reg[REG_ERR])"),
        ("bounces", "= selectors >> 48", "= selectors >> 32"),
        ("bounces", "TRAP_FLAG | DIRECTION_FLAG", "TRAP_FLAG"),
        ("steps", "~(greg_t)(TRAP_FLAG | ", "~(greg_t)("),
        ("stack", "SA_SIGINFO | SA_ONSTACK", "SA_SIGINFO"),
        ("loses-its-stack", " | SA_NODEFER", ""),
        ("loses-its-stack", "    sigdelset(&action.sa_mask, SIGSEGV);\n", ""),
        ("sent", "(info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR) &&", "(info->si_code || 1) &&"),
        ("above", "windows.begin < windows.bytes", "windows.begin <= windows.bytes"),
        ("skips", "(rex & 4) << 1", "0"),
        ("skips", "(rex & 1) << 3", "0"),
        ("skips", "(rex & 2) << 2", "0"),
        ("skips", "(int64_t)(int8_t)*next++", "*next++"),
        ("skips", ">> 3 & 7) | (rex & 2)", "& 7) | (rex & 2)"),
        ("skips", "mod == 2 || base == 5", "mod == 2"),
        ("skips-relative", "(next + 4)", "next"),
        ("other-stores", "at == address ?", "at <= address ?"),
        ("other-stores", "(rex & 0xf8) != 0x48 || ", ""),
        ("other-stores", " || code[1] != 0x89", ""),
        ("skipped-read", "verdict.what == RING1_SKIP && length", "verdict.what == RING1_SKIP"),
        ("nonsense", "verdict.what != RING1_RETRY", "verdict.what == 77"),
        ("too-short", "talk(SYS_recvfrom, &verdict, sizeof verdict) != sizeof verdict", "talk(SYS_recvfrom, &verdict, 16) < 0"),
    ],
)
def test_a_seeded_defect_is_found(tmp_path: Path, case: str, old: str, new: str) -> None:
    with pytest.raises(AssertionError, match=case):
        check(build(tmp_path, (old, new)), case, dict(CASES)[case])


LOSES = [
    ("void page_fault(", "void lose_code(void);\n\nvoid page_fault("),
    ("length = decode_store(", "lose_code(), length = decode_store("),
]


@pytest.mark.parametrize("case", ["lost-code", "lost-half"])
def test_code_that_is_unmapped_before_it_is_decoded_comes_back(tmp_path: Path, case: str) -> None:
    check(build(tmp_path, *LOSES), case, 0)


@pytest.mark.parametrize("case", ["lost-code", "lost-half"])
def test_a_decoder_whose_own_faults_kill_is_found(tmp_path: Path, case: str) -> None:
    with pytest.raises(AssertionError, match=case):
        check(build(tmp_path, *LOSES, (" | SA_NODEFER", "")), case, 0)


def test_the_numbers_are_the_contracts() -> None:
    """What the C says of them again."""
    text = (ROOT / "hypervisor/gate/entry.h").read_text()
    assert f"sizeof(struct fault) == {traps.FAULT.size}" in text and f"sizeof(struct verdict) == {traps.VERDICT.size}" in text


def test_a_domain_tells_us_and_dies_when_we_hang_up() -> None:
    """The module that domains load: a child that touches the first byte of a window of one page, which is not there."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(TIMEOUT)
    child = os.fork()
    if child == 0:
        ours.close()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if lib.traps_install(KERNEL_WINDOW, 4096, theirs.fileno()) == 0:
            lib.enter_kernel(0, KERNEL_WINDOW)  # reads the size of its reservation there
        os._exit(1)
    theirs.close()
    address, error, rip, rsp, _ = traps.FAULT.unpack(ours.recv(64))
    ours.close()
    _, status = os.waitpid(child, 0)
    assert (address, error) == (KERNEL_WINDOW + 32, traps.PF_USER) and rip and rsp
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
