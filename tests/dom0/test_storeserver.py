"""The store over a domain's ring: a guest's real client at the other end, and guests that are not so kind."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from dom0.store import MAX_VALUE, Store
from dom0.storeserver import MAX_EVENTS, MAX_UNSENT, LocalStore, StoreServer
from domain import _guest, sched
from domain import store as client
from domain.sched import Event, Scheduler, gather, sleep
from domain.store import StoreConflict, StoreError
from hypervisor.public.io import xs_wire
from hypervisor.public.io.xs_wire import HEADER, PAYLOAD_MAX, RING_BYTES, XsType
from hypervisor.public.layout import STORE_PFN, virt
from hypervisor.public.types import PAGE_SIZE
from ringlib.bytering import ByteRing


class Wire:
    """An event channel: what one side sends, the other waits for."""

    def __init__(self) -> None:
        self.ends = [SimpleNamespace(event=Event(), sent=0) for _ in range(2)]

    def evtchn(self, side: int) -> Any:
        async def wait(port: int) -> None:
            await self.ends[side].event.wait()
            self.ends[side].event.clear()

        return SimpleNamespace(wait=wait, send=lambda port: self.ring(1 - side))

    def ring(self, side: int) -> None:
        self.ends[side].sent += 1
        self.ends[side].event.set()


class Bench:
    """dom0 with its tree, and domains with a page each."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(lambda: 0, self.idle)
        sched.install(self.scheduler)
        self.errors: list[BaseException] = []
        self.scheduler.on_error = lambda task, error: self.errors.append(error)
        self.tree, self.trouble = Store(), list[str]()
        self.dom0 = LocalStore(self.tree)
        self.pages: list[Any] = []

    def idle(self, seconds: float) -> None:
        assert seconds == 0, "everybody waits"

    def kernel(self, wire: Wire, side: int, window: int = 0) -> Any:
        start = SimpleNamespace(window=window, store_evtchn=1)
        return SimpleNamespace(
            scheduler=self.scheduler, spawn=lambda c, name="": self.scheduler.spawn(c, name), sleep=sleep, start=start,
            evtchn=wire.evtchn(side),
        )  # fmt: skip

    async def attach(self, domid: int) -> tuple[StoreServer, Any, Wire]:
        """A domain's server, its page, and the wire between them; its home is made."""
        page, wire = _guest.ffi.new("char[]", PAGE_SIZE), Wire()
        self.pages.append(page)
        await self.dom0.mkdir(f"/local/domain/{domid}")
        await self.dom0.set_perms(f"/local/domain/{domid}", [f"n{domid}"])
        server = StoreServer(self.kernel(wire, 0), self.tree, domid, address(page), 1, self.trouble.append)
        return server, page, wire

    async def guest(self, domid: int) -> tuple[client.Store, StoreServer]:
        server, page, wire = await self.attach(domid)
        return client.Store(self.kernel(wire, 1, address(page) - virt(STORE_PFN))), server

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.scheduler.run(self.scheduler.spawn(coroutine, "main"))
        assert not self.errors, self.errors


def address(page: Any) -> int:
    return int(_guest.ffi.cast("uintptr_t", page))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    for task in list(made.scheduler.tasks):
        task.cancel()
        task.step()
    sched._schedulers.pop()


class Raw:
    """A guest's end without any manners."""

    def __init__(self, page: Any, wire: Wire) -> None:
        at = address(page)
        self.page, self.wire = page, wire
        self.out = ByteRing(at + xs_wire.REQ, at + xs_wire.REQ_CONS, at + xs_wire.REQ_PROD, RING_BYTES)
        self.answers = ByteRing(at + xs_wire.RSP, at + xs_wire.RSP_CONS, at + xs_wire.RSP_PROD, RING_BYTES)

    def send(self, data: bytes) -> int:
        n = self.out.write(data)
        self.wire.ring(0)
        return n

    def taken(self) -> bool:
        """Everything that was sent."""
        return _guest.ffi.buffer(self.page + xs_wire.REQ_CONS, 4)[:] == _guest.ffi.buffer(self.page + xs_wire.REQ_PROD, 4)[:]

    def index(self, offset: int, value: int) -> None:
        _guest.ffi.cast("uint32_t *", self.page + offset)[0] = value
        self.wire.ring(0)


def message(kind: int, payload: bytes, req_id: int = 1, tx: int = 0) -> bytes:
    return HEADER.pack(kind, req_id, tx, len(payload)) + payload


async def rest() -> None:
    for _ in range(30):
        await sleep(0)


# ---- a kind guest


def test_requests_and_answers_larger_than_the_ring(bench: Bench) -> None:
    async def main() -> None:
        guest, _ = await bench.guest(5)
        value = "v" * MAX_VALUE
        await guest.write("data/x", value)
        assert await guest.read("data/x") == value == await bench.dom0.read("/local/domain/5/data/x")
        assert await guest.ls("data") == ["x"] and await guest.ls("nothing") == []
        assert await guest.get("nothing", "default") == "default"
        with pytest.raises(StoreError, match="EACCES"):
            await guest.write("/tool", 1)
        with pytest.raises(StoreError, match="E2BIG"):
            await guest.write("data/x", value + "v")
        with pytest.raises(StoreError, match="E2BIG"):
            await guest.write("data/x", "v" * PAYLOAD_MAX)

    bench.run(main())


def test_many_tasks_share_one_ring(bench: Bench) -> None:
    async def main() -> None:
        guest, _ = await bench.guest(5)

        async def work(i: int) -> str:
            await guest.write(f"n{i}", str(i) * 700)
            return await guest.read(f"n{i}")

        assert await gather(work(i) for i in range(25)) == [str(i) * 700 for i in range(25)]

    bench.run(main())


