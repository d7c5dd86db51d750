"""The hypervisor's end of a monitor: batches, errors half way, silence, death, and a shadow that is exact."""

from __future__ import annotations

import mmap
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.gate import monitor as module
from hypervisor.gate import policy
from hypervisor.gate.monitor import (
    BLOB,
    MAX_COMMANDS,
    PROT_READ,
    PROT_WRITE,
    Monitor,
    MonitorError,
    MonitorGone,
    Page,
    first_message,
    runs,
    sealed_code,
)
from hypervisor.loop import Steps, run_task
from hypervisor.public.layout import COMMANDS, KERNEL_WINDOW
from hypervisor.public.types import PAGE_SIZE
from tests.models.address_space import ENOMEM, ZERO, AddressSpace, BusyLoop

RW = PROT_READ | PROT_WRITE


class Bench:
    """A monitor of the hypervisor's, the address space at its other end, and the loop between them."""

    def __init__(self, kind: type[Monitor] = Monitor) -> None:
        self.loop = BusyLoop()
        self.failures: list[str] = []
        self.monitor = kind(self.loop, self.failures.append)
        self.space = AddressSpace(self.monitor.peer.fileno(), self.monitor.command_fd)
        self.monitor.handed_over()
        self.monitor.listen()

    def start(self, steps: Steps) -> list[Any]:
        """[value, error] once it ended."""
        out: list[Any] = []
        run_task(steps, lambda value, error: out.extend((value, error)))
        return out

    def serve(self, *fail: int) -> None:
        """Let the space run what it was sent, batch after batch; the first `fail` is the command that fails."""
        at, served = fail[0] if fail else None, 0
        while self.space.waiting():
            here = at - served if at is not None and served <= at < served + MAX_COMMANDS else None
            served += self.space.serve(here)
            self.loop.settle()

    def exact(self) -> None:
        """With nothing under way, the shadow is what is mapped."""
        real = {va: (mfn, RW if writable else PROT_READ) for va, (mfn, writable) in self.space.pages.items() if mfn != ZERO}
        assert self.monitor.shadow == real

    def close(self) -> None:
        self.space.die()
        self.monitor.fail_all()
        self.loop.unwatch(self.monitor.sock.fileno())
        self.monitor.sock.close()
        self.loop.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def scattered(nr: int, base: int = 0, first_mfn: int = 0) -> list[Page]:
    """Pages that are neighbours in the space and none in the machine: a command each."""
    return [(base + i * PAGE_SIZE, first_mfn + 2 * i, RW if i % 3 else PROT_READ) for i in range(nr)]


# ---- runs


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from([PROT_READ, RW])), max_size=40))
def test_runs_are_the_same_pages_in_as_few_commands_as_there_can_be(raw: list[tuple[int, int, int]]) -> None:
    pages = [(va * PAGE_SIZE, mfn, prot) for va, mfn, prot in raw]
    out = runs(pages)
    assert [(va + i * PAGE_SIZE, mfn + i, prot) for va, mfn, n, prot in out for i in range(n)] == pages
    for (va, mfn, n, prot), (next_va, next_mfn, _, next_prot) in pairwise(out):
        assert (va + n * PAGE_SIZE, mfn + n, prot) != (next_va, next_mfn, next_prot)


# ---- batches


def test_a_contiguous_run_is_one_command(bench: Bench) -> None:
    out = bench.start(bench.monitor.map([(i * PAGE_SIZE, 100 + i, RW) for i in range(500)]))
    assert not bench.monitor.shadow, "before the acknowledgement nothing is known"
    bench.serve()
    assert out == [None, None] and bench.space.commands == 1 and len(bench.monitor.shadow) == 500
    bench.exact()


@pytest.mark.parametrize("nr", [1, MAX_COMMANDS, MAX_COMMANDS + 1, 500])
def test_many_commands_are_sent_64_at_a_time(bench: Bench, nr: int) -> None:
    out = bench.start(bench.monitor.map(scattered(nr)))
    sent = []
    while bench.space.waiting():
        sent.append(bench.space.serve())
        assert out == []
        bench.loop.settle()
    assert out == [None, None] and sum(sent) == nr and max(sent) <= MAX_COMMANDS
    bench.exact()


def test_nothing_to_do_is_done_at_once(bench: Bench) -> None:
    assert bench.start(bench.monitor.map([])) == [None, None] == bench.start(bench.monitor.unmap([]))
    assert not bench.space.waiting()


def test_one_batch_is_in_flight_and_the_others_follow_in_order(bench: Bench) -> None:
    done: list[int] = []
    for i in range(5):
        run_task(bench.monitor.map([(i * PAGE_SIZE, i, RW)]), lambda _, error, i=i: done.append(i))
    for i in range(5):
        assert bench.space.serve() == 1 and not bench.space.waiting()
        bench.loop.settle()
        assert done == list(range(i + 1))


