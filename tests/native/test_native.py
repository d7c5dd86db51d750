"""Kernels in C, written from ABI.md and ring1.h alone, on the real hypervisor; and what a hostile one is refused."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dom0 import elf
from hypervisor import space
from hypervisor._hv import ffi
from hypervisor.core import Hypervisor
from hypervisor.domain import Domain
from hypervisor.gate.monitor import Monitor, MonitorError, MonitorGone
from hypervisor.loop import Wait, run_task
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.grant import GrantStatus
from hypervisor.public.layout import KERNEL_PFN, virt
from tests.conftest import TIMEOUT
from tests.native.build import HERE, KERNELS, BuildError, build, compile_object
from tests.native.machine import FRAMES, GRANT_REF, GRANTED, GRANTER, TRANSFER_REF

SIGSYS, PROTECTION, PAGE_FAULT = "SIGSYS: ", "no handler for vector 13 ", "page fault at guest address "
FATAL = {
    **dict.fromkeys(
        "ptrace process_vm_readv process_vm_writev pidfd_open io_uring userfaultfd bpf x32".split(), SIGSYS
    ),
    **dict.fromkeys(
        """
        store-monitor-code store-commands store-top-middle store-before-shared-info store-reserved store-null store-own-code
        execute-data
        """.split(),
        PAGE_FAULT,
    ),
    **dict.fromkeys("cli hlt cr3 out".split(), PROTECTION),
}  # fmt: skip
FATAL_EITHER_WAY = "int80"  # a general protection fault on a host kernel without 32-bit calls


def jobs(kernels: Path) -> list[dict[str, Any]]:
    """All of them in one machine: a domain costs 5 ms, a hypervisor 50 times that."""
    hostile = {"kernel": str(kernels / "hostile"), "unfiltered": False}
    lines = ["", *(f"attack={name}" for name in (*FATAL, FATAL_EITHER_WAY))]
    lines.append(f"attack=grant domid={GRANTER} gref={GRANT_REF}")
    ring = f"attack=ring domid={GRANTER} gref={TRANSFER_REF}"
    lines.append(ring)
    out = [{"kernel": str(kernels / "hello"), "cmdline": "", "unfiltered": False}]
    out += [{**hostile, "cmdline": line} for line in lines]
    out += [{**hostile, "cmdline": line, "unfiltered": True} for line in ("", "attack=pidfd_open")]
    return [*out, {**hostile, "cmdline": ring, "unfiltered": True, "ring_may_leave": True}]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kernels")
    for name in KERNELS:
        build(name, directory)
    return directory


@pytest.fixture(scope="module")
def ends(kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Any]:
    """How each job ended, by (attack, unfiltered); hello is "hello"."""
    state = tmp_path_factory.mktemp("state")
    state.chmod(0o700)
    todo = jobs(kernels)
    done = subprocess.run(
        [sys.executable, "-m", "tests.native.machine", str(state), json.dumps(todo)],
        cwd=HERE.parent.parent, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    names = [job["cmdline"].split(" ")[0].removeprefix("attack=") if "hostile" in job["kernel"] else "hello" for job in todo]
    return {(name, job["unfiltered"]): end for name, job, end in zip(names, todo, ends, strict=True)}


# ---- the files


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_what_the_builder_loads(kernels: Path, name: str) -> None:
    parsed = elf.parse((kernels / name).read_bytes())
    assert parsed.text.pfn == KERNEL_PFN
    assert virt(parsed.text.pfn) <= parsed.entry < virt(parsed.text.pfn + parsed.text.pages)
    assert [segment.executable for segment in parsed.segments] == [True, False]
    assert all(segment.offset == 0 for segment in parsed.segments)
    assert parsed.end_pfn + 1 < FRAMES


def test_the_linker_script_begins_at_the_kernels_first_frame() -> None:
    assert f". = {virt(KERNEL_PFN):#x};" in (HERE / "kernel.lds").read_text()


def test_an_address_in_initialized_data_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "pointers.c"
    source.write_text('const char *const names[] = {"one", "two"};\n')
    with pytest.raises(BuildError, match="R_X86_64_64: an address in initialized data"):
        compile_object(source, tmp_path)


def test_what_cannot_be_mapped_ends_its_domain_and_nothing_else() -> None:
    """As where memory may not be executed from: EPERM, which no eviction cures."""

    def refuse(commands: bytes, count: int) -> Wait:
        return lambda resume: resume(MonitorError(0, errno.EPERM))

    domain = Domain(5, "native", CreateFlags.NATIVE)
    domain.monitor = cast(Monitor, SimpleNamespace(run=refuse))
    ended: list[str] = []
    domain.fail = ended.append
    result: list[object] = []
    change = ffi.new("struct host_change *", (0x10_0000, 1, 7, 0, 1))
    run_task(space.follow(cast(Hypervisor, None), domain, change, 1), lambda _, error: result.append(type(error)))
    assert result == [MonitorGone]  # a caller's call answers that there is no such domain
    assert len(ended) == 1 and "could not follow its page tables" in ended[0]


# ---- they run


def test_hello(ends: dict[tuple[str, bool], Any]) -> None:
    end = ends["hello", False]
    assert (end["exit_code"], end["reason"]) == (7, "poweroff")
    assert end["said"] == [f"ABI 0.1, {FRAMES} frames"]
    assert end["console"] == f"Hello from native2, a kernel in C.\nABI 0.1, {FRAMES} frames\nGoodbye.\n"


def test_every_call_that_is_to_be_refused_is(ends: dict[tuple[str, bool], Any]) -> None:
    end = ends["", False]
    allowed = [line for line in end["said"] if line.split()[1] not in ("-1", "-38")]
    assert not allowed
    assert len(end["said"]) > 40
    assert end["exit_code"] == 0


@pytest.mark.parametrize("name", FATAL)
def test_an_attack_ends_its_domain(ends: dict[tuple[str, bool], Any], name: str) -> None:
    end = ends[name, False]
    assert end["said"] == [f"{name} tried"]
    assert end["reason"].startswith(FATAL[name])


def test_a_call_of_32_bits_ends_its_domain(ends: dict[tuple[str, bool], Any]) -> None:
    assert ends[FATAL_EITHER_WAY, False]["reason"].startswith((SIGSYS, PROTECTION))


def test_a_frame_granted_for_reading_is_only_read(ends: dict[tuple[str, bool], Any]) -> None:
    end = ends["grant", False]
    assert end["said"] == [
        "grant tried", "grant-map-writable -8", "grant-map-readonly 0", f"grant-first-word {GRANTED}", "grant-mprotect -1",
    ]  # fmt: skip
    assert end["reason"].startswith(PAGE_FAULT)


def test_the_frame_of_a_hypercall_ring_stays(ends: dict[tuple[str, bool], Any]) -> None:
    """The hypervisor goes on writing it, whoever's it would be then."""
    end = ends["ring", False]
    assert end["said"] == ["ring tried", "ring-setup 0", f"ring-transferred {GrantStatus.BAD_PAGE}", "ring-given-back 0"]
    assert end["exit_code"] == 0


# ---- and would be seen to succeed: the same kernel without the filter, or without the check


def test_without_the_filter_most_calls_reach_the_host(ends: dict[tuple[str, bool], Any]) -> None:
    end = ends["", True]
    allowed = [line.split()[0] for line in end["said"] if line.split()[1] not in ("-1", "-38")]
    assert {"open", "socket-inet", "mmap-file", "mmap-window", "munmap-window", "mprotect-own", "dup", "fork"} <= set(allowed)
    assert len(allowed) > 30
    assert end["exit_code"] == 1


def test_without_the_filter_an_attack_lives(ends: dict[tuple[str, bool], Any]) -> None:
    end = ends["pidfd_open", True]
    assert end["said"] == ["pidfd_open tried", "pidfd_open ALLOWED"]
    assert end["exit_code"] == 1


def test_without_the_check_a_ring_leaves(ends: dict[tuple[str, bool], Any]) -> None:
    end = ends["ring", True]
    assert end["said"][2] == "ring-transferred 0"
    assert end["exit_code"] == 1
