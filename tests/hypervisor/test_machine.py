"""Machine memory: reserved whole, nameless, and read-only where it is opened so, whichever object it is made of; the M2P."""

from __future__ import annotations

import mmap
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor import machine
from hypervisor.machine import M2P, MachineMemory, may_execute
from hypervisor.public.layout import M2P_BYTES
from hypervisor.public.types import INVALID_PFN, PAGE_SIZE
from tests.conftest import TIMEOUT

KINDS = {"shm": True, "memfd": False}


@pytest.fixture(params=KINDS)
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[MachineMemory]:
    monkeypatch.setattr(machine, "may_execute", lambda fd: KINDS[request.param])
    made = MachineMemory(16, f"/ring1-test-{secrets.token_hex(8)}")
    yield made
    os.close(made.rw)
    os.close(made.ro)


def test_it_has_no_name_and_all_its_blocks(memory: MachineMemory) -> None:
    assert not Path("/dev/shm", memory.name[1:]).exists()
    info = os.fstat(memory.rw)
    assert (info.st_size, info.st_blocks * 512, info.st_mode & 0o777) == (16 * PAGE_SIZE, 16 * PAGE_SIZE, 0)
    assert not os.get_inheritable(memory.rw) and not os.get_inheritable(memory.ro)


def test_a_frame_is_read_as_it_was_written(memory: MachineMemory) -> None:
    memory.write(3, 100, b"abc")
    assert memory.read(3, 100, 3) == os.pread(memory.ro, 3, 3 * PAGE_SIZE + 100) == b"abc"
    assert memory.read(2, PAGE_SIZE - 1, 102)[-1:] == b"a", "frames that follow one another are read in one copy"
    memory.scrub(3)
    assert memory.read(3, 0, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_the_read_only_descriptor_gives_no_writable_map(memory: MachineMemory) -> None:
    with pytest.raises(PermissionError):
        mmap.mmap(memory.ro, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    mmap.mmap(memory.rw, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()


def test_code_may_run_from_it(memory: MachineMemory) -> None:
    assert may_execute(memory.ro)


def test_a_memfd_keeps_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "may_execute", lambda fd: False)
    made = MachineMemory(4, f"/ring1-test-{secrets.token_hex(8)}")
    with pytest.raises(PermissionError):
        os.ftruncate(made.rw, 0)
    os.close(made.rw)
    os.close(made.ro)


def test_more_than_there_is_is_an_error_and_leaves_nothing() -> None:
    name = f"/ring1-test-{secrets.token_hex(8)}"
    with pytest.raises(MemoryError, match="free for machine memory"):
        MachineMemory(1 << 34, name)
    assert not Path("/dev/shm", name[1:]).exists()


SCRIPT = """
mount -t tmpfs -o noexec,size=100m tmpfs /dev/shm || exit 77
exec "$0" -m dom0.cli doctor --json
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root mounts a file system")
def test_a_host_runs_where_dev_shm_is_noexec(tmp_path: Path) -> None:
    command = ["unshare", "-m", "sh", "-c", SCRIPT, sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode == 77:
        pytest.skip("this root may not mount a tmpfs")
    assert done.returncode == 0, done.stderr
    assert "a sealed memfd (/dev/shm is mounted noexec)" in done.stdout


# ---- the M2P


def test_the_m2p_says_at_first_that_nobody_named_a_frame() -> None:
    m2p = M2P(600)
    assert m2p.size == 2 * PAGE_SIZE and list(m2p.pfn[0:1024]) == [INVALID_PFN] * 1024
    m2p.pfn[599] = 7
    assert os.pread(m2p.ro, 8, 599 * 8) == bytes([7, *[0] * 7]), "who maps the descriptor sees what we write"
    assert not os.get_inheritable(m2p.ro)
    os.close(m2p.ro)


def test_nobody_else_writes_the_m2p() -> None:
    m2p = M2P(16)
    again = os.open(f"/proc/self/fd/{m2p.ro}", os.O_RDWR)
    for fd in (m2p.ro, again):
        with pytest.raises(PermissionError):
            mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match=r"Bad file|not permitted"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError, match=r"Invalid|not permitted"):
            os.ftruncate(fd, 0)
        os.close(fd)


def test_a_machine_that_is_too_large_for_its_m2p_is_an_error() -> None:
    with pytest.raises(MemoryError, match="at most 8126464"):
        M2P(M2P_BYTES // 8 + 1)


# ---- where we run


SLICES = """
import ctypes, os, struct
from hypervisor._hv import lib

def slice_ns():
    attributes = ctypes.create_string_buffer(56)
    assert ctypes.CDLL(None).syscall(315, 0, attributes, 56, 0) == 0  # sched_getattr
    return struct.unpack_from("<Q", attributes.raw, 24)[0]

before = slice_ns()
assert lib.short_slices(123_000) == 0
read, write = os.pipe()
if not os.fork():
    os.write(write, struct.pack("<Q", slice_ns()))
    os._exit(0)
os.wait()
print(before, slice_ns(), *struct.unpack("<Q", os.read(read, 8)), os.sched_getscheduler(0), os.nice(0))
"""


def test_short_slices_are_ours_alone() -> None:
    """The same policy and niceness, and children begin as they would without."""
    done = subprocess.run([sys.executable, "-c", SLICES], capture_output=True, text=True, check=True, timeout=TIMEOUT)
    before, ours, childs, policy, nice = map(int, done.stdout.split())
    if not before:
        pytest.skip("before Linux 6.12 nobody has slices of his own")
    assert ours == 123_000 and childs == before and nice == os.nice(0)
    assert policy & ~0x4000_0000 == os.SCHED_OTHER
