"""Batches in whatever memory a program has: buffers of the standard library, numpy arrays with any dtype, views of payload."""

from __future__ import annotations

import array
import gc
import mmap
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest

from ringlib import SharedRing
from tests.conftest import TIMEOUT
from tests.ringlib.peers import SIZE, both, new_name, process, records

try:
    import numpy as np
except ImportError:
    np: Any = None  # type: ignore[no-redef]

with_numpy = pytest.mark.skipif(np is None, reason="numpy is not installed: pip install numpy")

# ---- the standard library's


@pytest.mark.parametrize(
    "kind", [bytearray, lambda data: memoryview(bytearray(data)), lambda data: array.array("Q", bytes(data))]
)
def test_any_buffer_is_a_batch_and_takes_one(kind: Callable[[bytes], Any]) -> None:
    with both() as (front, back):
        front.put(kind(records(0, 3)))
        front.publish(kind(records(3, 3)))
        room = kind(bytes(4 * SIZE))
        assert back.take_into(room) == 4 and bytes(room) == records(0, 3) + records(3, 3)[:SIZE]
        assert back.get_into(room) == 2 and bytes(room)[: 2 * SIZE] == records(3, 3)[SIZE:]
        assert bytes(room)[2 * SIZE :] == (records(0, 3) + records(3, 3)[:SIZE])[2 * SIZE :], "the rest is left alone"
        assert back.take_into(room) == 0
        front.close()
        assert back.get_into(room) == back.take_into(room) == 0


def test_a_file_in_memory_takes_records() -> None:
    with both() as (front, back), mmap.mmap(-1, mmap.PAGESIZE) as memory:
        front.put(records(0, 5))
        assert back.take_into(memory) == 5 and memory[: 5 * SIZE] == records(0, 5)


def test_as_many_whole_records_as_fit() -> None:
    with both() as (front, back):
        front.put(records(0, 3))
        room = bytearray(3 * SIZE - 1)
        assert back.take_into(room) == 2
        assert room == records(0, 3)[: 2 * SIZE] + bytes(SIZE - 1)
        large = bytearray(2 * back.nr_ents * SIZE)
        assert back.take_into(large) == 1


def test_what_cannot_take_a_record() -> None:
    with both(SIZE, 16) as (front, back):
        front.put(records(0, 1))
        with pytest.raises(ValueError, match="64 received"):
            back.take_into(bytearray(SIZE - 1))
        for wrong in (bytes(SIZE), memoryview(bytearray(4 * SIZE))[::2]):
            with pytest.raises(BufferError):
                back.get_into(wrong)
        with pytest.raises(TypeError):
            back.get_into("text")  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            front.get_into(bytearray(16), 0.01)
        assert back.take() == records(0, 1), "nothing was lost"
    with both() as (front, _), pytest.raises(ValueError, match="one way"):
        front.get_into(bytearray(SIZE))


def test_answers_that_were_kept_come_first() -> None:
    with both(SIZE, SIZE, pages=1) as (front, back):
        front.put(records(0, front.nr_ents))
        back.put(back.get())
        front.put(records(front.nr_ents, 3))  # makes room by keeping a ring full
        back.put(back.get())
        room = bytearray((front.nr_ents + 3) * SIZE)
        first = front.get_into(room)
        assert front.get_into(memoryview(room)[first * SIZE :]) == front.nr_ents + 3 - first
        assert room == records(0, front.nr_ents) + records(front.nr_ents, 3)


def test_a_batch_is_no_object_a_record() -> None:
    """512 records there and back: what is left is a handful of objects, and so it is at every moment between."""
    with both(SIZE, SIZE) as (front, back):
        data, room, answers = records(0, 512), bytearray(512 * SIZE), bytearray(512 * SIZE)

        def turn() -> None:
            front.publish(data)
            assert back.take_into(room) == 512
            back.publish(room)
            assert front.take_into(answers) == 512

        turn()
        gc.collect()
        gc.disable()
        try:
            before = sys.getallocatedblocks()
            turn()
            assert abs(sys.getallocatedblocks() - before) < 32
        finally:
            gc.enable()
        assert answers == data


# ---- numpy's

FIELDS = [("sequence", "<u8"), ("price", "<f8"), ("when", "<M8[ns]"), ("symbol", "S40")]


def quotes(first: int, count: int) -> Any:
    """Structured records of 64 bytes, of a dtype that the buffer protocol has no format for."""
    out = np.zeros(count, FIELDS)
    out["sequence"] = np.arange(first, first + count)
    out["price"] = out["sequence"] * 0.25
    out["when"] = out["sequence"].astype("M8[ns]")
    out["symbol"] = b"XEN"
    return out


@with_numpy
def test_structured_arrays_go_as_they_are() -> None:
    with both(np.dtype(FIELDS).itemsize) as (front, back):
        sent = quotes(0, 300)
        front.put(sent[:200])
        front.publish(sent[200:])
        got = np.frombuffer(back.get(100), FIELDS)
        assert (got == sent[:100]).all() and not got.flags.writeable
        room = np.empty(500, FIELDS)
        n = back.get_into(room)
        assert n == 200 and (room[:n] == sent[100:]).all()
        front.put(quotes(1000, 10))
        assert back.take_into(room[7:]) == 10 and (room[7:17] == quotes(1000, 10)).all()
        assert (room[:7] == sent[100:107]).all()


@with_numpy
def test_rows_of_numbers_are_records() -> None:
    with both(SIZE) as (front, back):
        sent = np.arange(80, dtype="<u8").reshape(10, 8)
        front.put(sent)
        room = np.zeros((16, 8), "<u8")
        assert back.get_into(room) == 10 and (room[:10] == sent).all() and not room[10:].any()


@with_numpy
def test_arrays_that_are_no_batch() -> None:
    with both(SIZE) as (front, back):
        matrix = np.zeros((16, 8), "<u8")
        for wrong in (matrix[:, ::2], matrix[::2], matrix.T):
            for act in (front.put, front.publish, back.get_into):
                with pytest.raises((BufferError, ValueError), match="contiguous"):
                    act(wrong)
        with pytest.raises(ValueError, match="whole records"):
            front.put(np.zeros(9, "<u8"))
        matrix.flags.writeable = False
        front.put(matrix)
        with pytest.raises((BufferError, ValueError), match=r"read-?only|writable"):
            back.get_into(matrix)


@with_numpy
def test_payload_is_an_array_of_both() -> None:
    with both(16, 16, payload=8 * 1000) as (front, back):
        mine, theirs = (np.frombuffer(ring.payload, "<f8", 1000) for ring in (front, back))
        mine[:] = np.arange(1000)
        front.put(struct.pack("<QQ", 10, 20))
        begin, end = struct.unpack("<QQ", back.get())
        assert theirs[begin:end].sum() == sum(range(10, 20))
        theirs[begin:end] *= 2
        back.put(struct.pack("<QQ", begin, end))
        front.get()
        assert mine[begin:end].sum() == 2 * sum(range(10, 20))


def sum_up(name: str, total: int) -> None:
    room, seen = np.empty(100, FIELDS), 0
    with SharedRing.attach(name) as ring:
        while n := ring.get_into(room, TIMEOUT):
            assert (room[:n] == quotes(seen, n)).all()
            seen += n
    assert seen == total


@with_numpy
def test_arrays_between_processes() -> None:
    with SharedRing.create(new_name(), 64) as ring, process(sum_up, ring.name, 50 * 99):
        for i in range(50):
            ring.put(quotes(99 * i, 99), TIMEOUT)
        ring.drain(TIMEOUT)
        ring.close()
