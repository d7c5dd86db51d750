"""Programs that lie to their kernel while it believes them stopped, and go on when what they have is taken from them.

Each attack is a question to a guest: on a real host it is answered as the rules say, and on one with the defect that the
attack is made for (user_defects.py) it is not. A program here gives the turn to its kernel by a plain store, so that both run.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator

import pytest

from hypervisor.public.user import USER_CONTROL, USER_GATE
from tests.system import user_defects
from tests.system.machine import Guest, Machine
from tests.system.test_user import GETPID, LAB, gate_page

SIGRETURN = USER_GATE + gate_page().index(bytes.fromhex("b80f000000 0f05"))
SYSCALL, FAULT, TIMEOUT, DEAD = 0, 1, 3, 5
HAND_OVER = f"incq 0x501000; movabs ${USER_CONTROL}, %rbx; mov 40(%rbx), %rcx; movl $31, 4(%rbx); movl $62, 8(%rbx);"  # kill(2)
NOW = "movl $0, (%rbx); 1: incq 0x501000; pause; jmp 1b"  # the turn is the kernel's; it stores on and on


@pytest.fixture
def lab(host: Machine) -> Iterator[Guest]:
    with guest_of(host, "lab") as guest:
        yield guest


@pytest.fixture(scope="module")
def seeded() -> Iterator[Machine]:
    host = Machine(seed="programs_are_believed")
    yield host
    host.close()


@contextlib.contextmanager
def guest_of(host: Machine, name: str) -> Iterator[Guest]:
    guest = host.guest(name, memory=8)
    try:
        guest.do(LAB)
        yield guest
    finally:
        if guest.row()["state"] != "dead":
            guest.destroy()


def assemble(text: str) -> str:
    """Machine code, in hexadecimal."""
    link = "gcc -x assembler - -nostdlib -static -Wl,--oformat=binary,-Ttext=0x400000,-N -o /dev/stdout".split()
    return subprocess.run(link, input=f".globl _start\n_start: {text}\n".encode(), capture_output=True, check=True).stdout.hex()


def run(guest: Guest, text: str, body: str, pages: int = 2) -> object:
    """What `body` returns of a program `p`; then another one is served beside it, as if nothing were."""
    out, other = guest.do(f"""
        p = Program("{assemble(text)}", {pages})
        def back():  # a host that is busy may take more than one slice to come so far
            kinds = [p.run(20_000_000)]
            while kinds[-1] == user.TIMEOUT and len(kinds) < 50:
                kinds.append(p.run(20_000_000))
            return kinds[-1]
        async def body():
            {body}
        out = await body()
        p.end()
        q = Program("{GETPID}")
        other = [q.run(), q.user.number]
        q.end()
        return out, other
    """)
    assert other == [SYSCALL, 39]
    return out


# ---- the questions


def ask_frame(guest: Guest) -> None:
    """Registers are looked for where the host put them, whatever the cell says."""
    for wrong in (0, USER_CONTROL - (1 << 40), USER_CONTROL + (1 << 40), (1 << 64) - 8):
        text = f"{HAND_OVER} movabs ${wrong}, %rdx; mov %rdx, 40(%rbx); {NOW}"
        assert run(guest, text, "return back()") == DEAD


SIZES = """was = len(p.user.fpu); kind = back()
            try:
                size = len(p.user.fpu)
            except OverflowError:  # what a size that is none comes to
                size = -1
            return kind, size - was"""


def ask_vector_registers(guest: Guest) -> None:
    """And those of the vector unit likewise, whatever the frame says."""
    for wrong in (0, USER_CONTROL - (1 << 40), USER_CONTROL + (1 << 40)):
        text = f"{HAND_OVER} movabs ${wrong}, %rdx; mov %rdx, 224(%rcx); {NOW}"
        assert run(guest, text, SIZES) == [DEAD, 0]


def ask_how_many(guest: Guest) -> None:
    """Their size is the one that the host gave before the first instruction."""
    text = f"{HAND_OVER} mov 224(%rcx), %rdx; movl $0x7fff, 468(%rdx); {NOW}"
    assert run(guest, text, SIZES) == [SYSCALL, 0]


def ask_direct(guest: Guest) -> None:
    """A direct call that it has not made: what the kernel wants in a frame it does not get, and does not wait for long."""
    body = "kind = back(); at = kernel.now_ns(); p.user.fpu; return kind, p.run(), kernel.now_ns() - at < 10**9"
    assert run(guest, f"{HAND_OVER} movl $0, 4(%rbx); {NOW}", body) == [SYSCALL, DEAD, True]


def ask_stack(guest: Guest) -> None:
    """An rt_sigreturn of its own moves the stack of signals, so that the host puts the registers into the program's pages."""
    text = f"""
        mov $0x500100, %rdi; movq $6, (%rdi); movq $0x501000, 16(%rdi); movq $0x2f00, 32(%rdi)
        movq $0x500800, 160(%rdi); lea 2f(%rip), %rax; mov %rax, 168(%rdi); movq $0x202, 176(%rdi)
        movabs $0x002b000000000033, %rax; mov %rax, 184(%rdi); mov %rdi, %rsp; movabs ${SIGRETURN}, %rax; jmp *%rax
        2: mov $39, %eax; syscall; jmp 2b
    """
    assert run(guest, text, "return back()", pages=4) == DEAD


