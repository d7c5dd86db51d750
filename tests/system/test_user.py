"""Programs in processes of their own: system calls, faults, exceptions, the CPU taken back, and what a hostile one can do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from hypervisor.gate._gate import ffi, lib
from hypervisor.public.user import USER_GATE
from tests.system.machine import Guest, Machine, machine, until

LAB = """
    from domain import user
    from domain.paging import AddressSpace
    from hypervisor.public.boot_tables import DATA
    from hypervisor.public.user import UserDestroy, UserInterrupt
    global Program, user, DATA, UserDestroy, UserInterrupt
    TEXT = DATA & ~(1 << 63) & ~2

    class Program:
        def __init__(self, code, pages=2):
            self.space = AddressSpace.create(kernel)
            self.text, self.data = kernel.memory.alloc(1), kernel.memory.alloc(pages)
            memory.write(self.text.address, bytes.fromhex(code))
            self.space.map(0x400000, self.text.pfn, TEXT)
            for i in range(pages):
                self.space.map(0x500000 + 4096 * i, self.data.pfn + i, DATA)
            self.space.flush()
            self.control = kernel.memory.alloc(user.CONTROL_PAGES)
            self.user = user.UserSpace(kernel, kernel.memory.p2m[self.space.root], self.control.pfns)
            self.user.registers[16], self.user.registers[19] = 0x400000, 0x500000 + 4096 * pages
        def run(self, ns=5_000_000_000):
            kind = self.user.run(ns)
            while kind == user.UPCALL:
                kernel._look(False)  # hands out what is pending
                kind = self.user.run(ns)
            return kind
        def end(self):
            self.user.destroy()
            self.space.destroy()
            for pages in (self.text, self.data, self.control):
                kernel.memory.free(pages)
