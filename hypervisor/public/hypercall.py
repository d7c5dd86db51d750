"""The hypercall: a request is a frozen class whose annotations are its fields; one message carries it.

    request  [op, sequence, (cmd,) field, ...]      msgpack, at most MESSAGE_BYTES, on the domain's request queue
    reply    [sequence, status, result, ...]        status 0 or a positive errno, on its reply queue

Who calls is which queue the message came on, never a field in it. Integers are non-negative and bounded by their
annotation; bool, float, map and extension types are refused. A call whose fields are at most six integers may also stand
in a multicall list (64-byte entries, Xen's multicall_entry: op u64, result s64, six words u64 of which the first is the
sub-operation where there is one).

Adding a call is a class here in `hypervisor.public` and one function marked with @hypercall in the module of the same
name in `hypervisor`; at start the two are matched one to one.
"""

from __future__ import annotations

from inspect import get_annotations
from typing import Annotated, Any, ClassVar, Generic, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

import msgspec

from hypervisor.public.errors import Invalid, NotImplementedCall, TooBig
from hypervisor.public.types import MESSAGE_BYTES, Bits, Data, Text

R = TypeVar("R")
Field = Bits | Text | Data

OP_SET_TRAP_TABLE = 0
OP_MMU_UPDATE = 1
OP_SET_GDT = 2
OP_STACK_SWITCH = 3
OP_SET_CALLBACKS = 4
OP_PLATFORM = 7
OP_UPDATE_DESCRIPTOR = 10
OP_MEMORY = 12
OP_MULTICALL = 13
OP_UPDATE_VA_MAPPING = 14
OP_SET_TIMER = 15
OP_XEN_VERSION = 17
OP_CONSOLE_IO = 18
OP_GRANT_TABLE = 20
OP_VM_ASSIST = 21
OP_VCPU = 24
OP_MMUEXT = 26
OP_SCHED = 29
OP_EVENT_CHANNEL = 32
OP_SYSCTL = 35
OP_DOMCTL = 36
OP_CALLRING = 48
OP_USER = 49

WITH_CMD = frozenset((
    OP_PLATFORM, OP_MEMORY, OP_XEN_VERSION, OP_CONSOLE_IO, OP_GRANT_TABLE, OP_VCPU, OP_SCHED, OP_EVENT_CHANNEL, OP_SYSCTL,
    OP_DOMCTL, OP_CALLRING, OP_USER,
))  # fmt: skip
MAX_ITEMS = 16
ENTRY_WORDS = 6  # of a list entry, the sub-operation among them
SCALARS = frozenset((int, str, bytes))
_decode = msgspec.msgpack.Decoder(list).decode  # the same wire format as msgpack's, in a third of the time
encode_items = msgspec.msgpack.Encoder().encode
ALL: dict[tuple[int, int], type[Hypercall[Any]]] = {}


@dataclass_transform(frozen_default=True)
class Hypercall(msgspec.Struct, Generic[R], frozen=True):
    """Base of every request. OP is Xen's number, CMD its sub-operation (0 where the call has none).

    PRIVILEGED: only dom0 may call (EPERM to all others, before any argument is looked at). FIELDS, LIMITS: the kinds of
    the fields in order, and their greatest values where they fit in the words of a list entry (None otherwise). A Struct
    and not a dataclass for its constructor: 50 ns instead of 250, on a path of 700.
    """

    OP: ClassVar[int]
    CMD: ClassVar[int] = 0
    PRIVILEGED: ClassVar[bool] = False
    FIELDS: ClassVar[tuple[Field, ...]] = ()
    LIMITS: ClassVar[tuple[int, ...] | None] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hints = get_type_hints(cls, include_extras=True)
        cls.FIELDS = tuple(_field(cls, name, hints[name]) for name in get_annotations(cls))
        bits = [field.bits for field in cls.FIELDS if isinstance(field, Bits)]
        in_words = len(bits) == len(cls.FIELDS) and len(bits) + (cls.OP in WITH_CMD) <= ENTRY_WORDS
        cls.LIMITS = tuple((1 << b) - 1 for b in bits) if in_words else None
        if (cls.OP, cls.CMD) in ALL:
            raise AssertionError(f"{cls.__name__}: number ({cls.OP}, {cls.CMD}) is taken by {ALL[cls.OP, cls.CMD].__name__}")
        ALL[cls.OP, cls.CMD] = cls

    @classmethod
    def result(cls, values: list[Any]) -> Any:
        """A reply's values as the guest gets them: None, the one value, or a tuple. Overridden where they have names."""
        return None if not values else values[0] if len(values) == 1 else tuple(values)

    def encode(self, sequence: int) -> bytes:
        """The request message. Raises TooBig where it does not fit: such data goes by address."""
        head = [self.OP, sequence, self.CMD] if self.OP in WITH_CMD else [self.OP, sequence]
        message = encode_items([*head, *msgspec.structs.astuple(self)])
        if len(message) > MESSAGE_BYTES:
            raise TooBig(f"{type(self).__name__}: {len(message)} bytes, a message has {MESSAGE_BYTES}")
        return message


