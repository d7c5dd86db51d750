"""The zygote: freshly exec'ed, imports the guest's modules once, forks domains on the hypervisor's word.

It holds nothing secret: no machine memory, no queue, no other domain's descriptor; what a domain needs comes on that
domain's own socket. Its children are the hypervisor's (CLONE_PARENT). It has no thread, ever.

Interface: Zygote (the hypervisor's end) and main() (the process).
"""

from __future__ import annotations

import array
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgpack

from hypervisor.gate import boot, policy
from hypervisor.gate._gate import lib
from hypervisor.loop import Loop, Resume, Wait

if TYPE_CHECKING:
    from hypervisor.domain import Process

PRELOAD = """
    hypervisor.public.callring hypervisor.public.clock hypervisor.public.console hypervisor.public.domctl
    hypervisor.public.evtchn hypervisor.public.grant hypervisor.public.memory hypervisor.public.sched hypervisor.public.sysctl
    hypervisor.public.traps hypervisor.public.version
    hypervisor.public.io.blkif hypervisor.public.io.netif hypervisor.public.io.xenbus
    domain.kernel domain.callring domain.console domain.store domain.xenbus domain.blkfront domain.netfront domain.udp
    domain.paging domain.traps domain.user hypervisor.public.user domain.posix.main domain.posix.pagetable
    array base64 binascii bisect collections dataclasses datetime enum functools hashlib heapq io itertools json math
    operator random re statistics string struct textwrap time traceback types typing zlib code codeop
    encodings.ascii encodings.idna encodings.latin_1 encodings.utf_8 linecache unicodedata selectors
""".split()
MAX_EARLY_DEATHS = 5


class Zygote:
    """The hypervisor's end: fork requests in order, a new zygote when the old one is gone."""

    def __init__(
        self,
        loop: Loop,
        adopt: Callable[[int, Callable[[], None]], Process],
        log: Callable[[str], None],
        give_up: Callable[[str], None],
    ) -> None:
        self._loop, self._adopt, self._log, self._give_up = loop, adopt, log, give_up
        self._deaths = 0  # since the last fork it answered
        self._waiting: deque[Resume] = deque()
        self.stopping = False
        self.pid = 0
        self.sock = self._start()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = spawn(f"from hypervisor.zygote import main; main({theirs.fileno()}, {os.getpid()})", [theirs.fileno()])
        theirs.close()
        ours.setblocking(False)
        self.pid = pid
        self._process = self._adopt(pid, self._died)
        self._loop.watch(ours.fileno(), self._answered)
        return ours

    def fork(self, config: boot.BootConfig, sock: socket.socket) -> Wait:
        """A Wait for the pid of a new domain's process, our child; 0 if the zygote died first."""

        def wait(resume: Resume) -> None:
            self._waiting.append(resume)
            try:
                rights = array.array("i", [sock.fileno()])
                self.sock.sendmsg([config.pack()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            except OSError:
                pass  # _died answers everybody

        return wait

    def _answered(self) -> None:
        try:
            data = self.sock.recv(64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.unwatch(self.sock.fileno())
        elif self._waiting:
            self._deaths = 0
            self._waiting.popleft()(msgpack.unpackb(data))

    def _died(self) -> None:
        self._loop.unwatch(self.sock.fileno())
        self.sock.close()
        self._process.close()
        waiting, self._waiting = self._waiting, deque()
        for resume in waiting:
            resume(0)
        if self.stopping:
            return
        self._deaths += 1
        if self._deaths >= MAX_EARLY_DEATHS:
            self._give_up("the zygote cannot start")
            return
        self._log("zygote died; starting another")
        self.sock = self._start()


def spawn(code: str, fds: list[int]) -> int:
    """Exec a fresh interpreter that runs `code` with `fds` open; returns its pid. -I: no user path, no environment."""
    with open(os.devnull, "rb") as null:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", code], pass_fds=fds, stdin=null, env={"LANG": "C.UTF-8", "PATH": os.defpath}
        )
    process.returncode = 0  # Children reaps it, not subprocess
    return process.pid


def main(fd: int, parent: int) -> None:
    """The zygote's process."""
    boot.prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(80)
    boot.prctl(4, 0)  # not dumpable, and so are its children from birth
    boot.libc.prctl(15, b"ring1/zygote\0", 0, 0, 0)
    lib.keep_capabilities(policy.CAPABILITIES)  # refused to an ordinary user, who has none to lose
    control = socket.socket(fileno=fd)
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # keeps the collector off the shared pages
    while True:
        data, ancillary, _, _ = control.recvmsg(4096, socket.CMSG_SPACE(16))
        if not data:
            return
        sock_fd = array.array("i", ancillary[0][2])[0]
        pid = lib.fork_to_parent()
        if pid == 0:
            control.close()
            boot.boot(boot.BootConfig.unpack(data), sock_fd, -1)
        control.send(msgpack.packb(max(pid, 0)))
        os.close(sock_fd)
