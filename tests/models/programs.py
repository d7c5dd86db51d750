"""Applications of a hypervisor without processes: their two processes, their gate and what they have mapped, in this process.

`Programs` is a StandIn whose zygote makes them. What is killed dies when the test lets it (`bury`), and a monitor answers when
it is told to, so that whatever the hypervisor does in between it does with a program that still has everything mapped.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any

from hypervisor import space
from hypervisor.domain import Domain, Process
from hypervisor.gate.monitor import PROT_WRITE, SYS_MMAP, SYS_MPROTECT, SYS_MUNMAP
from hypervisor.loop import Resume, Wait
from hypervisor.public import traps
from hypervisor.public.layout import SPACE_BYTES
from hypervisor.public.user import USER_START
from tests.models.address_space import AddressSpace
from tests.models.stand_in import StandIn


class Mortal(Process):
    """A process that remembers what it was sent, and dies when it is buried."""

    def __init__(self, pid: int, on_exit: Callable[[], None]) -> None:
        super().__init__(pid, -1)
        self.on_exit, self.signals = on_exit, list[int]()

    def signal(self, number: int) -> None:
        if not self.ended:
            self.signals.append(number)

    @property
    def doomed(self) -> bool:
        return signal.SIGKILL in self.signals

    def bury(self) -> None:
        self.ended = True
        self.on_exit()
        for resume in self.waiting:
            resume(None)


class Program(AddressSpace):
    """What one has mapped, its two processes, and its gate: the end of the socket of faults."""

    base, size = 0, SPACE_BYTES

    def __init__(self, pids: tuple[int, int], fds: list[int]) -> None:
        super().__init__(fds[0], fds[3])
        self.pids = pids
        self.gate = socket.socket(fileno=os.dup(fds[4]))
        self.gate.setblocking(False)

    def _run(self, nr: int, address: int, size: int, prot: int, flags: int, fd: int, offset: int) -> None:
        if nr == SYS_MUNMAP:
            for va in [va for va in self.pages if address <= va < address + size]:
                del self.pages[va]
        elif nr in (SYS_MMAP, SYS_MPROTECT):
            assert address >= USER_START or not size, "the host maps nothing there"
            super()._run(nr, address, size, prot, flags, fd, offset)

    def say(self, message: bytes) -> None:
        """On the socket of faults."""
        try:
            self.gate.send(message)
        except OSError:
            pass

    def hear(self) -> bytes:
        """What the hypervisor answered there; nothing."""
        try:
            return self.gate.recv(64)
        except OSError:
            return b""

    def die(self) -> None:
        if not self.dead:
            self.gate.close()
        super().die()


class Programs(StandIn):
    def __init__(self, nr_frames: int = 512) -> None:
        self.programs: list[Program] = []
        self._known: set[Any] = set()  # users that there were: their sockets are closed in the end
        self.processes: dict[int, Mortal] = {}
        self.refusing = self.stillborn = False  # the zygote, the next time: cannot fork; makes one that ends at once
        self._pids = itertools.count(1000)
        super().__init__(nr_frames)
        self.landlock = 0
        self.expecting = 0
        self.children: Any = self
        self.users: Any = self
        self.scheduler.house = lambda *_: None  # type: ignore[method-assign]

    # ---- as the zygote, and as the children of a hypervisor

    def fork(self, order: bytes, fds: list[int]) -> Wait:
        def wait(resume: Resume) -> None:
            self._known |= {user for domain in self.domains.values() for user in domain.users.values()}
            if self.refusing:
                self.loop.soon(lambda: resume(0))
                return
            pids = next(self._pids), next(self._pids)
            program = Program(pids, fds)
            self.programs.append(program)
            self.spaces[pids[0]] = program  # so that it is served, checked and closed as the others are
            if self.stillborn:
                program.die()
            else:
                program.sock.send(struct.pack("<Q", pids[1]))
                program.say(bytes(traps.FAULT.size))  # it has left its first stack
            self.loop.soon(lambda: resume(pids[0]))

        return wait

    def adopt(self, pid: int, on_exit: Callable[[], None]) -> Mortal:
        process = self.processes[pid] = Mortal(pid, on_exit)
        if self.spaces[pid - pid % 2].dead:
            process.signals.append(signal.SIGKILL)
        return process

    # ---- deaths

    def bury(self) -> bool:
        """Who was killed is gone; the memory of a program goes with the last of its two. False: there was nobody."""
        doomed = [process for process in self.processes.values() if process.doomed and not process.ended]
        for process in doomed:
            process.bury()
        for program in self.programs:
            if not program.dead and all(pid in self.processes and self.processes[pid].ended for pid in program.pids):
                program.die()
        return bool(doomed)

    def serve_all(self) -> None:
        super().serve_all()
        self.check(audit=False)
        while self.bury():
            super().serve_all()
            self.check(audit=False)

    def close(self) -> None:
        for user in self._known:
            user.handed_over()
            user.monitor.fail_all()
            for sock in (user.fault_socket, user.monitor.sock):
                if sock.fileno() >= 0:
                    self.loop.unwatch(sock.fileno())
                    sock.close()
        super().close()

    # ---- what must hold

    def quiet(self) -> None:
        super().quiet()
        for domain in self.domains.values():
            if domain.alive:
                self._quiet_programs(domain)

    def _quiet_programs(self, domain: Domain) -> None:
        said = space.dump(self, domain)
        for user in domain.users.values():
            program = next((p for p in self.programs if user.process is not None and p.pids[0] == user.process.pid), None)
            if program is None or user.dying:
                continue
            begin = user.window * SPACE_BYTES
            mapped = {at - begin: page for at, page in said.items() if begin + USER_START <= at < begin + SPACE_BYTES}
            by_hand = {va: (mfn, bool(prot & PROT_WRITE)) for va, (mfn, prot) in user.monitor.shadow.items()}
            assert program.pages == mapped | by_hand, (
                f"the program of root {user.root:#x}: {sorted(program.pages.items() ^ (mapped | by_hand).items())}"
            )


def fault(address: int, error: int) -> bytes:
    """What the gate says of one."""
    return traps.FAULT.pack(address, error, 0x400000, 0x500000, 0)
