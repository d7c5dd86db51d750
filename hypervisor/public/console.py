"""The emergency console: lines into the hypervisor's log. Source: xen/include/public/xen.h, CONSOLEIO_*."""

from __future__ import annotations

from typing import Annotated

from hypervisor.public.hypercall import OP_CONSOLE_IO, Hypercall
from hypervisor.public.types import CONSOLE_BYTES, Data


class ConsoleWrite(Hypercall[None]):
    """Log `data`, escaped, under the caller's name; the log keeps the last 64 KiB, a domain's share of it is bounded."""

    OP, CMD = OP_CONSOLE_IO, 0
    data: Annotated[bytes, Data(CONSOLE_BYTES)]
