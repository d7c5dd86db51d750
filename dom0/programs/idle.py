"""A domain that says when it was ready, and waits for its end: the template of scripts/launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from domain.sched import Event

if TYPE_CHECKING:
    from domain.kernel import Kernel


async def main(kernel: Kernel) -> None:
    ready = kernel.now_ns()
    await kernel.store.write("data/ready", ready)
    await Event().wait()
