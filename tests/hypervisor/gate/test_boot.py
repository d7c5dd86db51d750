"""A process from its start to its lock, then its first instructions: the real gate, the real two ends of page faults.

The test is the hypervisor. Tables it has none: a dictionary says which frame a guest-virtual page shows.
"""

from __future__ import annotations

import array
import os
import re
import resource
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import posix_ipc
import pytest

from hypervisor import fault, zygote
from hypervisor.budget import Demand, Gate
from hypervisor.callring import BusyRings
from hypervisor.core import Hypervisor
from hypervisor.domain import Domain, Trap
from hypervisor.gate.boot import BootConfig
from hypervisor.gate.monitor import PROT_EXEC, PROT_READ, PROT_WRITE, Monitor, first_message, sealed_code
from hypervisor.loop import Steps, run_task
from hypervisor.machine import M2P, MachineMemory
from hypervisor.public import layout
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.layout import KERNEL_WINDOW, NR_WINDOWS, SPACE_BYTES, START_INFO_PFN, virt
from hypervisor.public.start_info import SHARED_CR2
from hypervisor.public.traps import PF_FETCH, PF_USER, PF_WRITE
from hypervisor.public.types import MESSAGE_BYTES, MESSAGES, PAGE_SIZE
from tests.conftest import TIMEOUT
from tests.models.address_space import BusyLoop

FRAMES = 16
CODE_PFN, RESULTS_PFN = 12, 13
NOTHING = 0x30_0008  # no page is there
GUEST = f"""
    .globl _start
_start: movabs ${KERNEL_WINDOW + virt(RESULTS_PFN)},%rbx
    movabs ${KERNEL_WINDOW + layout.M2P + 8 * 3},%rax
    mov (%rax),%rax
    mov %rax,(%rbx)
    movabs ${KERNEL_WINDOW + NOTHING},%rdx
    movabs ${KERNEL_WINDOW + SPACE_BYTES + NOTHING},%rsi
ATTACK
    mov %rax,(%rdx)
    mov (%rsi),%rax
    mov $231,%eax
    mov $42,%edi
    syscall
    .balign 256
    mov (%rsp),%rax
    mov %rax,8(%rbx)
    mov 32(%rsp),%rax
    mov %rax,16(%rbx)
    mov %rsp,24(%rbx)
    addq $3,8(%rsp)
    add $8,%rsp
    iretq
"""
HANDLER = KERNEL_WINDOW + virt(CODE_PFN) + 256


