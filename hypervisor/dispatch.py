"""From a message to a handler: one table, matched one to one with the contract at start.

@hypercall(Request) only marks a function `handler(hv, caller, request)`; `table` builds the dispatch table as a value from
the modules it is given, and asserts that every request of `hypervisor.public` has one handler and every handler a request.
A handler returns None, a value or a tuple, or is a generator (a continuation) that returns one.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from hypervisor import guest_access
from hypervisor.domain import Domain
from hypervisor.loop import Steps
from hypervisor.public import hypercall as abi
from hypervisor.public.errors import Invalid, NotPermitted, TooBig, XenError
from hypervisor.public.hypercall import Hypercall
from hypervisor.public.types import MAX_BATCH, Bits
from hypervisor.public.version import Multicall

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

F = TypeVar("F", bound=Callable[..., Any])
Handler = Callable[["Hypervisor", Domain, Any], Any]
Table = dict[type[Hypercall[Any]], Handler]
ENTRY = struct.Struct("<Qq6Q")  # multicall_entry: op, result, six words
assert ENTRY.size == 64


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
    """Decode, authorise, run one call; returns its value or a generator that will. Raises XenError."""
    request = abi.decode_call(op, arguments)
    if request.PRIVILEGED and not caller.privileged:
        raise NotPermitted(f"{type(request).__name__} is dom0's")
    return hv.table[type(request)](hv, caller, request)


@hypercall(Multicall)
def multicall(hv: Hypervisor, caller: Domain, request: Multicall) -> Steps:
    """Each entry is copied in, checked and answered by itself; only a copy that fails ends the list."""
    if request.count > MAX_BATCH:
        raise TooBig(f"{request.count} entries, at most {MAX_BATCH}")

    for i in range(request.count):
        at = request.address + i * ENTRY.size
        op, _, *words = ENTRY.unpack(guest_access.copy_in(hv, caller, at, ENTRY.size))
        try:
            outcome = _single(hv, caller, op, words)
            if inspect.isgenerator(outcome):
                outcome = yield from outcome
            result = _word(outcome)
        except XenError as error:
            result = -error.errno
        guest_access.copy_out(hv, caller, at + 8, struct.pack("<q", result))
        if not caller.alive:
            return


def _single(hv: Hypervisor, caller: Domain, op: int, words: list[int]) -> Any:
    if op == abi.OP_MULTICALL:
        raise Invalid("a multicall within a multicall")
    cmd = words[0] if op in abi.WITH_CMD else 0
    kind = abi.ALL.get((op, cmd))
    arguments = words[1:] if op in abi.WITH_CMD else words
    if kind is not None:
        if not all(isinstance(field, Bits) for field in kind.FIELDS):
            raise Invalid(f"{kind.__name__} does not fit in words")
        if any(arguments[len(kind.FIELDS) :]):
            raise Invalid("unused words are not 0")
        arguments = arguments[: len(kind.FIELDS)]
    return call(hv, caller, op, [cmd, *arguments] if op in abi.WITH_CMD else arguments)


def _word(outcome: Any) -> int:
    """A call's value as one word: its first integer, or 0."""
    first = outcome[0] if isinstance(outcome, tuple) and outcome else outcome
    return first if isinstance(first, int) else 0
