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
INPUT_BYTES = 4096  # that wait for a guest: dom0/consoles.py keeps no more


class Ended(NamedTuple):
    """How an attachment ended. exit_code: the guest's, 0 where we left; over: the domain is gone."""

    exit_code: int
    over: bool


def attach(domain: str, farewell: bytes = b"") -> Ended:
    """Until the domain ends or the user leaves. `farewell` is typed where the input is no terminal and ends.

    Raises HostError.
    """
    with Connection() as host:
        host.ask("console", name=domain)
        with _end_of_file_is_ctrl_bracket():
            return _carry(host, farewell)


def run(domid: str, farewell: bytes = b"") -> int:
    """As attach, but the domain does not outlive us; its exit code."""
    try:
        ended = attach(domid, farewell)
    except KeyboardInterrupt:
        ended = Ended(SIGNALLED + 2, over=False)
    if not ended.over:
        with Connection() as host:
            try:
                host.ask("destroy", name=domid)
            except HostError:
                pass  # it ended by itself meanwhile
    return ended.exit_code


def _carry(host: Connection, farewell: bytes) -> Ended:
    """Keys are typed no faster than the guest reads, so that none of a file is lost; on a terminal its user sees to that."""
    terminal, typing, room = os.isatty(0), True, INPUT_BYTES
    while True:
        for message in host.ready():
            if "data" in message:
                sys.stdout.buffer.write(message["data"])
                sys.stdout.buffer.flush()
            elif "took" in message:
                room = min(INPUT_BYTES, room + message["took"])
            elif "end" in message:
                return _end(message["end"], message["reason"])
        listening = typing and (terminal or room > len(farewell))
        sources: list[Any] = [host, 0] if listening else [host]
        ready, _, _ = select.select(sources, [], [])
        if host in ready and not host.feed():
            raise HostError("the host ended", exit_code=3)
        if 0 in ready:
            typed = os.read(0, INPUT_BYTES if terminal else room - len(farewell))
            if not typed and terminal:
                return Ended(0, over=False)
            typing = bool(typed)
            if keys := typed or farewell:
                host.send({"data": keys})
                room -= len(keys)


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
