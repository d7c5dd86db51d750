"""The switch in C: frames between rings over real pages, and guests whose requests, rings and frames lie."""

from __future__ import annotations

import errno
import faulthandler
import os
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dom0 import _net
from hypervisor.public.io.netif import RX_REQUEST, RX_RESPONSE, TX_REQUEST, TX_RESPONSE, NetStatus
from hypervisor.public.types import PAGE_SIZE
from ringlib.ring import FrontRing, RingError
from tests.conftest import NIGHTLY
from tests.models.mutant import library

SWITCH = "dom0/switch.c"
FUZZ = 20_000 if NIGHTLY else 1_500
OKAY, ERROR, DROPPED = NetStatus
NR_VIFS, POOL = 3, 8  # pages of each vif: its two rings, POOL to send from, POOL to receive into
SECRET = b"not yours "


def mac(slot: int) -> bytes:
    return bytes([0x00, 0x16, 0x3E, 0, 0, slot])


def ip(slot: int) -> int:
    return 10 << 24 | slot


BROADCAST = b"\xff" * 6


def frame(source: int, to: int | bytes, payload: bytes = b"hello", src_ip: int | None = None, src_mac: bytes = b"") -> bytes:
    """A UDP packet from one vif to another, or to a MAC address."""
    dst = to if isinstance(to, bytes) else mac(to)
    total = 28 + len(payload)
    head = struct.pack(
        ">BBHHHBBHII", 0x45, 0, total, 0, 0, 64, 17, 0, ip(source) if src_ip is None else src_ip, ip(0) if dst == to else ip(to)
    )  # type: ignore[arg-type]
    return dst + (src_mac or mac(source)) + b"\x08\x00" + head + struct.pack(">HHHH", 7, 9, 8 + len(payload), 0) + payload


def arp(source: int, sender_mac: bytes, sender_ip: int) -> bytes:
    body = struct.pack(">HHBBH6sI6sI", 1, 0x0800, 6, 4, 1, sender_mac, sender_ip, bytes(6), ip(9))
    return BROADCAST + mac(source) + b"\x08\x06" + body


class Vif:
    """A guest's end: two rings, pages to send from and to receive into; grefs 100.. and 200.. are granted."""

    def __init__(self, net: Net, slot: int, arena: int) -> None:
        self.net, self.slot, self.arena = net, slot, arena
        self.tx = FrontRing(arena, PAGE_SIZE, TX_REQUEST.size, TX_RESPONSE.size)
        self.rx = FrontRing(arena + PAGE_SIZE, PAGE_SIZE, RX_REQUEST.size, RX_RESPONSE.size)
        vif = net.vif(slot)
        assert net.lib.vif_attach(vif, net.at(arena), net.at(arena + PAGE_SIZE), PAGE_SIZE) == 0
        vif.domid, vif.mac, vif.ip, vif.connected = slot + 1, list(mac(slot)), ip(slot), 1
        self.grants = {100 + i: arena + (2 + i) * PAGE_SIZE for i in range(POOL)}
        self.buffers = {200 + i: arena + (2 + POOL + i) * PAGE_SIZE for i in range(POOL)}

    def send(
        self, data: bytes, gref: int = 100, offset: int = 0, size: int | None = None, flags: int = 0, ident: int = 1
    ) -> None:
        """Put the frame into the page and ask; every number of the request may lie."""
        if gref in self.grants and offset + len(data) <= PAGE_SIZE:
            self.net.write(self.grants[gref] + offset, data)
        self.tx.publish(TX_REQUEST.pack(gref, offset, flags, ident, len(data) if size is None else size))

    def post(self, *grefs: int) -> None:
        for i, gref in enumerate(grefs):
            self.rx.publish(RX_REQUEST.pack(i, gref))

    def answers(self) -> list[tuple[int, int]]:
        return list(TX_RESPONSE.iter_unpack(self.tx.take()))

    def status(self) -> int:
        """Of the one frame that was sent."""
        ((_, status),) = self.answers()
        return status

    def received(self) -> list[tuple[int, int]]:
        """(id, status) of each buffer that came back."""
        return [(ident, status) for ident, _, _, status in RX_RESPONSE.iter_unpack(self.rx.take())]

    def page(self, gref: int, size: int) -> bytes:
        return self.net.read((self.grants | self.buffers)[gref], size)