"""
GETPID = "b827000000 0f05 ebf7"  # 1: mov $39, %eax; syscall; jmp 1b


@pytest.fixture
def lab(host: Machine) -> Iterator[Guest]:
    guest = host.guest("lab", memory=8)
    guest.do(LAB)
    yield guest
    if guest.row()["state"] != "dead":
        guest.destroy()


def test_system_calls_reach_the_kernel_and_nobody_else(lab: Guest) -> None:
    """Not one hypercall, not one fault, from one to the next."""
    kinds, numbers, hypercalls = lab.do(f"""
        p = Program("{GETPID}")
        first = p.run()
        before = kernel.hypercall.count
        kinds, numbers = [], []
        for i in range(1000):
            p.user.registers[10] = i
            kinds.append(p.user.run(-1))
            numbers.append(p.user.number)
        calls = kernel.hypercall.count - before
        p.end()
        return [first, *sorted(set(kinds))], sorted(set(numbers)), calls
    """)
    assert kinds == [0, 0] and numbers == [39] and hypercalls == 0


def ends(lab: Guest, code: str, setup: str = "", runs: int = 1, ns: int = 5_000_000_000) -> list[int]:
    """How a program of these bytes comes back, `runs` times; then another one is at work beside it, as if nothing were."""
    kinds, other = lab.do(f"""
        p = Program("{code}")
        registers = p.user.registers
        {setup}
        kinds = [p.run({ns}) for _ in range({runs})]
        detail = [p.user.number, p.user.native, p.user.vector, p.user.address, p.user.error]
        q = Program("{GETPID}")
        other = [q.run(), q.user.number]
        q.end()
        p.end()
        return [kinds, detail], other
    """)
    assert other == [0, 39]
    return kinds  # type: ignore[no-any-return]


# ---- what a program does


def test_arguments_and_results(lab: Guest) -> None:
    values = lab.do(f"""
        p = Program("{GETPID}")
        p.user.registers[14], p.user.registers[13], p.user.registers[12] = 1, 1 << 63, 3
        p.user.registers[7], p.user.registers[9], p.user.registers[8] = 4, 5, 6
        p.user.registers[21], p.user.registers[22] = 0x12345000, 0x777000
        p.run()
        out = [*p.user.arguments, *p.user.registers[21:23], p.user.registers[15], p.user.registers[16], p.user.native]
        p.end()
        return out
    """)
    assert values == [1, 1 << 63, 3, 4, 5, 6, 0x12345000, 0x777000, 39, 0x400007, True]


def test_the_tables_are_what_a_program_sees(lab: Guest) -> None:
    """What they allow is mapped by the hypervisor and nobody hears of it; the rest is a fault, and after a repair goes on."""
    out = lab.do("""
        p = Program("8807 0f05")  # mov %al, (%rdi); syscall
        p.user.registers[14], p.user.registers[10] = 0x500000, 0x41
        fine = [p.run(), memory.read(p.data.address, 1)[0]]
        p.user.registers[16], p.user.registers[14] = 0x400000, 0x600123
        absent = [p.run(), p.user.address, p.user.error, p.user.vector]
        extra = kernel.memory.alloc(1)
        p.space.map(0x600000, extra.pfn, DATA)
        p.space.flush()
        after = [p.run(), memory.read(extra.address + 0x123, 1)[0]]
        p.user.registers[16], p.user.registers[14] = 0x400000, 0x400000
        text = [p.run(), p.user.error]
        p.space.unmap(0x600000)
        p.space.flush()
        p.user.registers[16], p.user.registers[14] = 0x400000, 0x600123
        revoked = [p.run(), p.user.address, p.user.error]
        p.user.registers[16] = 0x500000
        fetch = [p.run(), p.user.error]
        p.end()
        kernel.memory.free(extra)
        return fine, absent, after, text, revoked, fetch
    """)
    fine, absent, after, text, revoked, fetch = out
    assert fine == [0, 0x41] and absent == [1, 0x600123, 6, 14] and after == [0, 0x41]
    assert text == [1, 7] and revoked == [1, 0x600123, 6] and fetch == [1, 21]


@pytest.mark.parametrize(
    ("code", "vector"), [("0f0b", 6), ("cc", 3), ("f4", 13), ("31c9 f7f1", 0), ("48b80000000000000080 8a00", 13)]
)
def test_exceptions(lab: Guest, code: str, vector: int) -> None:
    (kinds, detail), _ = ends(lab, code), None
    assert kinds == [2] and detail[2] == vector


def test_the_cpu_is_taken_from_an_endless_loop(lab: Guest) -> None:
    kinds, counted = lab.do("""
        p = Program("48ffc0 ebfb")  # 1: inc %rax; jmp 1b
        kinds, counts = [], []
        for _ in range(3):
            kinds.append(p.run(2_000_000))
            counts.append(p.user.registers[10])
        p.end()
        return kinds, counts[0] < counts[1] < counts[2]
    """)
    assert kinds == [3, 3, 3] and counted


def test_vector_registers_are_kept_and_exchanged(lab: Guest) -> None:
    out = lab.do("""
        p = Program("66480f6ec0 0f05 66480f7ec0 0f05")  # movq %rax, %xmm0; syscall; movq %xmm0, %rax; syscall
        p.user.registers[10] = 0x1234567890
        p.run()
        state = p.user.fpu
        p.user.registers[10] = 0
        p.run()
        kept = p.user.registers[10]
        p.user.fpu = b""
        p.user.registers[16] = 0x400007
        p.run()
        fresh = p.user.registers[10]
        p.user.fpu = state
        p.user.registers[16] = 0x400007
        p.run()
        again = p.user.registers[10]
        try:
            p.user.fpu = bytes(100)
        except ValueError:
            again += 1
        p.end()
        return kept, fresh, again
    """)
    assert out == [0x1234567890, 0xF000000000 * 0 + out[1], 0x1234567891] and out[1] != 0x1234567890


# ---- what a hostile one does


@pytest.mark.parametrize(("code", "native"), [("b814000000 cd80", False), ("b827000040 0f05", False)])
def test_other_tables_of_calls_are_marked(lab: Guest, code: str, native: bool) -> None:
    """int 0x80, and x32's numbers."""
    kinds, detail = ends(lab, code)
    assert kinds == [0] and detail[1] is native


def test_the_vsyscall_page_is_a_trap(lab: Guest) -> None:
    kinds, _ = ends(lab, "4831ff 48b8000460ffffffffff ffd0")
    assert kinds[0] in (0, 1, 2)  # a call (time) where the host emulates the page, a fault where it has none


