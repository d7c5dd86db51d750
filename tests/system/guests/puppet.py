"""A guest that does what its console says: a line is Python in base64, the body of a coroutine; its value is printed as JSON.

An answer is the byte 2, then ["is", value] or ["raised", "Class: message"]. Globals stay from one line to the next.
"""

from __future__ import annotations

import base64
import json
import textwrap
from typing import TYPE_CHECKING, Any

from domain import memory
from domain._guest import ffi, lib
from hypervisor.public import console, domctl, evtchn, grant, layout, sched, sysctl, types, version
from hypervisor.public.errors import XenError

if TYPE_CHECKING:
    from domain.kernel import Kernel


def status(call: Any, *arguments: Any) -> str:
    """The name of a call's refusal, "" where it was done."""
    try:
        call(*arguments)
    except XenError as error:
        return type(error).__name__
    return ""


async def main(kernel: Kernel) -> None:
    space: dict[str, Any] = {
        "kernel": kernel, "memory": memory, "ffi": ffi, "lib": lib, "raw": lib.raw6, "status": status, "XenError": XenError,
        "console": console, "domctl": domctl, "evtchn": evtchn, "grant": grant, "layout": layout, "sched": sched,
        "sysctl": sysctl, "types": types, "version": version, "WINDOW": layout.KERNEL_WINDOW,
    }  # fmt: skip
    while True:
        code = base64.b64decode(await kernel.console.readline()).decode()
        try:
            exec("async def puppet():\n" + textwrap.indent(code, "    ") + "\n    pass\n", space)
            answer = ["is", await space["puppet"]()]
        except Exception as error:
            answer = ["raised", f"{type(error).__name__}: {error}"]
        kernel.console.write("\x02" + json.dumps(answer, default=lambda value: bytes(value).hex()) + "\n")
