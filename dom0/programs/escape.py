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
    FD_FAULT,
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
KILLED, FAULTED = "SIGSYS", "page fault"  # verdicts that end the domain
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
        ("attach shared memory over a frame", 30, 0, OWN, 0o40000),
        ("map by a hint into the window", 9, FREE, 4096, RW, ANON, -1, 0),
        ("map more than the window", 9, KERNEL_WINDOW - 4096, SPACE_BYTES + 8192, RW, FIXED, -1, 0),
        ("unmap from below into the window", 11, KERNEL_WINDOW - 4096, 8192),
        ("upgrade a frame by a protection key", 329, OWN, 4096, RW, 0),
        ("bind memory to a node", 237, OWN, 4096, 0, 0, 0, 0),
        ("move pages", 279, 0, 1, OWN, 0, 0, 0),
        ("choose a memory policy", 238, 0, 0, 0),
        ("seal its heap", 462, OWN, 4096, 0),
        ("open by openat2", 437, -100, "/etc/passwd", OWN, 24),
        ("create a file", 85, "/tmp/x", 0o600),
        ("open the hypervisor's descriptors", 257, -100, "/proc/1/fd/3", 2),
        ("remove a name", 87, "/tmp/x"),
        ("remove a queue", 241, "ring1"),
        ("be notified of a queue", 244, FD_REQUEST, 0),
        ("make an eventfd", 290, 0, 0),
        ("make an epoll", 291, 0),
        ("make a timerfd", 283, 1, 0),
        ("make an inotify", 294, 0),
        ("make a timer", 222, 1, OWN, OWN + 64),
        ("bind a socket", 49, FD_REQUEST, OWN, 16),
        ("connect a socket", 42, FD_REQUEST, OWN, 16),
        ("change a socket", 54, FD_REQUEST, 1, 1, OWN, 4),
        ("shut a socket", 48, FD_REQUEST, 2),
        ("copy a descriptor to a number", 33, FD_REQUEST, 50),
        ("copy it by dup3", 292, FD_REQUEST, 50, 0),
        ("own a descriptor's signals", 72, FD_REQUEST, 8, PARENT),
        ("choose a descriptor's signal", 72, FD_REQUEST, 10, 9),
        ("grow a pipe", 72, FD_REQUEST, 1031, 1 << 20),
        ("seal a file", 72, FD_REQUEST, 1033, 1),
        ("type into a terminal", 16, 0, 0x5412, OWN),
        ("own a descriptor by ioctl", 16, FD_REQUEST, 0x8901, OWN),
        ("make a descriptor send signals", 16, FD_REQUEST, 0x5452, OWN),
        ("receive a descriptor", 47, FD_REQUEST, OWN, 0),
        ("send to a name", 44, FD_FAULT, OWN, 8, 0, OWN, 16),
        ("send on another descriptor", 44, FD_REQUEST, OWN, 8, 0, 0, 0),
        ("send a file", 40, FD_REQUEST, 0, 0, 8),
        ("splice", 275, 0, 0, FD_REQUEST, 0, 8, 0),
        ("tee", 276, 0, FD_REQUEST, 8, 0),
        ("copy a file's range", 326, 0, 0, FD_REQUEST, 0, 8, 0),
        ("write at an offset", 18, FD_REQUEST, OWN, 8, 0),
        ("allocate in a file", 285, FD_REQUEST, 0, 0, 8),
        ("set up asynchronous I/O", 206, 1, OWN),
        ("enter an io_uring", 426, 3, 1, 1, 0, 0, 0),
        ("kill its group", 62, 0, 9),
        ("signal a thread", 200, PARENT, 9),
        ("queue a signal for a thread", 297, PARENT, PARENT, 12, OWN),
        ("change its own limits", 160, 2, OWN),
        ("become real-time", 144, 0, 1, OWN),
        ("lower the hypervisor's priority", 141, 0, PARENT, 19),
        ("raise its I/O priority", 251, 1, 0, 0),
        ("fork by vfork", 58),
        ("fork by clone", 56, 17, 0),
        ("clone into a user namespace", 56, 0x10000011, 0),
        ("execute by execveat", 322, -100, "/bin/true", 0, 0, 0),
        ("change its own map", 157, 35, 1, OWN),
        ("be traced by anybody", 157, 0x59616D61, -1),
        ("keep a capability", 157, 47, 2, 7),
        ("filter itself by prctl", 157, 22, 1),
        ("dispatch its own calls", 157, 59, 1, 0, 0, OWN),
        ("move its FS base", 158, 0x1002, OWN),
        ("map another vDSO", 158, 0x2003, FREE),
        ("become root thrice", 117, 0, 0, 0),
        ("take capabilities", 126, OWN, OWN + 64),
        ("change the root", 161, "/"),
        ("change the directory", 80, "/"),
        ("reboot", 169, 0, 0, 0),
        ("read the host's log", 103, 2, OWN, 64),
        ("leave its group", 109, 0, 0),
        ("leave its session", 112),
        ("set quotas", 179, 0, 0, 0, 0),
        ("open the I/O ports", 172, 3),
        ("open some I/O ports", 173, 0, 16, 1),
        ("compare processes", 312, PARENT, SELF, 0, 0, 0),
        ("a call that there is not", 9999),
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
        ("call number -1", 0xFFFFFFFF),
        ("seize the hypervisor", 101, 0x4206, PARENT, 0, 0),
        ("be traced", 101, 0, 0, 0, 0),
        ("remap its pages", 216, OWN, 4096, 0, 1, 0),
        ("advise another process", 440, 3, OWN, 1, 4, 0),
        ("copy a descriptor of the hypervisor", 438, 3, 4, 0),
        ("load a program into the kernel", 321, 5, OWN, 72),
        ("count events", 298, OWN, 0, -1, -1, 0),
        ("enter a namespace", 308, FD_REQUEST, 0),
        ("mount", 165, "x", "/", 0, 0, 0),
        ("use a keyring", 250, 0, -1),
        ("execute what is readable", 135, 0x400000),
        ("make a descriptor table", 154, 1, OWN, 16),
    ]
    stores = [
        ("store to the monitor's code", CODE),
        ("store to the commands", PAGES),
        ("store beside its frames", FREE),
        ("store to the first page", KERNEL_WINDOW),
        ("store to the top 64 MB", KERNEL_WINDOW + HYPERVISOR_VIRT_START + (1 << 20)),
    ]
    out = [Attempt(name, EPERM, call, tuple(arguments)) for name, call, *arguments in no]
    out += [
        Attempt("move a frame", ENOSYS, 25, (OWN, 4096, 4096, 3, FREE)),
        Attempt("map a frame a second time", ENOSYS, 25, (OWN, 0, 4096, 1, 0)),
        Attempt("fork by clone3", ENOSYS, 435, (OWN, 88)),
    ]
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
