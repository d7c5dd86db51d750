"""The gate's direct entry: a system call without a signal of the host's, all registers when they are wanted; hostile ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hypervisor.public.user import USER_CALL, USER_CONTROL
from tests.system.machine import Guest, Machine, machine
from tests.system.test_user import GETPID, LAB, ends

BACK = 0x40_001C  # where a program goes on whose first bytes are a direct call


def direct(number: int, then: str) -> str:
    """mov $number, %eax; movabs $USER_CALL, %r11; movabs $BACK, %rcx; jmp *%r11; then the rest, at BACK."""
    words = number.to_bytes(4, "little"), USER_CALL.to_bytes(8, "little"), BACK.to_bytes(8, "little")
    return "b8{} 49bb{} 48b9{} 41ffe3".format(*(word.hex() for word in words)) + then


@pytest.fixture
def lab(host: Machine) -> Iterator[Guest]:
    guest = host.guest("lab", memory=8)
    guest.do(LAB)
    yield guest
    if guest.row()["state"] != "dead":
        guest.destroy()


def test_a_direct_call_is_a_system_call(lab: Guest) -> None:
    """Arguments, the result, every other register; not one hypercall, and none of the host's signals: RFLAGS say which way."""
    first, second, hypercalls = lab.do(f"""
        p = Program("{direct(39, "0f05 ebfe")}")
        r = p.user.registers
        for i in range(27):
            if i not in (15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26):
                r[i] = 0x100 + i
        r[21], r[22] = 0x12345000, 0x777000
        p.run()
        first = [p.user.direct, p.user.native, p.user.number, list(p.user.arguments), r[16], r[11], *r[:6], *r[19:23]]
        before = kernel.hypercall.count
        r[10] = 0xABCDEF
        p.run()
        second = [p.user.direct, r[10], list(p.user.arguments), r[16], *r[:6], *r[19:23]]
        hypercalls = kernel.hypercall.count - before
        p.end()
        return first, second, hypercalls
    """)
    kept = [0x100 + i for i in range(6)]
    arguments = [0x100 + i for i in (14, 13, 12, 7, 9, 8)]
    assert first[:6] == [True, True, 39, arguments, BACK, BACK] and first[6:12] == kept
    assert second[:2] == [False, 0xABCDEF] and second[2:4] == [arguments, BACK + 2] and second[4:10] == kept
    assert first[12] == second[10] == 0x502000 and first[14:] == second[12:] == [0x12345000, 0x777000]
    assert hypercalls == 0


def test_results_come_back_without_a_frame(lab: Guest) -> None:
    """A loop of direct calls: each result is seen by the next call, and all of them are direct."""
    out = lab.do(f"""
        p = Program("{direct(0, "4889c7 4831c0 ebdc")}")  # mov %rax, %rdi; xor %eax, %eax; and again
        p.run()
        seen, kinds = [], set()
        for i in range(1000):
            p.user.registers[10] = i
            kinds.add(p.user.run(-1))
            kinds.add(p.user.direct)
            seen.append(p.user.arguments[0])
        p.end()
        return seen == list(range(1000)), sorted(kinds)
    """)
    assert out == [True, [0, 1]]


# movq %rbx, %xmm0; the direct call; syscall; movq %xmm0, %rax; syscall
VECTOR = "66480f6ec3" + direct(39, "0f05 66480f7ec0 0f05 ebfe").replace("1c0040", "210040")


@pytest.mark.parametrize(
    ("change", "rbx", "xmm0"),
    [
        ("r[5] = 77", 77, 0x1234567890),  # another register
        ("state = p.user.fpu", 0x1234567890, 0x1234567890),  # the vector registers are looked at
        ("p.user.fpu = b''", 0x1234567890, 0),  # and changed
        ("r[21] = 0x4000", 0x1234567890, 0x1234567890),  # FS base
        ("r[11], r[4] = 5, 6", 0x1234567890, 0x1234567890),
    ],
)
def test_all_registers_can_be_had_and_changed(lab: Guest, change: str, rbx: int, xmm0: int) -> None:
    result, registers, vector = lab.do(f"""
        p = Program("{VECTOR}")
        r = p.user.registers
        r[5] = 0x1234567890
        p.run()
        assert p.user.direct
        {change}
        r[10] = 1234
        p.run()
        result, registers = r[10], [r[5], r[21], r[4]]
        p.run()
        vector = r[10]
        p.end()
        return result, registers, vector
    """)
    assert result == 1234 and registers == [rbx, 0x4000 if "21" in change else 0, 6 if "[4]" in change else 0]
    assert vector == xmm0 or (xmm0 == 0 and vector != 0x1234567890)  # a fresh one holds what the gate was born with