@pytest.mark.parametrize(
    ("number", "arguments"),
    [
        (9, (0x600000, 4096, 7, 0x32, -1, 0)), (10, (0x7FFC000000, 4096, 7)), (11, (0x7FFC001000, 4096)),
        (25, (0x500000, 4096, 8192, 1)), (28, (0x500000, 4096, 4)), (216, (0x500000, 4096, 0, 1, 0)), (56, (0x11,)),
        (57, ()), (435, (0x500000, 88)), (59, (0x500000, 0, 0)), (62, (-1, 9)), (234, (1, 1, 9)), (101, (16, 1)),
        (310, (1, 0x500000, 1, 0x500000, 1, 0)), (13, (11, 0x500000, 0, 8)), (14, (0, 0x500000, 0, 8)),
        (131, (0x500000, 0)), (157, (4, 1)), (158, (0x1002, 0)), (1, (12, 0x500000, 1)), (0, (12, 0x500000, 1)),
        (32, (12,)), (3, (12,)), (41, (1, 1, 0)), (202, (0x7FFC020000, 3, 1, 1, 0x7FFC020004)),
        (202, (0x7FFC020000, 4, 1, 1, 0x500000, 0)), (202, (0x500000, 0, 0, 0)), (202, (0x7FFC020000, 0, 1, 0)),
        (202, (0x7FFC020000, 1, 2, 0)), (202, (0x7FFC020000, 0, 0, 0x500000)), (202, (0x7FFC020000, 9, 0, 0)),
        (449, (0x500000, 1)), (44, (12, 0x500000, 41, 0x4000, 0, 0)), (44, (12, 0x500000, 40, 0x4000, 0x500000, 8)),
        (44, (3, 0x500000, 40, 0x4000, 0, 0)), (45, (12, 0x500000, 16, 2, 0, 0)), (317, (1, 0, 0x500000)),
        (425, (8, 0x500000)), (323, (0,)), (298, (0x500000, 0, -1, -1, 0)), (424, (0, 9, 0, 0)), (24, ()), (186, ()),
        (39, ()),
    ],
)  # fmt: skip
def test_the_gates_own_calls_with_any_arguments(lab: Guest, number: int, arguments: tuple[int, ...]) -> None:
    """A jump to each system-call instruction of the gate page: at worst that program is dead."""
    words = [word & (1 << 64) - 1 for word in (*arguments, *(0,) * 6)][:6]
    page = gate_page()
    places = [at for at in range(len(page) - 1) if page[at : at + 2] == b"\x0f\x05"]
    ended = lab.do(f"""
        p = Program("0f05")
        r = p.user.registers
        r[14], r[13], r[12], r[7], r[9], r[8] = {words}
        r[10], r[16] = {number}, {USER_GATE + places[number % len(places)]}
        kind = p.run(3_000_000_000)
        p.end()
        q = Program("{GETPID}")
        other = [q.run(), q.user.number]
        q.end()
        return kind, other
    """)
    assert ended == [5, [0, 39]]


def test_a_gate_that_allows_everything_is_seen() -> None:
    """The same jump, with the filter's last word changed: the program has new memory, and lives."""
    with machine(seed="gates_allow_all") as host:
        guest = host.guest("lab", memory=8)
        guest.do(LAB)
        at = USER_GATE + gate_page().index(bytes.fromhex("b80f000000 0f05")) + 5
        kind = guest.do(f"""
            p = Program("0f05")
            r = p.user.registers
            r[14], r[13], r[12], r[7], r[9], r[8], r[10], r[16] = 0x600000, 4096, 7, 0x32, (1 << 64) - 1, 0, 9, {at}
            kind = p.run(300_000_000)
            p.end()
            return kind
        """)
        assert kind != 5
        guest.destroy()


def gate_page() -> bytes:
    page = ffi.new("char[4096]")
    assert lib.stub_code(page) >= 0
    return bytes(ffi.buffer(page))


