"""The hypercall's encoding: every request there and back, and everything that is no request refused with its error."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor import core  # whoever imports it has imported every request
from hypervisor.public import console, errors, evtchn, grant, sched
from hypervisor.public import hypercall as abi
from hypervisor.public.errors import Invalid, NotImplementedCall, TooBig, XenError
from hypervisor.public.hypercall import ALL, WITH_CMD, Hypercall, decode_fields, decode_message, kind_of
from hypervisor.public.types import MESSAGE_BYTES, Bits, Data, Text
from tests.conftest import NIGHTLY

assert core.dispatch
REQUESTS = sorted(ALL.values(), key=lambda kind: (kind.OP, kind.CMD))
FUZZ = 400_000 if NIGHTLY else 40_000
KIND = type[Hypercall[Any]]


def value(field: Any) -> st.SearchStrategy[Any]:
    """What may stand in a field, its limits included."""
    if isinstance(field, Bits):
        return st.integers(0, (1 << field.bits) - 1) | st.sampled_from([0, (1 << field.bits) - 1])
    if isinstance(field, Data):
        return st.binary(max_size=field.size) | st.just(b"\xff" * field.size)
    assert isinstance(field, Text)
    text = st.text(st.characters(codec="utf-8"), max_size=field.size).filter(lambda s: len(s.encode()) <= field.size)
    return text | st.just("x" * field.size)


def decode(message: bytes) -> Hypercall[Any]:
    op, _, arguments = decode_message(message)
    return decode_fields(*kind_of(op, arguments))


def items(kind: KIND, fields: list[Any]) -> list[Any]:
    """A request as it is packed."""
    return [kind.OP, 7, *([kind.CMD] if kind.OP in WITH_CMD else []), *fields]


def good(field: Any) -> Any:
    return 1 if isinstance(field, Bits) else "x" if isinstance(field, Text) else b"x"


# ---- there and back


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.__name__)
@given(st.data())
def test_every_request_there_and_back(kind: KIND, data: st.DataObject) -> None:
    request = kind(*[data.draw(value(field)) for field in kind.FIELDS])
    sequence = data.draw(st.integers(0, 0xFFFFFFFF))
    message = request.encode(sequence)
    assert len(message) <= MESSAGE_BYTES
    assert decode_message(message)[:2] == (kind.OP, sequence)
    assert decode(message) == request


def test_the_longest_request_of_each_fits_a_message() -> None:
    for kind in REQUESTS:
        longest = [
            (1 << f.bits) - 1 if isinstance(f, Bits) else "x" * f.size if isinstance(f, Text) else b"x" * f.size
            for f in kind.FIELDS
        ]
        assert len(kind(*longest).encode(0xFFFFFFFF)) <= MESSAGE_BYTES, kind.__name__


def test_what_does_not_fit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(TooBig, match="a message has 256"):
        console.ConsoleWrite(b"x" * 300).encode(1)


def test_requests_are_frozen_and_numbered_as_xen_has_them() -> None:
    request = evtchn.EvtchnSend(3)
    with pytest.raises(AttributeError):
        request.port = 4
    assert {(kind.OP, kind.CMD) for kind in REQUESTS} == set(ALL)
    xen = {"MapForeign", "UnmapForeign", "LaunchInfo", "Ledger", "ProcessMemory", "SetVirtualTimer"}
    assert {kind.__name__ for kind in REQUESTS if kind.CMD >= 1000} == xen, "ours are numbered from 1000"
    assert msgpack.unpackb(evtchn.EvtchnSend(3).encode(9)) == [32, 9, 4, 3]
    assert msgpack.unpackb(sched.SetTimer(5).encode(9)) == [15, 9, 5]


def test_a_request_declares_every_field_and_a_number_of_its_own() -> None:
    before = dict(ALL)
    with pytest.raises(AssertionError, match="annotate"):

        class Bare(Hypercall[None]):
            OP = 99
            port: int

    with pytest.raises(AssertionError, match="taken by EvtchnSend"):

        class Taken(Hypercall[None]):
            OP, CMD = 32, 4
            port: Annotated[int, Bits(32)]

    assert before == ALL


def test_results_have_names() -> None:
    assert evtchn.EvtchnStatus.result([2, 1, 7, 0]) == evtchn.EvtchnStatusReply(2, 1, 7, 0)
    assert evtchn.EvtchnSend.result([]) is None and evtchn.BindIpi.result([4]) == 4
    assert grant.GrantQuerySize.result([8, 8]).nr_frames == 8


def test_every_status_has_its_error() -> None:
    for status, kind in errors.BY_ERRNO.items():
        assert type(errors.from_status(status)) is kind and kind().errno == status and str(kind())
    assert type(errors.from_status(9999)) is XenError


# ---- what is no request


WRONG: list[Any] = [
    True, False, None, 1.0, 0.5, float("inf"), -1, -(1 << 63), [], [1], {}, {"a": 1}, msgpack.ExtType(5, b""),
    msgpack.ExtType(5, b"abcd"), msgpack.Timestamp(1, 0), [[[[1]]]],
]  # fmt: skip


def wrong_fields(field: Any) -> Iterator[Any]:
    yield from WRONG
    if isinstance(field, Bits):
        yield from ("1", b"1")
        if field.bits < 64:
            yield from (1 << field.bits, (1 << 64) - 1)
    elif isinstance(field, Text):
        yield from (1, b"x", "x" * (field.size + 1), "\u20ac" * (field.size // 3 + 1))
    else:
        yield from (1, "x", b"x" * (field.size + 1))


def wrong_requests() -> Iterator[list[Any]]:
    """Each request with one field wrong, one missing, one too many."""
    for kind in REQUESTS:
        fields = [good(field) for field in kind.FIELDS]
        for i, field in enumerate(kind.FIELDS):
            for wrong in wrong_fields(field):
                yield items(kind, [*fields[:i], wrong, *fields[i + 1 :]])
            yield items(kind, fields[:i] + fields[i + 1 :])
        yield items(kind, [*fields, 0])


def check_refused(request: list[Any]) -> None:
    message = msgpack.packb(request)
    with pytest.raises(Invalid):
        decode(message)


def test_every_wrong_field_is_refused() -> None:
    count = 0
    for request in wrong_requests():
        check_refused(request)
        count += 1
    assert count > 1000


@pytest.mark.parametrize(
    "lenient",
    [
        lambda kind, v, f: None if isinstance(v, int) and isinstance(f, Bits) and 0 <= v < 1 << f.bits else CHECK(kind, v, f),
        lambda kind, v, f: None if type(v) is int and v >= 0 else CHECK(kind, v, f),
        lambda kind, v, f: None if type(v) is str else CHECK(kind, v, f),
        lambda kind, v, f: None if type(v) is bytes else CHECK(kind, v, f),
        lambda kind, v, f: None if isinstance(f, Bits) and type(v) is int and v < 1 << f.bits else CHECK(kind, v, f),
    ],
    ids=["bool", "width", "text", "data", "negative"],
)
def test_a_lenient_decoder_is_found(monkeypatch: pytest.MonkeyPatch, lenient: Callable[..., None]) -> None:
    monkeypatch.setattr(abi, "_check", lenient)
    monkeypatch.setattr(abi, "SCALARS", abi.SCALARS | {bool})  # the first of the two that refuse it
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_every_wrong_field_is_refused()


CHECK = abi._check


@pytest.mark.parametrize(
    "request_items",
    [[], [32], [32, 1.0], [True, 1, 4, 3], [32, False, 4, 3], ["32", 1, 4, 3], [32, "1", 4, 3], [-1, 1], [32, -1, 4, 3],
     [1 << 32, 1], [32, 1 << 32, 4, 3], [[32, 1, 4, 3]], [32, 1], [32, 1, True, 3], [32, 1, "4", 3], [32, 1, 4.0, 3],
     [32, 1, [4], 3], [32, 1, 4, *range(13)], [None, None], 32, "32", b"32", None, {}, {"op": 32}, {32: 1}],
    ids=repr,
)  # fmt: skip
def test_what_has_not_the_form_is_invalid(request_items: Any) -> None:
    check_refused(request_items)


@pytest.mark.parametrize(("op", "cmd"), [(5, 0), (9, 0), (99, 0), (1 << 32, 0), (32, 11), (32, -1), (32, 1 << 63), (36, 9)])
def test_an_unknown_number_is_not_implemented(op: int, cmd: int) -> None:
    with pytest.raises(NotImplementedCall):
        kind_of(op, [cmd])


RAW = {
    "nothing": b"",
    "truncated array": b"\x94\x20",
    "array of four thousand million": b"\xdd\xff\xff\xff\xff\x20",
    "map of four thousand million": b"\xdf\xff\xff\xff\xff",
    "string longer than the message": b"\x92\x20\xdb\x7f\xff\xff\xff",
    "bin longer than the message": b"\x92\x20\xc6\x7f\xff\xff\xff",
    "255 arrays in each other": b"\x91" * 255 + b"\x01",
    "255 arrays, no end": b"\x91" * 256,
    "maps in each other": b"\x81\x01" * 128,
    "two messages": b"\x94\x20\x01\x04\x03" * 2,
    "trailing byte": b"\x94\x20\x01\x04\x03\x00",
    "text that is not UTF-8": b"\x94\x20\x01\x04\xa2\xff\xfe",
    "the byte that is never used": b"\xc1",
    "a time": b"\x93\x20\x01\xd6\xff\0\0\0\0",
    "an extension of no length": b"\x94\x20\x01\x04\xc7\x00\x05",
}


@pytest.mark.parametrize("message", RAW.values(), ids=RAW)
def test_bytes_that_are_no_request_are_invalid(message: bytes) -> None:
    with pytest.raises(Invalid):
        decode(message)


def test_every_truncation_is_invalid() -> None:
    for kind in REQUESTS:
        message = msgpack.packb(items(kind, [good(field) for field in kind.FIELDS]))
        for size in range(len(message)):
            with pytest.raises(Invalid):
                decode(message[:size])


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Random bytes, or a request with some of them changed, cut, doubled."""
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(MESSAGE_BYTES + 1))
    message = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(message) + 1)
        match rng.randrange(4):
            case 0:
                message[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 1:
                del message[at : at + rng.randrange(1, 4)]
            case 2:
                message[at : at + 1] = bytes([rng.choice(b"\x80\x90\xc0\xc3\xc7\xcb\xcf\xd3\xd9\xdc\xdf\xe0")])
            case 3:
                message += message[at:]
        message = message[:MESSAGE_BYTES]
    return bytes(message)


def test_random_bytes_raise_only_what_is_documented() -> None:
    rng, outcomes = random.Random(4), set()
    seeds = [kind(*[good(field) for field in kind.FIELDS]).encode(1) for kind in REQUESTS]
    for _ in range(FUZZ):
        message = mutated(rng, seeds)
        try:
            request = decode(message)
            assert decode(request.encode(1)) == request
            outcomes.add("accepted")
        except (Invalid, NotImplementedCall) as error:
            outcomes.add(type(error).__name__)
    assert outcomes == {"accepted", "Invalid", "NotImplementedCall"}
