"""What hostile native code would try first, from inside a locked domain: the attempts of `ring1 doctor`.

Every attempt is a raw system call or a store by C code. cmdline: "name1,name2": these, one after the other, and how each
came out is printed as "NAME RESULT". One that the domain does not survive has to be its last.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from domain import memory
from domain._guest import ffi, lib
from hypervisor.public.layout import (
    COMMANDS,
    FD_REQUEST,
    GRANT_BASE,
    HYPERVISOR_VIRT_START,
    KERNEL_WINDOW,
    MONITOR_CODE,
    SHARED_INFO,
    SPACE_BYTES,
    VIRT_BASE,
)

if TYPE_CHECKING:
    from domain.kernel import Kernel

EPERM, ENOSYS = errno.EPERM, errno.ENOSYS
KILLED, FAULTED = "SIGSYS", "SIGSEGV"  # verdicts that end the domain
OWN, CODE, PAGES = KERNEL_WINDOW + VIRT_BASE, KERNEL_WINDOW + MONITOR_CODE, KERNEL_WINDOW + COMMANDS
FREE = KERNEL_WINDOW + GRANT_BASE
RW, RWX, FIXED, ANON, GROWS = 3, 7, 0x32, 0x22, 0x122  # protections; MAP_ flags
PARENT, SELF = "parent", "self"  # pids, known when it runs
X32 = 0x40000000


class Attempt(NamedTuple):
    """`verdict` is what must come of it: an errno, or how the domain ends. Text arguments are paths."""

    name: str
    verdict: int | str
    call: int
    arguments: tuple[int | str, ...] = ()


def attempts() -> list[Attempt]:
    """All of them. The first would do no harm where it succeeded."""
    no: list[tuple[Any, ...]] = [
        ("open a file", 257, -100, "/etc/passwd", 0),
        ("open by handle", 304, -100, "/", 0),
        ("open its own memory", 257, -100, "/proc/self/mem", 2),
        ("make a socket", 41, 1, 1, 0),
        ("make an internet socket", 41, 2, 1, 0),
        ("make a pipe", 293, OWN, 0),
        ("make a memfd", 319, "x", 0),
        ("open a queue", 240, "ring1", 2, 0, 0),
        ("copy a descriptor", 32, FD_REQUEST),
        ("copy it by fcntl", 72, FD_REQUEST, 0, 50),
        ("make its queue non-blocking", 72, FD_REQUEST, 4, 0o4000),
        ("send a descriptor", 46, FD_REQUEST, OWN, 0),
        ("truncate a descriptor", 77, FD_REQUEST, 0),
        ("map over the first page", 9, KERNEL_WINDOW, 4096, RW, FIXED, -1, 0),
        ("map over a frame", 9, OWN, 4096, RW, FIXED, -1, 0),
        ("map over the monitor", 9, CODE, 4096, RWX, FIXED, -1, 0),
        ("map over shared_info", 9, KERNEL_WINDOW + SHARED_INFO, 4096, RW, FIXED, -1, 0),
        ("map into the window from below", 9, KERNEL_WINDOW - 4096, 8192, RW, FIXED, -1, 0),
        ("map anything", 9, 0, 4096, RW, ANON, -1, 0),
        ("map executable memory", 9, 0, 4096, RWX, ANON, -1, 0),
        ("map a file", 9, 0, 4096, 1, 2, FD_REQUEST, 0),
        ("map a growing stack above", 9, KERNEL_WINDOW + SPACE_BYTES + (2 << 32), 4096, RW, GROWS, -1, 0),
        ("unmap a frame", 11, OWN, 4096),
        ("unmap the monitor", 11, CODE, 4096),
        ("unmap the window", 11, KERNEL_WINDOW, SPACE_BYTES),
        ("make the monitor writable", 10, CODE, 4096, RWX),
        ("make the commands writable", 10, PAGES, 4096, RW),
        ("make the window writable", 10, FREE, 4096, RW),
        ("punch a hole in a frame", 28, OWN, 4096, 9),
        ("forget a frame", 28, OWN, 4096, 4),
        ("lock memory", 149, OWN, 4096),
        ("pin pages", 278, FD_REQUEST, OWN, 1, 0),
        ("kill the hypervisor", 62, PARENT, 9),
        ("kill everybody", 62, -1, 9),
        ("signal a thread of the hypervisor", 234, PARENT, PARENT, 9),
        ("signal by pidfd", 424, 3, 9, 0, 0),
        ("queue a signal", 129, PARENT, 12, OWN),
        ("change the hypervisor's limits", 302, PARENT, 7, OWN, 0),
        ("move the hypervisor", 203, PARENT, 8, OWN),
        ("raise its own priority", 141, 0, 0, -5),
        ("fork", 57),
        ("make a second monitor", 56, 0x108111, 0),
        ("make a thread", 56, 0x3D0F00, OWN),
        ("execute a program", 59, "/bin/true", 0, 0),
        ("outlive the hypervisor", 157, 1, 0),
        ("become dumpable", 157, 4, 1),
        ("add a filter", 317, 1, 0, 0),
        ("become root", 105, 0),
        ("take the SIGSEGV handler", 13, 11, OWN, 0, 8),
        ("requeue a waiter", 202, OWN, 3, 1, 1, OWN + 64),
        ("share memory by key", 29, 0, 4096, 0o600),
    ]
    killed: list[tuple[Any, ...]] = [
        ("trace the hypervisor", 101, 16, PARENT, 0, 0),
        ("write into itself", 311, SELF, OWN, 1, OWN, 1, 0),
        ("read the hypervisor", 310, PARENT, OWN, 1, OWN, 1, 0),
        ("open a pidfd", 434, PARENT, 0),
        ("make an io_uring", 425, 8, OWN),
        ("make a userfaultfd", 323, 0),
        ("leave its user namespace", 272, 0x10000000),
        ("call by x32 numbers", 39 | X32),
    ]
    stores = [
        ("store to the monitor's code", CODE),
        ("store to the commands", PAGES),
        ("store beside its frames", FREE),
        ("store to the first page", KERNEL_WINDOW),
        ("store to the top 64 MB", KERNEL_WINDOW + HYPERVISOR_VIRT_START + (1 << 20)),
    ]
    out = [Attempt(name, EPERM, call, tuple(arguments)) for name, call, *arguments in no]
    out.append(Attempt("move a frame", ENOSYS, 25, (OWN, 4096, 4096, 3, FREE)))
    out += [Attempt(name, KILLED, call, tuple(arguments)) for name, call, *arguments in killed]
    return out + [Attempt(name, FAULTED, -1, (address,)) for name, address in stores]


def perform(attempt: Attempt) -> int:
    """Do it; what the system call returned."""
    known = {PARENT: os.getppid(), SELF: os.getpid()}
    alive, words = [], []
    for argument in attempt.arguments:
        if isinstance(argument, str) and argument not in known:
            alive.append(ffi.new("char[]", argument.encode()))
            words.append(int(ffi.cast("intptr_t", alive[-1])))
        else:
            words.append(known[argument] if isinstance(argument, str) else argument)
    if attempt.call < 0:
        memory.write(words[0], b"x")
        return 0
    result: int = lib.raw6(attempt.call, *words, *[0] * (6 - len(words)))
    return result


async def main(kernel: Kernel) -> int:
    wanted = kernel.cmdline.split(",")
    for attempt in attempts():
        if attempt.name in wanted:
            result = perform(attempt)
            print(f"{attempt.name}\t{result}")
            if result >= 0:
                return 1  # it is out: nothing after this would mean anything
    return 0