def check_a_batch_runs_as_a_whole(kind: type[Monitor]) -> None:
    """While pages of a domain are being mapped, it dies: the zero pages that take their place must come after all of them."""
    bench = Bench(kind)
    try:
        pages = scattered(3 * MAX_COMMANDS)
        bench.start(bench.monitor.map(pages))
        bench.start(bench.monitor.unmap([va for va, _, _ in pages], zero=True))
        bench.serve()
        assert set(bench.space.pages.values()) == {(ZERO, True)}, "a dead domain's frames stay mapped"
        bench.exact()
    finally:
        bench.close()


def test_a_batch_runs_as_a_whole() -> None:
    check_a_batch_runs_as_a_whole(Monitor)


class Interleaves(Monitor):
    """Queues 64 pages, and the next 64 only after they were acknowledged."""

    def map(self, pages: list[Page]) -> Steps:
        for at in range(0, len(pages), MAX_COMMANDS):
            yield from super().map(pages[at : at + MAX_COMMANDS])


def test_interleaved_batches_are_found() -> None:
    with pytest.raises(AssertionError, match="stay mapped"):
        check_a_batch_runs_as_a_whole(Interleaves)


def test_a_barrier_waits_for_everything_before_it(bench: Bench) -> None:
    def steps() -> Steps:
        yield bench.monitor.barrier()

    first, second = bench.start(bench.monitor.map(scattered(100))), bench.start(steps())
    bench.space.serve()
    bench.loop.settle()
    bench.space.serve()
    bench.loop.settle()
    assert first == [None, None] and second == []
    bench.serve()
    assert second == [None, None]


# ---- errors half way


@pytest.mark.parametrize("at", [0, 1, MAX_COMMANDS - 1, MAX_COMMANDS, 99])
def test_an_error_half_way_leaves_what_was_done_before_it(bench: Bench, at: int) -> None:
    out = bench.start(bench.monitor.map(scattered(100)))
    bench.serve(at)
    assert isinstance(out[1], MonitorError) and (out[1].done, out[1].errno) == (at, ENOMEM)
    assert len(bench.monitor.shadow) == at
    bench.exact()
    assert not bench.failures, "what follows from it is the caller's to decide"


@pytest.mark.parametrize("at", [0, 70, 99])
def test_an_unmap_that_fails_half_way_forgets_what_is_gone(bench: Bench, at: int) -> None:
    pages = scattered(100)
    bench.start(bench.monitor.map(pages))
    bench.serve()
    out = bench.start(bench.monitor.unmap([va for va, _, _ in pages]))
    bench.serve(at)
    assert isinstance(out[1], MonitorError) and out[1].done == at and len(bench.monitor.shadow) == 100 - at
    bench.exact()


def play(kind: type[Monitor], rounds: int) -> None:
    """Maps, unmaps and zero pages, several under way at once, some of them failing; the shadow is compared in between."""
    bench, rng = Bench(kind), random.Random(3)
    try:
        for _ in range(rounds):
            for _ in range(rng.randrange(1, 4)):
                nr, base = rng.randrange(1, 150), rng.randrange(100) * PAGE_SIZE
                if rng.random() < 0.6:
                    bench.start(bench.monitor.map(scattered(nr, base, rng.randrange(1000))))
                else:
                    zero = rng.random() < 0.5
                    bench.start(bench.monitor.unmap([base + i * PAGE_SIZE for i in range(nr)], zero))
            while bench.space.waiting():
                bench.space.serve(rng.randrange(MAX_COMMANDS) if rng.random() < 0.1 else None)
                bench.loop.settle(2)
            bench.exact()
    finally:
        bench.close()


def test_the_shadow_is_exact() -> None:
    play(Monitor, 200)


class ForgetsHalf(Monitor):
    """Takes a batch that failed for one that did nothing."""

    def _mapped(self, done: list[tuple[int, int, int, int]]) -> None:
        if len(done) != 41:
            super()._mapped(done)


def test_an_inexact_shadow_is_found() -> None:
    with pytest.raises(AssertionError):
        play(ForgetsHalf, 200)


# ---- silence and death