def _field(cls: type[Any], name: str, hint: Any) -> Field:
    if get_origin(hint) is Annotated:
        for kind in get_args(hint)[1:]:
            if isinstance(kind, (Bits, Text, Data)):
                return kind
    raise AssertionError(f"{cls.__name__}.{name}: annotate with U8..U64, Text or Data")


def decode_message(message: bytes) -> tuple[int, int, list[Any]]:
    """(op, sequence, arguments) of a raw request. Raises Invalid for anything but a flat msgpack array of that form."""
    try:
        items = _decode(message)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        raise Invalid("not one msgpack array") from None
    if not 2 <= len(items) <= MAX_ITEMS or not SCALARS.issuperset(map(type, items)):
        raise Invalid("not a flat array of 2 to 16 integers, texts and byte strings")
    if type(items[0]) is not int or type(items[1]) is not int:
        raise Invalid("not [op, sequence, ...]")
    if not (0 <= items[0] < 1 << 32 and 0 <= items[1] < 1 << 32):
        raise Invalid("op and sequence are u32")
    return items[0], items[1], items[2:]


def kind_of(op: int, arguments: list[Any]) -> tuple[type[Hypercall[Any]], list[Any]]:
    """The class of a call and what is left for its fields. Raises NotImplementedCall, Invalid."""
    cmd = 0
    if op in WITH_CMD:
        if not arguments or type(arguments[0]) is not int:
            raise Invalid("the sub-operation is missing")
        cmd, arguments = arguments[0], arguments[1:]
    kind = ALL.get((op, cmd))
    if kind is None:
        raise NotImplementedCall(f"no hypercall {op}.{cmd}")
    return kind, arguments


def decode_fields(kind: type[Hypercall[Any]], arguments: list[Any]) -> Hypercall[Any]:
    """The typed request. Raises Invalid for wrong fields."""
    if len(arguments) != len(kind.FIELDS):
        raise Invalid(f"{kind.__name__} takes {len(kind.FIELDS)} arguments")
    for value, field in zip(arguments, kind.FIELDS, strict=True):
        _check(kind, value, field)
    return kind(*arguments)


def decode_call(op: int, arguments: list[Any]) -> Hypercall[Any]:
    """Both of these in one. Raises NotImplementedCall, Invalid."""
    return decode_fields(*kind_of(op, arguments))


def _check(kind: type[Any], value: Any, field: Field) -> None:
    if isinstance(field, Bits):
        if type(value) is not int or not 0 <= value < 1 << field.bits:
            raise Invalid(f"{kind.__name__}: wants an integer of {field.bits} bits")
    elif isinstance(field, Text):
        if type(value) is not str or len(value.encode()) > field.size:
            raise Invalid(f"{kind.__name__}: wants text of at most {field.size} bytes")
    elif type(value) is not bytes or len(value) > field.size:
        raise Invalid(f"{kind.__name__}: wants at most {field.size} bytes")