def loop() -> str:
    """1: movq %xmm1, %r13; cmp %rbx, %r13; jne bad; inc %rbx; movq %rbx, %xmm1; the direct call; jmp 1b; bad: ud2"""
    head = "66490f7ecd 4939dd 7526 48ffc3 66480f6ecb".replace(" ", "")
    size = len(head) // 2
    call = direct(39, "").replace("1c0040", f"{0x1C + size:02x}0040").replace(" ", "")
    back = -(size + 0x1C + 2) & 0xFF
    bad = size + 0x1C + 2 - (head.index("7526") // 2 + 2)
    return head.replace("7526", f"75{bad:02x}") + call + f"eb{back:02x}" + "0f0b"


def test_taking_the_cpu_away_at_any_moment_of_a_direct_call(lab: Guest) -> None:
    """Two threads of one program take turns after slices of some microseconds; not one call, not one register is lost."""
    out = lab.do(f"""
        import random
        random.seed(5)
        p = Program("{loop()}")
        r = p.user.registers
        threads = []
        for stack in (0x501000, 0x502000):
            r[19] = stack
            threads.append([list(r), p.user._fresh, 0])
        kinds, wrong = [0] * 6, []
        running = 0
        r[:] = memoryview(__import__("struct").pack("27Q", *threads[0][0])).cast("Q")
        for round in range(1500):
            kind = p.run(random.randrange(1, 60_000))
            kinds[kind] += 1
            me = threads[running]
            if kind == user.SYSCALL:
                me[2] += 1
                if r[5] != me[2] or r[19] != me[0][19]:
                    wrong.append([round, r[5], me[2]])
                r[10] = round
            elif kind != user.TIMEOUT:
                wrong.append([round, kind, p.user.vector, r[16]])
                break
            if random.random() < 0.3:
                me[0], me[1] = list(r), p.user.fpu
                running = 1 - running
                r[:] = memoryview(__import__("struct").pack("27Q", *threads[running][0])).cast("Q")
                p.user.fpu = threads[running][1]
        p.end()
        return kinds, wrong
    """)
    kinds, wrong = out
    assert wrong == [] and kinds[0] > 100 and kinds[0] + kinds[3] == 1500


def test_a_kernel_that_forgets_the_frame_is_seen() -> None:
    """The same exchange of vector registers, without the exception that saves them."""
    with machine(seed="direct_calls_without_a_frame") as host:
        guest = host.guest("lab", memory=8)
        guest.do(LAB)
        vector = guest.do(f"""
            p = Program("{VECTOR}")
            r = p.user.registers
            r[5] = 0x1234567890
            p.run()
            p.user.fpu = b""
            p.run(); p.run()
            vector = r[10]
            p.end()
            return vector
        """)
        assert vector == 0x1234567890
        guest.destroy()


# ---- what a hostile one does


@pytest.mark.parametrize("first", range(8))
def test_a_jump_to_every_byte_of_the_entry(lab: Guest, first: int) -> None:
    """With registers that point anywhere: at worst that program is dead, and another is as before."""
    words = 0, 1, 3, 0x500000, USER_CONTROL, USER_CALL, BACK, 1 << 63, 202, 231, 15
    kinds, other = lab.do(f"""
        import random
        choose = random.Random({first})
        kinds = set()
        for at in range({first}, 0x100, 8):
            p = Program("0f05 ebfe")
            for i in range(15):
                p.user.registers[i] = choose.choice({words})
            p.user.registers[16] = {USER_CALL} + at
            for _ in range(3):
                kinds.add(p.run(1_000_000))
                p.user.registers[5] = 1
            p.end()
        q = Program("{GETPID}")
        other = [q.run(), q.user.number]
        q.end()
        return sorted(kinds), other
    """)
    assert set(kinds) <= {0, 1, 2, 3, 5} and other == [0, 39]


CELL = f"48bf{USER_CONTROL.to_bytes(8, 'little').hex()}"  # movabs $cell, %rdi


@pytest.mark.parametrize("turn", [2, 3, 4, 0xFFFFFFFF])
def test_a_turn_that_the_program_writes_itself(lab: Guest, turn: int) -> None:
    kinds, _ = ends(lab, f"{CELL} c707{turn.to_bytes(4, 'little').hex()} 0f05 0f0b", runs=2)
    assert set(kinds) <= {0, 2, 3, 5}


def test_a_program_that_plays_the_gate(lab: Guest) -> None:
    """It says `a direct call` and runs on: a result is taken, but the frame that is asked for never comes: it is given up."""
    out = lab.do(f"""
        p = Program("{CELL} c7470400000000 c70700000000 ebfe")
        kind = p.run(50_000_000)  # it does not wake us
        direct = p.user.direct
        p.user.registers[5] = 1
        second = p.run()
        p.end()
        q = Program("{GETPID}")
        other = [q.run(), q.user.number]
        q.end()
        return kind, direct, second, other
    """)
    assert out == [0, True, 5, [0, 39]]
