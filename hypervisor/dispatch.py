"""From a message to a handler: one table, matched one to one with the contract at start.

@hypercall(Request) only marks a function `handler(hv, caller, request)`; `table` builds the dispatch table as a value from
the modules it is given, and asserts that every request of `hypervisor.public` has one handler and every handler a request.
A handler returns None, a value or a tuple, or is a generator (a continuation) that returns one.
"""

from __future__ import annotations

import functools
import inspect
import struct
from collections.abc import Callable, Iterable
from operator import gt
from types import GeneratorType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from hypervisor import budget, guest_access
from hypervisor.domain import Domain
from hypervisor.loop import Steps
from hypervisor.public import hypercall as abi
from hypervisor.public.errors import Invalid, NotPermitted, TooBig, XenError
from hypervisor.public.hypercall import Hypercall
from hypervisor.public.types import MAX_BATCH
from hypervisor.public.version import Multicall

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

F = TypeVar("F", bound=Callable[..., Any])
Handler = Callable[["Hypervisor", Domain, Any], Any]
Table = dict[type[Hypercall[Any]], Handler]
ENTRY = struct.Struct("<Qq6Q")  # multicall_entry: op, result, six words
assert ENTRY.size == 64
TURN = 16 * ENTRY.size  # of a list, before others who want something have their turn
LONG_TURN = 128 * ENTRY.size  # of a list, before it is asked whether there are any
MAX_KNOWN = 4096  # entries whose meaning is remembered


def hypercall(request: type[Hypercall[Any]]) -> Callable[[F], F]:
    """Mark the one function that serves `request`."""

    def mark(function: F) -> F:
        function.request = request  # type: ignore[attr-defined]
        return function

    return mark


def table(modules: Iterable[ModuleType]) -> Table:
    """The handlers of `modules` by request; asserts totality both ways."""
    out: Table = {}
    for module in modules:
        for _, function in inspect.getmembers(module, inspect.isfunction):
            request = getattr(function, "request", None)
            if request is not None and function.__module__ == module.__name__:
                assert request not in out, f"{request.__name__} has two handlers"
                out[request] = function
    missing = [kind.__name__ for kind in abi.ALL.values() if kind not in out]
    assert not missing, f"no handler for {missing}"
    return out


def call(hv: Hypervisor, caller: Domain, op: int, arguments: list[Any]) -> Any:
    """Authorise, decode, run one call; returns its value or a generator that will. Raises XenError."""
    kind, rest = abi.kind_of(op, arguments)
    _authorise(caller, kind)
    return hv.table[kind](hv, caller, abi.decode_fields(kind, rest))


def _authorise(caller: Domain, kind: type[Hypercall[Any]]) -> None:
    """Before any argument is looked at."""
    if kind.PRIVILEGED and not caller.privileged:
        raise NotPermitted(f"{kind.__name__} is dom0's")


def run_entry(hv: Hypervisor, caller: Domain, entry: bytes) -> Any:
    """As `call`, for a private copy of a 64-byte entry of a list or a ring.

    What an entry asks for depends on its bytes and on privilege alone, so that decoding it is remembered: 80 ns of 700.
    """
    handler, request = hv.known[caller.privileged].get(entry) or _decode_entry(hv, caller, entry)
    return handler(hv, caller, request)


def _decode_entry(hv: Hypervisor, caller: Domain, entry: bytes) -> tuple[Handler, Hypercall[Any]]:
    """The handler and the request, remembered: the sub-operation where there is one, fields, zeros. Raises XenError."""
    op, _, *words = ENTRY.unpack(entry)
    if op == abi.OP_MULTICALL:
        raise Invalid("a multicall within a list")
    kind, fields = abi.kind_of(op, words)
    _authorise(caller, kind)
    limits = kind.LIMITS
    if limits is None:
        raise Invalid(f"{kind.__name__} does not fit in words")
    if any(map(gt, fields, limits)):
        raise Invalid(f"{kind.__name__}: a field is too wide")
    if any(fields[len(limits) :]):
        raise Invalid("unused words are not 0")
    known = hv.known[caller.privileged]
    if len(known) >= MAX_KNOWN:
        known.clear()
    known[entry] = call = hv.table[kind], kind(*fields[: len(limits)])
    return call


@hypercall(Multicall)
def multicall(hv: Hypervisor, caller: Domain, request: Multicall) -> Steps:
    """The list is copied in once and its results are written back at the end; each entry is checked by itself."""
    if request.count > MAX_BATCH:
        raise TooBig(f"{request.count} entries, at most {MAX_BATCH}")
    entries = memoryview(guest_access.copy_in(hv, caller, request.address, request.count * ENTRY.size))

    results = list[int]()
    while left := entries[len(results) * ENTRY.size :]:
        wanted = hv.demand.others(caller)
        yield from _run_entries(hv, caller, left[: TURN if wanted else LONG_TURN], results)
        if wanted and len(results) < request.count:
            yield budget.turn(hv, caller)
        if not caller.alive:
            return
    answered = bytearray(entries)
    words = memoryview(_words(len(results)).pack(*results))
    memoryview(answered).cast("q")[1::8] = words.cast("q")  # an entry is eight words, the second is its result
    guest_access.copy_out(hv, caller, request.address, answered)


@functools.cache
def _split(count: int) -> struct.Struct:
    """`count` entries as byte strings."""
    return struct.Struct("64s" * count)


@functools.cache
def _words(count: int) -> struct.Struct:
    """`count` results."""
    return struct.Struct(f"{count}q")


def _run_entries(hv: Hypervisor, caller: Domain, entries: memoryview, results: list[int]) -> Steps:
    """Each as run_entry has it, with what that costs a call taken out of the loop; `map` looks up in half the time."""
    add, first, split = results.append, len(results), _split(len(entries) // ENTRY.size).unpack(entries)
    for known in map(hv.known[caller.privileged].get, split):
        try:
            handler, call = known or _decode_entry(hv, caller, split[len(results) - first])
            outcome = handler(hv, caller, call)
            if type(outcome) is int:
                add(outcome)
                continue
            if type(outcome) is GeneratorType:
                outcome = yield from outcome
                if not caller.alive:
                    return
            add(result_word(outcome))
        except XenError as error:
            add(-error.errno)


def result_word(outcome: Any) -> int:
    """A call's value as one word: its first integer, or 0."""
    if outcome is None:
        return 0
    first = outcome[0] if isinstance(outcome, tuple) and outcome else outcome
    return first if isinstance(first, int) else 0