def test_a_program_that_blocks_every_signal_is_given_up(lab: Guest) -> None:
    """rt_sigreturn into a frame of its own: all blocked, an endless loop. Its kernel gets the CPU back and ends it."""
    out = lab.do(
        """
        import struct, time
        p = Program("8a07 0f05 ebfe")  # mov (%rdi), %al: the frame's page is there; syscall; jmp .
        context = bytearray(304)
        struct.pack_into("<Q", context, 0, 6)
        struct.pack_into("<QQQ", context, 160, 0x501000, 0x400004, 0x202)
        struct.pack_into("<HHHH", context, 184, 0x33, 0, 0, 0x2B)
        struct.pack_into("<Q", context, 296, (1 << 64) - 1)
        memory.write(p.data.address + 256, context)
        p.user.registers[14] = 0x500000
        assert p.run() == user.SYSCALL
        p.user.registers[19], p.user.registers[16] = 0x500000 + 256, SIGRETURN
        begin = time.monotonic()
        kind = p.run(10_000_000)
        took = time.monotonic() - begin
        p.end()
        q = Program("ebfe")
        kind2 = q.run(10_000_000)
        q.end()
        return kind, kind2, took
    """.replace("SIGRETURN", str(USER_GATE + gate_page().index(bytes.fromhex("b80f000000 0f05"))))
    )
    assert out[:2] == [5, 3] and 0.05 < out[2] < 5


@pytest.mark.parametrize("what", ["frame", "turn", "all", "stack"])
def test_a_rewritten_cell_hurts_its_program_alone(lab: Guest, what: str) -> None:
    code = {
        "frame": "48b82800 02fc7f000000 48c70000000000 b827000000 0f05 ebf7",  # the word `frame` before every call
        "turn": "48b80000 02fc7f000000 c70002000000 0f05 ebfe",  # turn = 2, then a call
        "all": "48bf0000 02fc7f000000 b900800000 b0ff f3aa 0f05 ebfe",  # all of the region, then a call
        "stack": "48bc0040 02fc7f000000 0f05 ebfe",  # its stack is in the region
    }[what]
    kinds, _ = ends(lab, code, runs=2, ns=100_000_000)
    assert set(kinds) <= {0, 3, 5}


def test_its_processes_may_be_killed_at_any_time(host: Machine, lab: Guest) -> None:
    """The application's process or its monitor: the space is dead, the kernel is told, and its frames are free again."""
    before = set(host.ask("ledger")["processes"])
    lab.do(f'global p\np = Program("{GETPID}")\nreturn p.run()')
    mine = sorted(set(host.ask("ledger")["processes"]) - before)
    assert len(mine) == 2
    for victim in (0, 1):
        os.kill(mine[victim], signal.SIGKILL)
        kinds = lab.do("kinds = [p.run() for _ in range(3)]\np.end()\nreturn kinds")
        assert kinds[-1] == 5
        if victim == 0:
            lab.do(f'global p\np = Program("{GETPID}")\nreturn p.run()')
            mine = sorted(set(host.ask("ledger")["processes"]) - before)
            assert len(mine) == 2


def test_a_domain_that_dies_takes_its_programs_along(host: Machine, lab: Guest) -> None:
    lab.do(f'global keep\nkeep = [Program("{GETPID}") for _ in range(5)]\nfor p in keep: p.run()')
    assert lab.row()["state"] != "dead"
    lab.destroy()


def test_a_program_that_is_born_while_its_domain_is_paused_waits_too(host: Machine, lab: Guest) -> None:
    """Its zygote is held up until the pause. Its kernel has given it the turn before, and so could whoever shares the cell."""
    processes = [psutil.Process(pid) for pid in host.ask("ledger")["processes"]]
    spaces = next(process for process in processes if process.cmdline() == ["ring1/spaces"])
    before = host.ask("ledger")["descriptors"]
    spaces.suspend()
    try:
        lab.begin(f'global p\np = Program("{GETPID}")\nreturn p.run(), p.user.number')
        assert until(lambda: host.ask("ledger")["descriptors"] > before), "it has asked"
        host.ask("pause", name=lab.name)
    finally:
        spaces.resume()
    assert until(lambda: len(host.ask("ledger")["processes"]) == len(processes) + 2)
    born = [psutil.Process(pid) for pid in host.ask("ledger")["processes"] if pid not in {p.pid for p in processes}]
    assert until(lambda: any(process.status() == psutil.STATUS_STOPPED for process in born))
    host.ask("unpause", name=lab.name)
    assert lab.answer() == [0, 39]
    lab.do("p.end()")
