"""The functions of ring1_message.h, against msgpack and the decoder that every call passes through."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from cffi import FFI
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.public.console import ConsoleWrite
from hypervisor.public.errors import Invalid
from hypervisor.public.hypercall import Hypercall, decode_call, decode_message
from hypervisor.public.memory import CurrentReservation
from hypervisor.public.sched import SchedShutdown, SetTimer
from hypervisor.public.types import MESSAGE_BYTES
from tests.contracts.contract import ROOT, gcc

BYTES, TEXT = 0xC4, 0xD9
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
DECLARATIONS = """
uint32_t request(uint8_t *at, uint32_t op, uint32_t sequence, const uint64_t *fields, uint32_t n, uint32_t more);
uint32_t put_string(uint8_t *at, uint8_t kind, const void *data, uint8_t size);
int32_t get(const uint8_t *message, uint32_t size, uint32_t *at, int64_t *value);
"""
BODIES = """
#include "ring1_message.h"
uint32_t request(uint8_t *at, uint32_t op, uint32_t sequence, const uint64_t *fields, uint32_t n, uint32_t more)
{ return ring1_request(at, op, sequence, fields, n, more); }
uint32_t put_string(uint8_t *at, uint8_t kind, const void *data, uint8_t size)
{ return ring1_put_string(at, kind, data, size); }
int32_t get(const uint8_t *message, uint32_t size, uint32_t *at, int64_t *value)
{ return ring1_get(message, size, at, value); }
"""
ffi = FFI()
ffi.cdef(DECLARATIONS)


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The functions of the header, compiled as a library."""
    scratch = tmp_path_factory.mktemp("messages")
    (scratch / "messages.c").write_text(BODIES)
    public = ROOT / "hypervisor" / "public"
    gcc("-std=c11", "-O1", "-shared", "-fPIC", f"-I{public}", str(scratch / "messages.c"), "-o", str(scratch / "messages.so"))
    return ffi.dlopen(str(scratch / "messages.so"))


def request(lib: Any, op: int, sequence: int, integers: list[int], strings: list[str | bytes] | None = None) -> bytes:
    """A message as a kernel in C writes it."""
    at, strings = ffi.new("uint8_t[]", 1024), strings or []
    size = lib.request(at, op, sequence, ffi.new("uint64_t[]", integers), len(integers), len(strings))
    for string in strings:
        data = string.encode() if isinstance(string, str) else string
        size += lib.put_string(at + size, TEXT if isinstance(string, str) else BYTES, data, len(data))
    return bytes(ffi.buffer(at, size))


def items(lib: Any, message: bytes) -> list[Any] | None:
    """A reply as a kernel in C reads it: integers, and text as bytes; None where it gives up."""
    at, value = ffi.new("uint32_t *"), ffi.new("int64_t *")
    buffer = ffi.new("uint8_t[]", message)  # one byte longer, a zero: reading past the end would give an item
    out: list[Any] = []
    if lib.get(buffer, len(message), at, value):
        return None
    for _ in range(value[0]):
        kind = buffer[at[0]]
        if lib.get(buffer, len(message), at, value):
            return None
        assert at[0] <= len(message)
        is_text = kind >> 5 == 5 or kind == TEXT
        out.append(message[at[0] - value[0] : at[0]] if is_text else value[0])
    return out


@given(op=U32, sequence=U32, integers=st.lists(U64, max_size=13))
def test_a_request_of_integers(lib: Any, op: int, sequence: int, integers: list[int]) -> None:
    message = request(lib, op, sequence, integers)
    assert len(message) <= 136
    assert decode_message(message) == (op, sequence, integers)


@pytest.mark.parametrize(
    ("call", "integers", "strings"),
    [
        (CurrentReservation(0x7FF0), [3, 0x7FF0], []),
        (SetTimer(1 << 40), [1 << 40], []),
        (ConsoleWrite(b"\xff" * 200), [0], [b"\xff" * 200]),
        (SchedShutdown(0, 7, "why" * 60), [2, 0, 7], ["why" * 60]),
        (SchedShutdown(3, 255, ""), [2, 3, 255], [""]),
    ],
)
def test_a_call_is_the_call(lib: Any, call: Hypercall[Any], integers: list[int], strings: list[str | bytes]) -> None:
    message = request(lib, call.OP, 9, integers, strings)
    op, sequence, arguments = decode_message(message)
    assert len(message) <= MESSAGE_BYTES
    assert (sequence, decode_call(op, arguments)) == (9, call)


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.text(max_size=60), max_size=20))
def test_a_reply_is_read(lib: Any, values: list[int | str]) -> None:
    want = [value.encode() if isinstance(value, str) else value for value in values]
    assert items(lib, msgpack.packb(values)) == want


@given(st.binary(max_size=64))
def test_rubbish_is_never_read_past_its_end(lib: Any, message: bytes) -> None:
    items(lib, message)


@given(st.lists(st.integers(0, 1 << 40) | st.text(max_size=9), min_size=1, max_size=14), st.data())
def test_a_reply_cut_short_is_refused(lib: Any, values: list[int | str], data: st.DataObject) -> None:
    whole = msgpack.packb(values)
    assert items(lib, whole[: data.draw(st.integers(0, len(whole) - 1))]) is None


@pytest.mark.parametrize("message", [b"\xc0", b"\xc3", b"\x91\xc2", b"\x91\xca\0\0\0\0", b"\x91\x81\x01\x02", b"\x91\xc4\x01a"])
def test_what_no_reply_holds_is_refused(lib: Any, message: bytes) -> None:
    """nil, bool, float, map, bytes."""
    assert items(lib, message) is None


def test_a_request_with_a_wrong_count_is_found(lib: Any) -> None:
    """The comparison above can fail: one field more announced than given."""
    at = ffi.new("uint8_t[]", 64)
    size = lib.request(at, 12, 1, ffi.new("uint64_t[]", [3, 0]), 2, 1)
    with pytest.raises(Invalid):
        decode_message(bytes(ffi.buffer(at, size)))