class Machine(Hypervisor):
    """One domain of it, born and locked; `go` lets it run to its end."""

    loop: BusyLoop

    def __init__(self, code: bytes) -> None:
        self.loop, self.demand, self.gate, self.busy_rings = BusyLoop(), Demand(), Gate(), BusyRings()
        self.machine, self.m2p = MachineMemory(FRAMES, f"/ring1-test-{secrets.token_hex(8)}"), M2P(FRAMES)
        self.pages = {virt(pfn): (pfn, PROT_READ | PROT_WRITE) for pfn in range(FRAMES)}
        self.pages[virt(CODE_PFN)] = CODE_PFN, PROT_READ | PROT_EXEC
        self.pages[layout.SHARED_INFO] = 0, PROT_READ | PROT_WRITE
        self.machine.write(CODE_PFN, 0, code)
        self.machine.write(START_INFO_PFN, 32, FRAMES.to_bytes(8, "little"))
        words = layout.VIRT_BASE.to_bytes(8, "little") + KERNEL_WINDOW.to_bytes(8, "little")
        self.machine.write(START_INFO_PFN, 2048, words)
        self.m2p.pfn[3] = 0x3333
        self.ends: list[str] = []
        self.code_fd = sealed_code()
        self._give_birth()

    def _give_birth(self) -> None:
        self.domain = domain = Domain(1, "dom1", CreateFlags.NATIVE | CreateFlags.DEBUG)
        domain.fail = self.ends.append
        domain.evt.shared_info = self.machine.pointer(0)
        domain.monitor = monitor = Monitor(self.loop, domain.fail)
        names = [f"/ring1-test-{secrets.token_hex(8)}" for _ in range(2)]
        self.queues = [posix_ipc.MessageQueue(name, posix_ipc.O_CREX, 0o600, MESSAGES, MESSAGE_BYTES) for name in names]
        config = BootConfig(1, "dom1", os.getpid(), -1, int(domain.flags), "", *names, 0, True, self.m2p.size)
        with fault.door(domain) as theirs:
            fds = [self.machine.rw, self.machine.ro, self.code_fd, monitor.command_fd, self.m2p.ro, theirs.fileno()]
            monitor.sock.sendmsg([b"boot"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        self.pid = zygote.spawn(
            "from hypervisor.gate.boot import BootConfig, boot; "
            f"boot(BootConfig.unpack(bytes.fromhex('{config.pack().hex()}')), {monitor.peer.fileno()}, -1)",
            [monitor.peer.fileno()],
        )
        monitor.handed_over()
        monitor.sock.settimeout(TIMEOUT)
        message, (smaps,) = first_message(monitor.sock)
        os.close(smaps)
        for name in names:
            posix_ipc.unlink_message_queue(name)
        kind, self.monitor_pid = msgpack.unpackb(message)
        assert kind == "monitor", self.monitor_pid
        monitor.sock.setblocking(False)
        monitor.listen()
        locked: list[Any] = []
        run_task(monitor.lock("dom1/monitor"), lambda *ended: locked.extend(ended))
        self.loop.until(lambda: bool(locked))
        self.loop.until(lambda: "\nSeccomp:\t2" in Path(f"/proc/{self.pid}/status").read_text())

    def log(self, line: str) -> None:
        self.ends.append(line)

    def go(self) -> int:
        """Its wait status."""
        self.domain.state, self.domain.launched = "running", True
        self.listen(self.domain)
        self.queues[1].send(msgpack.packb([0, 0, virt(CODE_PFN)]))
        ended: list[int] = []

        def look() -> bool:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                ended.append(status)
                self.pid = 0
            return bool(ended or self.ends)

        self.loop.until(look)
        return ended[0] if ended else -1

    # ---- in hypervisor.space's place

    def fill(self, hv: Hypervisor, domain: Domain, offset: int, error: int) -> Steps:
        if not self.reachable(hv, domain, offset, 1, error):
            return 0
        va = offset - offset % PAGE_SIZE
        assert domain.monitor is not None
        yield from domain.monitor.map([(va, *self.pages[va])])
        return 1

    def reachable(self, hv: Hypervisor, domain: Domain, offset: int, size: int, access: int) -> bool:
        needed = PROT_EXEC if access & PF_FETCH else PROT_WRITE if access & PF_WRITE else PROT_READ
        places = [self.pages.get(at - at % PAGE_SIZE) for at in (offset, offset + size - 1)]
        return all(place is not None and place[1] & needed for place in places)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        fault.hang_up(self, self.domain)
        assert self.domain.monitor is not None
        gone: list[Any] = []
        self.domain.monitor.hang_up()(gone.append)
        self.loop.until(lambda: bool(gone))
        os.waitpid(self.monitor_pid, 0)
        for queue in self.queues:
            queue.close()
        for fd in (self.machine.rw, self.machine.ro, self.m2p.ro, self.code_fd):
            os.close(fd)
        self.loop.close()


def assemble(folder: Path, attack: str = "") -> bytes:
    (folder / "guest.s").write_text(GUEST.replace("ATTACK", attack))
    binary = folder / "guest"
    flags = ["-nostdlib", "-static", "-Wl,-Ttext=0,--oformat=binary,--build-id=none"]
    subprocess.run(["gcc", *flags, "-o", str(binary), str(folder / "guest.s")], check=True, timeout=TIMEOUT)
    return binary.read_bytes()


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch, attack: str = "") -> Machine:
    made = Machine(assemble(folder, attack))
    monkeypatch.setattr(fault, "space", made)
    return made


@pytest.fixture
def hv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = machine(tmp_path, monkeypatch)
    yield made
    made.close()


# ---- locked


def test_its_windows_are_one_reservation_with_the_hypervisor_in_the_first(hv: Machine) -> None:
    begin, end = KERNEL_WINDOW, KERNEL_WINDOW + NR_WINDOWS * SPACE_BYTES
    top, found = KERNEL_WINDOW + layout.MONITOR_CODE, []
    for line in Path(f"/proc/{hv.pid}/maps").read_text().splitlines():
        first, last, kind = re.match(r"(\w+)-(\w+) (\S+)", line).groups()  # type: ignore[union-attr]
        if int(first, 16) < end and int(last, 16) > begin:
            found.append((int(first, 16), int(last, 16), kind))
    m2p = KERNEL_WINDOW + layout.M2P
    assert found == [
        (begin, top, "---p"),
        (top, top + PAGE_SIZE, "r-xs"),
        (top + PAGE_SIZE, top + PAGE_SIZE * (1 + layout.COMMAND_PAGES), "r--s"),
        (top + PAGE_SIZE * (1 + layout.COMMAND_PAGES), m2p, "---p"),
        (m2p, m2p + hv.m2p.size, "r--s"),
        (m2p + hv.m2p.size, end, "---p"),
    ]
    assert resource.prlimit(hv.pid, resource.RLIMIT_AS) == (end - begin + (4 << 30),) * 2


def test_its_descriptors_are_those_of_the_contract(hv: Machine) -> None:
    fds = {int(fd) for fd in os.listdir(f"/proc/{hv.pid}/fd")}
    assert fds == {0, 1, 2, layout.FD_REQUEST, layout.FD_REPLY, layout.FD_UPCALL, layout.FD_FAULT}
    assert {int(fd) for fd in os.listdir(f"/proc/{hv.monitor_pid}/fd")} == {3, 4, 5}, "the monitor has no end of it"


# ---- and run


def test_it_faults_its_way_from_the_first_instruction_to_the_last(hv: Machine) -> None:
    """Nothing is mapped at first. start_info, code, stack are filled, and shared_info, which the entry code reads; two pages
    that are not there are its handler's."""
    hv.domain.traps[14] = Trap(HANDLER, 0)
    status = hv.go()
    assert not hv.ends and os.waitstatus_to_exitcode(status) == 42
    m2p, error, interrupted, frame = (int.from_bytes(hv.machine.read(RESULTS_PFN, at, 8), "little") for at in (0, 8, 16, 24))
    assert m2p == 0x3333 and error == PF_USER, "of the second one, a read"
    assert interrupted == KERNEL_WINDOW + virt(FRAMES) - 8 and frame == ((interrupted - 128) & ~15) - 48
    assert int.from_bytes(hv.machine.read(0, SHARED_CR2, 8), "little") == SPACE_BYTES + NOTHING, "in the second window"
    assert (hv.domain.faults, hv.domain.fills, hv.domain.bounces) == (7, 5, 2)


def test_without_a_handler_it_ends(hv: Machine) -> None:
    assert hv.go() == -1
    assert hv.ends == [f"page fault at guest address {NOTHING:#x} (write): not mapped, and no handler"]


SIGNAL_ITSELF = "mov $39,%eax\n syscall\n mov %eax,%edi\n mov ${},%esi\n mov $62,%eax\n syscall"  # kill(getpid(), ...)
REASONS = {
    "cli": r"no handler for vector 13 \(general protection\) at 0x20000010c[0-9a-f]{3}, error code 0x0",
    "ud2": r"no handler for vector 6 \(invalid opcode\) at 0x20000010c[0-9a-f]{3}, error code 0x0",
    "int3": r"no handler for vector 3 \(breakpoint\) at 0x20000010c[0-9a-f]{3}, error code 0x0",
    "movq $0,0": r"page fault outside the windows, at 0x0, error code 0x6, instruction 0x20000010c[0-9a-f]{3}",
    SIGNAL_ITSELF.format(11): "SIGSEGV, which it sent itself",
    SIGNAL_ITSELF.format(8): "SIGFPE, which it sent itself",
}


@pytest.mark.parametrize("attack", REASONS)
def test_what_nobody_handles_ends_it_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str) -> None:
    hv = machine(tmp_path, monkeypatch, attack)
    try:
        hv.go()
        assert len(hv.ends) == 1 and re.fullmatch(REASONS[attack], hv.ends[0])
    finally:
        hv.close()


def test_a_domain_that_cannot_say_so_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hv = machine(tmp_path, monkeypatch, "mov $3,%eax\n mov $12,%edi\n syscall\n ud2")  # close(FD_FAULT)
    try:
        status = hv.go()
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV and not hv.ends
    finally:
        hv.close()


def test_the_m2p_is_read_only_and_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store to it is the guest's own page fault."""
    hv = machine(tmp_path, monkeypatch, f"movabs ${KERNEL_WINDOW + layout.M2P},%rcx\n mov %rax,(%rcx)")
    try:
        assert hv.go() == -1
        assert hv.ends == [f"page fault at guest address {layout.M2P:#x} (write): not mapped, and no handler"]
    finally:
        hv.close()
