"""A terminal on a domain's console. Lines are edited here, by the terminal; guest bytes are shown as they are.

On a terminal ctrl-] at the beginning of a line leaves. Elsewhere the end of the input is only that: what the guest prints is
shown until it ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
from collections.abc import Iterator
from typing import Any, NamedTuple

from dom0.client import Connection, HostError

CTRL_BRACKET = b"\x1d"
SIGNALLED = 128


class Ended(NamedTuple):
    """How an attachment ended. exit_code: the guest's, 0 where we left; over: the domain is gone."""

    exit_code: int
    over: bool


def attach(domain: str) -> Ended:
    """Until the domain ends or the user leaves. Raises HostError."""
    with Connection() as host:
        host.ask("console", name=domain)
        with _end_of_file_is_ctrl_bracket():
            return _carry(host)


def run(domid: str) -> int:
    """As attach, but the domain does not outlive us; its exit code."""
    try:
        ended = attach(domid)
    except KeyboardInterrupt:
        ended = Ended(SIGNALLED + 2, over=False)
    if not ended.over:
        with Connection() as host:
            try:
                host.ask("destroy", name=domid)
            except HostError:
                pass  # it ended by itself meanwhile
    return ended.exit_code


def _carry(host: Connection) -> Ended:
    sources: list[Any] = [host, 0]
    while True:
        for message in host.ready():
            if "data" in message:
                sys.stdout.buffer.write(message["data"])
                sys.stdout.buffer.flush()
            elif "end" in message:
                return _end(message["end"], message["reason"])
        ready, _, _ = select.select(sources, [], [])
        if host in ready and not host.feed():
            raise HostError("the host ended", exit_code=3)
        if 0 in ready:
            typed = os.read(0, 4096)
            if typed:
                host.send({"data": typed})
            elif os.isatty(0):
                return Ended(0, over=False)
            else:
                sources.remove(0)


def _end(code: int, reason: str) -> Ended:
    """A guest that said no exit code was ended by somebody: that is a failure."""
    if code < 0 or reason.startswith("crash"):
        print(f"\nring1: the domain ended: {reason}", file=sys.stderr)
    return Ended(code if code >= 0 else 1, over=True)


@contextlib.contextmanager
def _end_of_file_is_ctrl_bracket() -> Iterator[None]:
    """ctrl-D goes to the guest; ctrl-] is what ends the input, as in xl."""
    if not os.isatty(0):
        yield
        return
    saved = termios.tcgetattr(0)
    changed = termios.tcgetattr(0)
    changed[6][termios.VEOF] = CTRL_BRACKET
    termios.tcsetattr(0, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)
