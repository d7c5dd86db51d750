"""A guest that does what its console says: a line is Python in base64, the body of a coroutine; its value is printed as JSON.

An answer is the byte 2, then ["is", value] or ["raised", "Class: message"]. Globals stay from one line to the next.
"""

from __future__ import annotations

import base64
import itertools
import json
import textwrap
import time
from typing import TYPE_CHECKING, Any

import msgpack

from domain import memory
from domain._guest import ffi, lib
from hypervisor.public import console, domctl, evtchn, grant, layout, sched, sysctl, types, version
from hypervisor.public.errors import XenError
from hypervisor.public.io import blkif, xs_wire
from hypervisor.public.io import console as console_io

if TYPE_CHECKING:
    from domain.kernel import Kernel


MQ_TIMEDSEND, MQ_TIMEDRECEIVE = 242, 243
PLACES = {
    "console out_prod": (layout.CONSOLE_PFN, console_io.OUT_PROD),
    "console in_cons": (layout.CONSOLE_PFN, console_io.IN_CONS),
    "store req_prod": (layout.STORE_PFN, xs_wire.REQ_PROD),
    "store rsp_cons": (layout.STORE_PFN, xs_wire.RSP_CONS),
}


def status(call: Any, *arguments: Any) -> str:
    """The name of a call's refusal, "" where it was done."""
    try:
        call(*arguments)
    except XenError as error:
        return type(error).__name__
    return ""


def trap(message: bytes, replies: int = 1) -> Any:
    """Raw bytes into the request queue, by a system call of our own; the reply, or minus an errno. `replies` 0: unread."""
    data: Any = ffi.new("char[]", message)
    result = lib.raw6(MQ_TIMEDSEND, layout.FD_REQUEST, address(data), len(message), 0, 0, 0)
    return take() if replies and result == 0 else result


def take(wait: bool = True) -> Any:
    """The next reply of the queue; without `wait` minus ETIMEDOUT where there is none."""
    room, past = ffi.new("char[]", types.MESSAGE_BYTES), ffi.new("int64_t[2]")
    size = lib.raw6(MQ_TIMEDRECEIVE, layout.FD_REPLY, address(room), types.MESSAGE_BYTES, 0, 0 if wait else address(past), 0)
    return msgpack.unpackb(bytes(ffi.buffer(room, size))) if size >= 0 else size


def resync() -> None:
    """After calls whose replies were not read: until the reply of the last one is, so that the library's own come next."""
    for marker in itertools.count(0xF0000000):
        trap(msgpack.packb([17, marker, 0]), replies=0)
        end = time.monotonic() + 0.1  # it may have found no room and be lost
        while time.monotonic() < end:
            reply = take(wait=False)
            if not isinstance(reply, int) and reply[0] == marker:
                return


def address(pointer: Any) -> int:
    """The number of a cffi pointer."""
    return int(ffi.cast("intptr_t", pointer))


def poke(at: int, value: int) -> None:
    """A native store of 32 bits at a host address."""
    memory.write(at, value.to_bytes(4, "little"))


def push(name: str, value: int) -> None:
    """A native store to one index of the store's or the console's page."""
    page, offset = PLACES[name]
    poke(layout.KERNEL_WINDOW + layout.virt(page) + offset, value)


async def main(kernel: Kernel) -> None:
    def trap_alone(message: bytes, replies: int = 1) -> Any:
        kernel.hypercall.settle()  # an answer that the library has left in the queue is not ours
        return trap(message, replies)

    space: dict[str, Any] = {
        "kernel": kernel, "memory": memory, "ffi": ffi, "lib": lib, "raw": lib.raw6, "status": status, "XenError": XenError,
        "console": console, "domctl": domctl, "evtchn": evtchn, "grant": grant, "layout": layout, "sched": sched,
        "sysctl": sysctl, "types": types, "version": version, "WINDOW": layout.KERNEL_WINDOW, "address": address,
        "trap": trap_alone, "take": take, "resync": resync, "poke": poke, "push": push,
        "msgpack": msgpack, "blkif": blkif, "XsType": xs_wire.XsType,
    }  # fmt: skip
    while True:
        code = base64.b64decode(await kernel.console.readline()).decode()
        try:
            exec("async def puppet():\n" + textwrap.indent(code, "    ") + "\n    pass\n", space)
            answer = ["is", await space["puppet"]()]
        except Exception as error:
            answer = ["raised", f"{type(error).__name__}: {error}"]
        kernel.console.write("\x02" + json.dumps(answer, default=lambda value: bytes(value).hex()) + "\n")
