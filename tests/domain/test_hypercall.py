"""The trap over real queues; the test is the hypervisor, and has answered before it is asked to wait."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import msgpack
import posix_ipc
import pytest

from domain.hypercall import Trap
from hypervisor.public.errors import Invalid
from hypervisor.public.evtchn import EvtchnSend
from hypervisor.public.types import MESSAGE_BYTES, MESSAGES
from hypervisor.public.version import XenVersion


class Queues:
    def __init__(self) -> None:
        names = [f"/ring1-test-{secrets.token_hex(8)}" for _ in range(2)]
        self.request, self.reply = (
            posix_ipc.MessageQueue(name, posix_ipc.O_CREX, 0o600, MESSAGES, MESSAGE_BYTES) for name in names
        )
        for name in names:
            posix_ipc.unlink_message_queue(name)
        self.trap = Trap(self.request.mqd, self.reply.mqd)

    def answer(self, *items: int) -> None:
        self.reply.send(msgpack.packb(items))

    def asked(self) -> list[int]:
        """[op, sequence, ...] of the next request; it must be there."""
        out: list[int] = msgpack.unpackb(self.request.receive(timeout=0)[0])
        return out


@pytest.fixture
def queues() -> Iterator[Queues]:
    made = Queues()
    yield made
    made.request.close()
    made.reply.close()


def test_a_call_has_its_answer(queues: Queues) -> None:
    queues.answer(1, 0, 0x40011)
    assert queues.trap(XenVersion()) == 0x40011 and queues.asked()[1] == 1


def check_posted(queues: Queues) -> None:
    queues.trap.post(EvtchnSend(7))
    assert queues.asked() == [32, 1, 4, 7] and queues.trap.count == 1, "asked, and nobody waits"
    queues.answer(1, 0)
    queues.trap.post(EvtchnSend(8))
    assert queues.asked() == [32, 2, 4, 8] and queues.reply.current_messages == 0
    queues.answer(2, 0)
    queues.answer(3, 0, 5)
    assert queues.trap(XenVersion()) == 5, "its own answer, not that of the event"
    queues.trap.post(EvtchnSend(7))
    queues.answer(4, 0)
    queues.trap.settle()
    assert queues.reply.current_messages == 0
    queues.trap.settle()  # nothing is to come: does not wait


def test_nobody_waits_for_the_answer_of_what_was_posted(queues: Queues) -> None:
    check_posted(queues)


def test_what_was_posted_and_refused_is_told_by_the_next_call(queues: Queues) -> None:
    queues.trap.post(EvtchnSend(7))
    queues.asked()
    queues.answer(1, 22)
    with pytest.raises(Invalid):
        queues.trap(XenVersion())
    assert queues.request.current_messages == 0, "that call was not made"
    queues.answer(2, 0, 5)
    assert queues.trap(XenVersion()) == 5


class Forgets(Trap):
    """Takes the answer to the last call for one's own."""

    def post(self, request: EvtchnSend) -> None:  # type: ignore[override]
        super().post(request)
        self._posted = False


def test_a_trap_that_forgets_what_it_posted_is_found(queues: Queues) -> None:
    queues.trap = Forgets(queues.request.mqd, queues.reply.mqd)
    with pytest.raises(AssertionError):
        check_posted(queues)