def ask_turn(guest: Guest) -> None:
    """The turn is the kernel's where the word is 0. Any other leaves it the program's, and the CPU is taken from it."""
    text = f"{HAND_OVER} 1: movl $31, 4(%rbx); movl $77, (%rbx); pause; jmp 1b"
    assert run(guest, text, "return [p.run(20_000_000) for _ in range(5)]") == [TIMEOUT] * 5


def ask_table(guest: Guest) -> None:
    """A call says in the cell of which table of numbers it is."""
    text = f"{HAND_OVER} movl $0x40000003, 16(%rbx); {NOW}"
    assert run(guest, text, "return back(), p.user.native") == [SYSCALL, False]


LOOK = "memory.zero(p.data.address, 8192); await kernel.sleep(0.05); return kinds, any(memory.read(p.data.address, 8192))"


def ask_revocation(guest: Guest) -> None:
    """Its page is taken away while it stores to it: after that, no store lands, however long it goes on."""
    body = f"kinds = back(); [p.space.unmap(0x500000 + at) for at in (0, 4096)]; p.space.flush(); {LOOK}"
    assert run(guest, f"{HAND_OVER} {NOW}", body) == [SYSCALL, False]


def ask_end(guest: Guest) -> None:
    """Likewise where its space is ended: the reply says that nothing of it is left."""
    body = f"kinds = back(); p.user.destroy(); {LOOK}"
    assert run(guest, f"{HAND_OVER} {NOW}", body) == [SYSCALL, False]


QUESTIONS: list[tuple[Callable[[Guest], None], str]] = [  # and the defect that each one finds
    (ask_frame, "the frame is where the cell says"),
    (ask_vector_registers, "vector registers are where the frame says"),
    (ask_how_many, "there are as many as they say"),
    (ask_direct, "whoever is to come into a frame comes"),
    (ask_stack, "a stack that has moved is not noticed"),
    (ask_turn, "any turn but the program's is the kernel's"),
    (ask_table, "every table of calls is ours"),
    (ask_revocation, user_defects.NOT_FOLLOWED),
    (ask_end, user_defects.ENDS_LATER),
]


@pytest.mark.parametrize("ask", [ask for ask, _ in QUESTIONS])
def test_a_program_that_lies_hurts_nobody(lab: Guest, ask: Callable[[Guest], None]) -> None:
    ask(lab)


def test_a_program_goes_on_while_its_kernel_believes_it_stopped(lab: Guest) -> None:
    """What makes the questions above questions."""
    body = f"kinds = back(); {LOOK}"
    assert run(lab, f"{HAND_OVER} {NOW}", body) == [SYSCALL, True]


@pytest.mark.parametrize(("ask", "defect"), QUESTIONS)
def test_a_seeded_defect_is_found(seeded: Machine, ask: Callable[[Guest], None], defect: str) -> None:
    with guest_of(seeded, defect if " " not in defect else "lab") as guest:
        guest.do(f"user.lib.choose({user_defects.IN_C.get(defect, 0)})")
        with pytest.raises(AssertionError):
            ask(guest)


def test_the_changed_copy_is_found_sound_without_a_defect(seeded: Machine) -> None:
    with guest_of(seeded, "lab") as guest:
        for ask, _ in QUESTIONS:
            ask(guest)
