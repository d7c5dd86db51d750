"""Slots of a ring's payload: leases, what a peer may name, and a back that dies with some."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from ringlib import Broken, SharedRing, Slots, WouldBlock
from tests.conftest import TIMEOUT
from tests.ringlib.defects import CAUGHT
from tests.ringlib.peers import both, fork, new_name, process

SLOT = 1000
NAME = struct.Struct("<II")  # a record here: slot, length


def test_what_is_written_in_a_slot_is_read_in_place() -> None:
    with both(NAME.size, NAME.size, payload=4 * SLOT) as (front, back):
        slots, theirs = Slots(front, SLOT), Slots(back, SLOT)
        assert slots.count == theirs.count == len(front.payload) // SLOT
        sent = [slots.lease() for _ in range(3)]
        for slot in sent:
            slots[slot][:5] = b"%05d" % slot
        front.put(b"".join(NAME.pack(slot, 5) for slot in sent))
        assert slots.leased == 3
        for slot, length in NAME.iter_unpack(back.get()):
            assert bytes(theirs[slot][:length]) == b"%05d" % slot
            theirs[slot][:1] = b"!"
            back.put(NAME.pack(slot, length))
        for slot, _ in NAME.iter_unpack(front.get()):
            assert slots[slot][0] == ord("!")
            slots.release(slot)
        assert (slots.leased, slots.high_water) == (0, 3)


def test_slots_do_not_overlap() -> None:
    with both(8, 8, payload=1) as (front, _):
        slots = Slots(front, SLOT)
        for slot in range(slots.count):
            assert len(slots[slot]) == SLOT
            slots[slot][:] = bytes([slot + 1]) * SLOT
        assert bytes(front.payload[: slots.count * SLOT]) == b"".join(bytes([i + 1]) * SLOT for i in range(slots.count))


def check_a_number_that_a_peer_made_up_is_refused() -> None:
    with both(8, 8, payload=1) as (front, back):
        slots, theirs = Slots(front, SLOT), Slots(back, SLOT)
        for wrong in (-1, slots.count, 1 << 31):
            with pytest.raises(IndexError):
                theirs[wrong]
            with pytest.raises(ValueError, match="not leased"):
                slots.release(wrong)
        slot = slots.lease()
        slots.release(slot)
        with pytest.raises(ValueError, match="not leased"):
            slots.release(slot)
        assert len({slots.lease() for _ in range(slots.count)}) == slots.count


def test_a_number_that_a_peer_made_up_is_refused() -> None:
    check_a_number_that_a_peer_made_up_is_refused()


def test_a_payload_too_small() -> None:
    for payload, size in ((0, 1), (1, 1 << 20), (1, 0), (1, -1)):
        with both(8, 8, payload=payload) as (front, _), pytest.raises(ValueError, match="fits"):
            Slots(front, size)


def test_closed() -> None:
    with both(8, 8, payload=1) as (front, _):
        slots = Slots(front, SLOT)
        view = slots[0]
        front.close()
        view[0] = 1
        assert len(slots[0]) == 0


class Leases(RuleBasedStateMachine):
    """Against a set: no slot is out twice, none is lost."""

    @initialize()
    def begin(self) -> None:
        self.ring = SharedRing.create(new_name(), 8, 8, payload=1)
        self.slots = Slots(self.ring, SLOT)
        self.out: set[int] = set()
        self.most = 0

    def teardown(self) -> None:
        if hasattr(self, "ring"):
            self.ring.close()

    @rule()
    def lease(self) -> None:
        if len(self.out) == self.slots.count:
            with pytest.raises(WouldBlock):
                self.slots.lease()
            return
        slot = self.slots.lease()
        assert slot not in self.out and 0 <= slot < self.slots.count
        self.out.add(slot)
        self.most = max(self.most, len(self.out))
        assert (self.slots.leased, self.slots.high_water) == (len(self.out), self.most)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.out)))
        self.slots.release(slot)
        self.out.remove(slot)
        assert self.slots.leased == len(self.out)

    @rule(slot=st.integers(-1, 5))
    def release_wrongly(self, slot: int) -> None:
        if slot not in self.out:
            with pytest.raises(ValueError, match="not leased"):
                self.slots.release(slot)


def test_leases() -> None:
    run_state_machine_as_test(Leases)


def take_and_hang(name: str, took: Any) -> None:
    with SharedRing.attach(name) as ring:
        ring.get(2, TIMEOUT)
        took.set()
        ring.get(timeout=TIMEOUT)
        ring.get(timeout=TIMEOUT)


def test_a_back_that_dies_keeps_no_slot() -> None:
    """What it had is still leased, and the next back finds the same bytes under the same names."""
    took = fork.Event()
    with SharedRing.create(new_name(), NAME.size, NAME.size, payload=4 * SLOT) as front:
        slots = Slots(front, SLOT)
        sent = [slots.lease() for _ in range(slots.count)]
        for slot in sent:
            slots[slot][:] = bytes([slot]) * SLOT
        front.put(b"".join(NAME.pack(slot, SLOT) for slot in sent))
        with process(take_and_hang, front.name, took) as child:
            assert took.wait(TIMEOUT)
            child.kill()
        with pytest.raises(Broken, match="died"):
            front.get(timeout=TIMEOUT)
        assert slots.leased == slots.count
        with SharedRing.attach(front.name) as back:
            theirs = Slots(back, SLOT)
            batch = back.get()
            assert [slot for slot, _ in NAME.iter_unpack(batch)] == sent
            assert all(bytes(theirs[slot]) == bytes([slot]) * SLOT for slot in sent)
            back.put(batch)
            for slot, _ in NAME.iter_unpack(front.get()):
                slots.release(slot)
        assert slots.leased == 0


# ---- what must be noticed


def believes_every_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slots, "release", lambda self, slot: self._free.append(slot))
    check_a_number_that_a_peer_made_up_is_refused()


def believes_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slots, "__getitem__", lambda self, slot: self._ring.payload[slot * SLOT : (slot + 1) * SLOT])
    check_a_number_that_a_peer_made_up_is_refused()


@pytest.mark.parametrize("defect", [believes_every_release, believes_every_number])
def test_seeded_defects_are_caught(monkeypatch: pytest.MonkeyPatch, defect: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.raises(CAUGHT):
        defect(monkeypatch)