def test_a_silent_monitor_ends_its_domain(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACK_NS", 2_000_000)
    out = bench.start(bench.monitor.map(scattered(1)))
    bench.loop.until(lambda: bool(bench.failures))
    assert bench.failures == ["monitor silent for 2 s"] and out == [], "its death is the acknowledgement, not its silence"


def test_each_part_of_a_batch_has_its_own_deadline(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bench.start(bench.monitor.map(scattered(2 * MAX_COMMANDS)))
    monkeypatch.setattr(module, "ACK_NS", 2_000_000)
    bench.space.serve()
    bench.loop.until(lambda: bool(bench.failures))
    assert out == []


def test_an_acknowledged_batch_has_no_deadline(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACK_NS", 2_000_000)
    bench.start(bench.monitor.map(scattered(1)))
    bench.serve()
    bench.loop.until(lambda: bench.monitor._deadline is None)
    assert not bench.failures


def test_a_batch_has_its_time_from_when_it_was_sent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One timer serves all: one that finds a younger batch waits for that one's time."""
    monkeypatch.setattr(module, "ACK_NS", 20_000_000)
    bench.start(bench.monitor.map(scattered(1)))
    bench.serve()
    bench.start(bench.monitor.map(scattered(1)))
    sent = bench.monitor._sent_ns
    bench.loop.until(lambda: bool(bench.failures))
    assert time.monotonic_ns() - sent >= 20_000_000


def test_a_dead_monitor_ends_its_domain(bench: Bench) -> None:
    bench.start(bench.monitor.map(scattered(1)))
    bench.space.die()
    bench.loop.until(lambda: bool(bench.failures))
    assert bench.failures[0] == "monitor died"


def test_a_monitor_that_was_dead_before_is_noticed_when_it_is_asked(bench: Bench) -> None:
    bench.loop.unwatch(bench.monitor.sock.fileno())
    bench.space.die()
    bench.start(bench.monitor.map(scattered(1)))
    assert not bench.failures, "not from within a handler that is checking its arguments"
    bench.loop.until(lambda: bool(bench.failures))


def test_a_monitor_that_speaks_out_of_turn_ends_its_domain(bench: Bench) -> None:
    bench.space.sock.send(b"\0\0\0\0")
    bench.loop.until(lambda: bool(bench.failures))
    assert bench.failures == ["monitor spoke out of turn"]


def test_at_the_end_nobody_waits_any_more(bench: Bench) -> None:
    outs = [bench.start(bench.monitor.map(scattered(100, i << 20))) for i in range(3)]
    bench.space.serve()
    bench.loop.settle()
    bench.monitor.fail_all()
    bench.monitor.fail_all()
    outs.append(bench.start(bench.monitor.unmap([0])))
    bench.loop.settle()
    assert len(outs) == 4 and all(isinstance(error, MonitorGone) for _, error in outs)


def test_hang_up_waits_until_nobody_holds_the_other_end(bench: Bench) -> None:
    """A task whose pid was never learnt may hold a copy of the socket, and the memory with it."""
    other = socket.socket(fileno=os.dup(bench.space.sock.fileno()))
    other.setblocking(False)
    over: list[Any] = []
    bench.monitor.hang_up()(over.append)
    bench.space.die()
    bench.loop.settle(20)
    assert not over and other.recv(1) == b"", "it is told to leave"
    other.close()
    bench.loop.until(lambda: bool(over))


# ---- what a new process is told


def test_only_our_map_can_write_commands() -> None:
    loop = BusyLoop()
    monitor = Monitor(loop, lambda why: None)
    for attempt in (
        lambda: mmap.mmap(monitor.command_fd, PAGE_SIZE),
        lambda: os.pwrite(monitor.command_fd, b"x", 0),
        lambda: os.ftruncate(monitor.command_fd, 0),
    ):
        with pytest.raises(PermissionError):
            attempt()
    monitor.handed_over()
    monitor.handed_over()
    monitor.sock.close()
    loop.close()


def test_the_code_is_sealed() -> None:
    fd = sealed_code()
    assert os.fstat(fd).st_size == PAGE_SIZE and len(os.pread(fd, PAGE_SIZE, 0).rstrip(b"\0")) > 100
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, PAGE_SIZE)
    os.close(fd)


def test_the_first_batch_locks_the_monitor(bench: Bench) -> None:
    bench.start(bench.monitor.lock("a-domain-with-a-long-name/monitor"))
    page = bench.space._page
    (count,) = struct.unpack_from("<I", page, 0)
    commands = [struct.unpack_from("<7Q", page, 64 + 56 * i) for i in range(count)]
    assert [c[0] for c in commands] == [436, 436, 157, 157, 157, 317]  # close_range twice, prctl thrice, seccomp last
    assert commands[0][1:3] == (0, 2) and commands[1][1:3] == (6, 0xFFFFFFFF), "it keeps socket and machine memory"
    assert commands[2][1:3] == (1, 9), "it dies with the hypervisor"
    assert page[BLOB : BLOB + 16] == b"a-domain-with-a\0"
    length, at = struct.unpack_from("<HxxxxxxQ", page, BLOB + 32)
    assert commands[5][3] == KERNEL_WINDOW + COMMANDS + BLOB + 32 and at == KERNEL_WINDOW + COMMANDS + BLOB + 64
    assert page[BLOB + 64 : BLOB + 64 + 8 * length] == policy.monitor()


def test_the_first_message() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        first_message(ours)
    read, write = os.pipe()
    socket.send_fds(theirs, [b"hello"], [write])
    data, fds = first_message(ours)
    assert data == b"hello" and len(fds) == 1
    os.write(fds[0], b"!")
    assert os.read(read, 1) == b"!"
    theirs.close()
    with pytest.raises(MonitorGone):
        first_message(ours)
    for fd in (read, write, *fds):
        os.close(fd)
    ours.close()
