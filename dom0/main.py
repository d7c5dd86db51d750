"""dom0: `async def main(kernel)`, the first domain's program. The toolstack, its driver domains, and the control socket."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dom0 import clock
from dom0.control import ControlServer
from dom0.toolstack import Toolstack

if TYPE_CHECKING:
    from domain.kernel import Kernel


async def main(kernel: Kernel) -> None:
    """Serve until `down`."""
    state = Path(dict(word.split("=", 1) for word in shlex.split(kernel.cmdline))["state"])
    toolstack = Toolstack(kernel, state)
    await toolstack.start()
    kernel.spawn(clock.follow(kernel, clock.watch()), name="wall clock")
    await ControlServer(kernel, toolstack, state).serve()
