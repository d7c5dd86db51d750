"""For tests of SharedRing: names, records, and a peer in a forked process or in this one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from ringlib import SharedRing
from tests.conftest import TIMEOUT

fork = multiprocessing.get_context("fork")
numbers = itertools.count()
SIZE = 64
SOON = 0.3  # seconds: what a wait takes that is meant to end by its timeout


def new_name() -> str:
    return f"/ring1-test-{os.getpid()}-{next(numbers)}"


def records(first: int, count: int, size: int = SIZE) -> bytes:
    return b"".join(struct.pack("<Q", first + i).ljust(size, b"%c" % (i % 251)) for i in range(count))


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    """A forked child that must end well; killed if the test does not get that far."""
    child = fork.Process(target=target, args=arguments)
    child.start()
    try:
        yield child
        child.join(TIMEOUT)
        assert child.exitcode in (0, -signal.SIGKILL), f"the child ended with {child.exitcode}"
    finally:
        child.kill()
        child.join()


@contextmanager
def both(request: int = SIZE, response: int = 0, **more: Any) -> Iterator[tuple[SharedRing, SharedRing]]:
    """Both ends in this process."""
    with SharedRing.create(new_name(), request, response, **more) as front, SharedRing.attach(front.name) as back:
        yield front, back