def test_watches_and_transactions(bench: Bench) -> None:
    async def main() -> None:
        guest, _ = await bench.guest(5)
        watch = await guest.watch("a")
        assert await watch.next() == "/local/domain/5/a"
        for i in range(10):
            await bench.dom0.write("/local/domain/5/a/b", i)
        assert await watch.next() == "/local/domain/5/a/b" and len(watch.events) <= 1, "repeats merge"
        async with guest.transaction() as tx:
            await guest.write("t", 1, tx)
        assert await guest.read("t") == "1"
        with pytest.raises(StoreConflict):
            async with guest.transaction() as tx:
                await guest.read("t", tx)
                await bench.dom0.write("/local/domain/5/t", 2)
        with pytest.raises(KeyError):
            async with guest.transaction() as tx:
                await guest.write("t", 3, tx)
                raise KeyError
        assert await guest.read("t") == "2"
        await watch.close()

    bench.run(main())


def test_an_answer_that_is_too_long_is_refused(bench: Bench) -> None:
    async def main() -> None:
        guest, _ = await bench.guest(5)
        for i in range(9):
            await guest.write(f"long/{i}{'x' * 500}", "")
        with pytest.raises(StoreError, match="E2BIG"):
            await guest.ls("long")

    bench.run(main())


# ---- others


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda raw: raw.send(HEADER.pack(XsType.READ, 1, 0, PAYLOAD_MAX + 1)), "a message of 4097 bytes"),
        (lambda raw: raw.send(b"\xff" * RING_BYTES), "a message of 4294967295 bytes"),
        (lambda raw: raw.index(xs_wire.REQ_PROD, RING_BYTES + 1), "violated"),
        (lambda raw: raw.index(xs_wire.REQ_PROD, 0xFFFFFFFF), "violated"),
        (lambda raw: (raw.index(xs_wire.RSP_CONS, 77), raw.send(message(XsType.READ, b"x\0"))), "violated"),
    ],
)
def test_a_violated_ring_closes_that_connection_and_no_other(bench: Bench, spoil: Callable[[Raw], Any], reason: str) -> None:
    async def main() -> None:
        server, page, wire = await bench.attach(5)
        other, _ = await bench.guest(6)
        await rest()
        spoil(Raw(page, wire))
        await rest()
        assert server.closed and len(bench.trouble) == 1 and reason in bench.trouble[0]
        assert server._connection not in bench.tree.connections
        await other.write("x", 1)

    bench.run(main())


async def greedy(bench: Bench) -> int:
    """One guest refills its ring whenever there is room: how often, before the other's one request was answered."""
    _, page, wire = await bench.attach(5)
    raw, refills = Raw(page, wire), [0]
    flood = message(XsType.READ, b"x\0") * (RING_BYTES // (HEADER.size + 2))

    def ring(side: int) -> None:
        wire.ends[side].sent += 1
        wire.ends[side].event.set()
        raw.answers.read()
        if side == 1 and raw.taken() and refills[0] < 2000:
            refills[0] += raw.out.write(flood) == len(flood)

    wire.ring = ring  # type: ignore[method-assign]
    other, _ = await bench.guest(6)
    raw.send(flood)
    await other.write("x", 1)
    assert not bench.trouble
    return refills[0]


def test_a_guest_that_keeps_its_ring_full_waits_in_line(bench: Bench) -> None:
    async def main() -> None:
        assert await greedy(bench) < 20

    bench.run(main())


def test_a_server_without_turns_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = StoreServer._turn
    monkeypatch.setattr(StoreServer, "_turn", lambda self: all(iter(lambda: turn(self), False)) and False)

    async def main() -> None:
        assert await greedy(bench) == 2000

    bench.run(main())


def test_a_guest_that_reads_no_answers_is_not_heard_any_more(bench: Bench) -> None:
    async def main() -> None:
        server, page, wire = await bench.attach(5)
        raw = Raw(page, wire)
        await bench.dom0.write("/local/domain/5/v", "v" * MAX_VALUE)
        request = message(XsType.READ, b"v\0")
        for _ in range(3000):
            raw.send(request * 20)
            await sleep(0)
        assert len(server._unsent) < MAX_UNSENT + RING_BYTES // len(request) * (MAX_VALUE + HEADER.size)
        assert not server.closed

    bench.run(main())


def test_a_guest_that_reads_no_events_is_closed(bench: Bench) -> None:
    async def main() -> None:
        server, page, wire = await bench.attach(5)
        raw = Raw(page, wire)
        raw.send(message(XsType.WATCH, b"n\0t\0"))
        await rest()
        for i in range(MAX_EVENTS + 200):
            await bench.dom0.write(f"/local/domain/5/n/{i}", "")
        assert server.closed and bench.trouble == [f"{MAX_EVENTS} watch events unread"]
        assert len(server._events) <= MAX_EVENTS + 1

    bench.run(main())


def test_a_closed_connection_takes_no_more_requests(bench: Bench) -> None:
    async def main() -> None:
        server, page, wire = await bench.attach(5)
        raw = Raw(page, wire)
        raw.send(message(XsType.WATCH, b"n\0t\0") + message(XsType.WRITE, b"late\0"))
        real, server._connection.request = server._connection.request, None  # type: ignore[method-assign]

        def request(kind: int, tx: int, payload: bytes) -> bytes:
            server.close("enough")
            return real(kind, tx, payload)

        server._connection.request = request  # type: ignore[method-assign]
        await rest()
        assert "late" not in await bench.dom0.ls("/local/domain/5") and bench.trouble == ["enough"]

    bench.run(main())