class Net:
    """A switch and its vifs over one arena; around each page of a guest lies one that is nobody's."""

    def __init__(self, ffi: Any, lib: Any) -> None:
        self.ffi, self.lib = ffi, lib
        self.switch = ffi.new("struct nswitch *")
        self.switch.accept_by_default = 1
        pages = 2 + 2 * POOL
        self.memory = ffi.new("char[]", (NR_VIFS * (pages + 1) + 2) * PAGE_SIZE)
        base = -(-int(ffi.cast("uintptr_t", self.memory)) // PAGE_SIZE) * PAGE_SIZE
        self.arenas = [base + slot * (pages + 1) * PAGE_SIZE for slot in range(NR_VIFS)]
        for arena in self.arenas:
            self.write(arena + pages * PAGE_SIZE, (SECRET * 410)[:PAGE_SIZE])
        self.vifs = [Vif(self, slot, arena) for slot, arena in enumerate(self.arenas)]

    def at(self, address: int) -> Any:
        return self.ffi.cast("void *", address)

    def vif(self, slot: int) -> Any:
        return self.ffi.addressof(self.switch.vifs, slot)

    def write(self, address: int, data: bytes) -> None:
        self.ffi.memmove(self.at(address), data, len(data))

    def read(self, address: int, size: int) -> bytes:
        return bytes(self.ffi.buffer(self.ffi.cast("char *", address), size))

    def turn(self, slot: int) -> int:
        """One batch of one vif, as netback runs it; 0, or the first negative result."""
        taken = self.lib.vif_take(self.vif(slot), 64)
        if taken < 0:
            return int(taken)
        for other in range(NR_VIFS):
            if other != slot and self.lib.vif_take(self.vif(other), 0) < 0:
                self.switch.vifs[other].broken = 1
        for vif in self.vifs:
            self.map_missing(vif)
        result = self.lib.switch_run(self.switch, slot)
        for vif in self.vifs:
            if not self.switch.vifs[vif.slot].broken:
                self.lib.vif_publish(self.vif(vif.slot))
        return int(result)

    def map_missing(self, vif: Vif) -> None:
        """What is granted is mapped: to read, and to write."""
        c, scratch = self.switch.vifs[vif.slot], self.ffi.new("uint32_t[]", 512)
        for buffers, table, granted in ((0, c.readable, vif.grants), (1, c.writable, vif.buffers)):
            for i in range(self.lib.vif_missing(self.vif(vif.slot), buffers, scratch, 512)):
                if scratch[i] in granted:
                    table[scratch[i]] = granted[scratch[i]]


@pytest.fixture
def net() -> Iterator[Net]:
    yield Net(_net.ffi, _net.lib)


# ---- delivery


def test_a_frame_arrives_in_the_buffer_that_was_posted(net: Net) -> None:
    alice, bob, carol = net.vifs
    bob.post(203, 201)
    data = frame(0, 1, b"payload" * 200)
    alice.send(data, gref=102, offset=33, ident=7)
    assert net.turn(0) == 0
    assert alice.answers() == [(7, OKAY)] and bob.received() == [(0, len(data))] and carol.received() == []
    assert bob.page(203, len(data)) == data


def test_a_broadcast_reaches_all_others(net: Net) -> None:
    for vif in net.vifs:
        vif.post(200)
    data = frame(0, BROADCAST)
    net.vifs[0].send(data)
    net.turn(0)
    assert net.vifs[0].status() == OKAY
    assert [vif.received() for vif in net.vifs] == [[], [(0, len(data))], [(0, len(data))]]


def test_without_a_buffer_the_frame_drops_and_is_counted(net: Net) -> None:
    alice, bob, _ = net.vifs
    alice.send(frame(0, 1))
    net.turn(0)
    assert alice.status() == OKAY and net.switch.no_buffer == 1, "the sender learns nothing of its receiver's state"
    bob.post(200)
    alice.send(frame(0, 1))
    net.turn(0)
    assert alice.status() == OKAY and len(bob.received()) == 1


def test_an_unknown_destination_drops(net: Net) -> None:
    net.vifs[0].send(frame(0, b"\x00\x16\x3e\x00\x00\x99"))
    net.turn(0)
    assert net.vifs[0].status() == DROPPED and net.switch.unknown_destination == 1


def test_the_firewall_decides_for_each_receiver(net: Net) -> None:
    alice, bob, carol = net.vifs
    rule = net.switch.rules[0]
    rule.src_vif, rule.dst_vif, rule.src_port, rule.dst_port, rule.action = -1, 1, [0, 65535], [0, 65535], 0
    net.switch.nr_rules = 1
    for vif in net.vifs:
        vif.post(200, 201)
    for gref, to in ((100, 1), (101, 2), (102, BROADCAST)):
        alice.send(frame(0, to), gref)
    net.turn(0)
    assert [status for _, status in alice.answers()] == [DROPPED, OKAY, OKAY] and rule.hits == 2
    assert bob.received() == [] and len(carol.received()) == 2


@pytest.mark.parametrize("size", [14, 60, 127, 128, 129, 1514])
def test_sizes_around_the_private_copy(net: Net, size: int) -> None:
    """The header is delivered from the copy, the rest from the frame: all of it, nothing else."""
    bob = net.vifs[1]
    bob.post(200)
    net.write(bob.buffers[200], b"\xee" * PAGE_SIZE)
    data = frame(0, 1, bytes(range(256)) * 6)[:size]
    if size >= 42:
        data = data[:16] + struct.pack(">H", size - 14) + data[18:]
    net.vifs[0].send(data)
    net.turn(0)
    arrived = bob.received() == [(0, size)]
    assert arrived == (size >= 42), "what is no whole packet is dropped"
    assert bob.page(200, size + 1) == (data if arrived else b"\xee" * size) + b"\xee"


def test_a_full_batch_both_ways(net: Net) -> None:
    alice, bob, _ = net.vifs
    sent = 0
    for round_ in range(20):
        bob.post(*[200 + i % POOL for i in range(60)])
        for i in range(64):
            alice.send(frame(0, 1, bytes([round_])), ident=i, gref=100 + i % POOL)
        assert net.turn(0) == 0
        assert alice.answers() == [(i, OKAY) for i in range(64)]
        sent += len(bob.received())
    assert sent + net.switch.no_buffer == 20 * 64 and sent == 20 * 60


# ---- guests that lie


LIES = {
    "a frame that was not granted": ({"gref": 999}, ERROR),
    "a reference beyond the table": ({"gref": 4096}, ERROR),
    "a reference far beyond it": ({"gref": 0xFFFFFFFF}, ERROR),
    "a frame that leaves its page": ({"offset": PAGE_SIZE - 60}, ERROR),
    "an offset beyond the page": ({"offset": 65535}, ERROR),
    "larger than a frame may be": ({"size": 1515}, ERROR),
    "a size that wraps": ({"size": 65535}, ERROR),
    "smaller than a header": ({"size": 13}, ERROR),
    "nothing at all": ({"size": 0}, ERROR),
    "more data to come": ({"flags": 4}, ERROR),
    "extra information": ({"flags": 8}, ERROR),
}


def check_lies(net: Net) -> None:
    """Each is answered, delivers nothing, and the next honest frame passes."""
    alice, bob, _ = net.vifs
    for lie, (fields, status) in LIES.items():
        bob.post(200)
        net.write(bob.buffers[200], bytes(PAGE_SIZE))
        alice.send(frame(0, 1, b"x" * 100), **{"ident": 3, **fields})
        assert net.turn(0) == 0
        assert alice.answers() == [(3, status)], lie
        assert bob.received() == [] and bob.page(200, PAGE_SIZE) == bytes(PAGE_SIZE), lie
        alice.send(frame(0, 1))
        net.turn(0)
        assert alice.status() == OKAY and len(bob.received()) == 1, f"after: {lie}"


def check_spoofing(net: Net) -> None:
    """A source that is not the sender's own, in Ethernet, in IP or in ARP."""
    alice = net.vifs[0]
    lies = [
        frame(0, 1, src_mac=mac(1)), frame(0, 1, src_mac=BROADCAST), frame(0, 1, src_ip=ip(1)), frame(0, 1, src_ip=0),
        arp(0, mac(1), ip(0)), arp(0, mac(0), ip(1)), arp(0, mac(0), ip(0))[:41], frame(0, BROADCAST, src_ip=ip(2)),
    ]  # fmt: skip
    for lie in lies:
        for vif in net.vifs[1:]:
            vif.post(200)
        alice.send(lie)
        net.turn(0)
        assert alice.status() == DROPPED, lie
        assert not any(vif.received() for vif in net.vifs[1:]), lie
    assert net.switch.spoofed == len(lies)
    alice.send(arp(0, mac(0), ip(0)))
    net.turn(0)
    assert alice.status() == OKAY and len(net.vifs[1].received()) == 1


def check_buffers(net: Net) -> None:
    """A buffer that was not granted costs its receiver the frame and nobody else anything."""
    alice, bob, _ = net.vifs
    for gref in (100, 999, 4096, 0xFFFFFFFF):
        bob.post(gref)
        alice.send(frame(0, 1))
        assert net.turn(0) == 0
        assert alice.status() == OKAY and bob.received() == [(0, ERROR)], gref


def test_lies_in_a_request(net: Net) -> None:
    check_lies(net)


def test_spoofed_sources(net: Net) -> None:
    check_spoofing(net)


def test_buffers_that_are_none(net: Net) -> None:
    check_buffers(net)


def test_any_address_may_be_a_source_where_none_is_set(net: Net) -> None:
    net.switch.vifs[0].ip = 0
    net.vifs[1].post(200)
    net.vifs[0].send(frame(0, 1, src_ip=ip(77)))
    net.turn(0)
    assert net.vifs[0].status() == OKAY and len(net.vifs[1].received()) == 1


DEFECTS = {
    "the offset is not checked": (check_lies, "r->offset > PAGE - r->size || ", ""),
    "the size is not checked": (check_lies, " || r->size > MAX_FRAME", ""),
    "small frames pass": (check_lies, " || r->size < MIN_FRAME", ""),
    "flags are not checked": (check_lies, " || (r->flags & ~3u)", ""),
    "a refused grant is used": (check_lies, "v->readable[r->gref] <= 1", "0"),
    "the source MAC is not checked": (check_spoofing, "    if (memcmp(h + 6, v->mac, 6))\n        return 1;\n", ""),
    "the source IP is not checked": (check_spoofing, "copied < 34 || be32(h + 26) != v->ip", "0"),
    "ARP's sender is not checked": (check_spoofing, "copied < 42 || memcmp(h + 22, v->mac, 6) || be32(h + 28) != v->ip", "0"),
    "ARP's hardware address is not checked": (check_spoofing, " || memcmp(h + 22, v->mac, 6)", ""),
    "a buffer that was refused is used": (check_buffers, "    if (at <= 1) {", "    if (!to) {"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_is_found(tmp_path: Path, defect: str) -> None:
    check, old, new = DEFECTS[defect]
    changed = library(tmp_path / "switch.so", "dom0/switch.h", [SWITCH], {SWITCH: [(old, new)]})
    pid = os.fork()  # a child: it may also crash
    if pid == 0:
        faulthandler.disable()
        try:
            check(Net(*changed))
        finally:
            os._exit(sys.exc_info()[0] is not None)
    assert os.waitpid(pid, 0)[1] != 0, "it passed"


# ---- a frame that changes after it was judged

GUEST_ACTS = "    memcpy((void *)(uintptr_t)at, header, copied);\n"
REWRITE = f"    memset((char *)(uintptr_t)rest - copied, 0xEE, size);\n{GUEST_ACTS}"  # at the worst moment: after the verdict


def check_only_what_was_judged_arrives(ffi: Any, lib: Any) -> None:
    """The guest rewrites its frame when the verdict is in; what arrives has the header that was judged."""
    net = Net(ffi, lib)
    net.vifs[1].post(200)
    data = frame(0, 1, b"p" * 1000)
    net.vifs[0].send(data)
    net.turn(0)
    arrived = net.vifs[1].page(200, len(data))
    assert net.read(net.vifs[0].grants[100], 4) == b"\xee" * 4, "the guest did act"
    assert arrived[:128] == data[:128], "a header that nobody judged"


def test_only_the_header_that_was_judged_is_delivered(tmp_path: Path) -> None:
    changed = library(tmp_path / "switch.so", "dom0/switch.h", [SWITCH], {SWITCH: [(GUEST_ACTS, REWRITE)]})
    check_only_what_was_judged_arrives(*changed)


def test_a_second_fetch_is_found(tmp_path: Path) -> None:
    again = REWRITE.replace("at, header, copied", "at, rest - copied, copied")
    changed = library(tmp_path / "switch.so", "dom0/switch.h", [SWITCH], {SWITCH: [(GUEST_ACTS, again)]})
    with pytest.raises(AssertionError, match="nobody judged"):
        check_only_what_was_judged_arrives(*changed)


# ---- rings that cannot be


@pytest.mark.parametrize("index", [257, 1 << 31, 0xFFFFFFFF])
def test_a_broken_transmit_index_closes_that_vif_and_no_other(net: Net, index: int) -> None:
    alice, bob, carol = net.vifs
    net.write(alice.arena, struct.pack("<I", index))
    assert net.turn(0) == -errno.EPROTO == net.turn(0), "poisoned for good"
    carol.post(200)
    bob.send(frame(1, 2))
    assert net.turn(1) == 0
    assert bob.status() == OKAY and len(carol.received()) == 1


def test_a_broken_receive_index_costs_nobody_else_a_frame(net: Net) -> None:
    alice, bob, carol = net.vifs
    net.write(bob.arena + PAGE_SIZE, struct.pack("<I", 99_999))
    carol.post(200)
    alice.send(frame(0, 1), 100)
    alice.send(frame(0, 2), 101)
    assert net.turn(0) == 0 and net.switch.vifs[1].broken
    assert [status for _, status in alice.answers()] == [DROPPED, OKAY] and len(carol.received()) == 1


def test_hostile_rings_touch_only_what_was_granted(net: Net) -> None:
    """Random requests, buffers and indexes of one guest: whatever it does, others' pages stay as they are, and they go on."""
    rng = random.Random(17)
    alice, bob, carol = net.vifs
    nobodys = [arena + (2 + 2 * POOL) * PAGE_SIZE for arena in net.arenas]
    for i in range(FUZZ):
        match rng.randrange(5):
            case 0 | 1 as ring:
                net.write(alice.arena + ring * PAGE_SIZE + 64, rng.randbytes(2000))
            case 2:
                index = alice.arena + rng.choice((0, PAGE_SIZE)) + 4 * rng.randrange(4)
                net.write(index, struct.pack("<I", rng.choice((i, 3, 1 << 30))))
            case _:
                gref, flags = rng.choice((100, 103, 200, 999, 1 << 31)), rng.choice((0, 0, 4))
                try:
                    alice.send(frame(0, rng.choice((1, 2, BROADCAST))), gref, rng.choice((0, 4000, 65535)), flags=flags)
                except RingError:
                    pass  # it spoilt its own end
        net.turn(0)
        carol.rx.take()
        carol.post(200)
        bob.send(frame(1, 2))
        assert net.turn(1) == 0 and bob.answers()[-1][1] == OKAY and carol.received()
        assert all(net.read(page, PAGE_SIZE) == (SECRET * 410)[:PAGE_SIZE] for page in nobodys), "a page that is nobody's"
        assert carol.page(100, PAGE_SIZE) == bytes(PAGE_SIZE), "a page that was granted to be read only"
        if i % 20 == 19:  # it is closed, and attached anew
            slot = net.ffi.cast("char *", net.vif(0))
            net.ffi.buffer(slot, net.ffi.sizeof("struct vif"))[:] = bytes(net.ffi.sizeof("struct vif"))
            net.vifs[0] = alice = Vif(net, 0, net.arenas[0])
