"""Hostile guests: whatever native code in a locked domain calls or stores costs the others nothing.

`eve` attacks. `bob` computes checksums and makes hypercalls all the while; after every test he has gone on and was never
given a wrong answer (conftest.py). What only ends eve, ends her with a reason. Each kind of attack has its seeded defect,
after it, under which the same question is answered otherwise.
"""

from __future__ import annotations

import struct

import msgpack
import pytest

from hypervisor.public import domctl, sysctl  # noqa: F401 - they declare the calls that ALL has
from hypervisor.public.hypercall import ALL, WITH_CMD
from tests.system.machine import PAGE_FAULT, SEGFAULT, Guest, Machine, machine, until

pytestmark = pytest.mark.usefixtures("undisturbed")

EINVAL, EPERM, ENOSYS, EMSGSIZE, ETIMEDOUT = 22, 1, 38, 90, 110


# ---- hypercalls


def test_malformed_messages_are_answered(eve: Guest) -> None:
    messages = [b"", b"\x00", b"junk", b"\xc1", b"\x93\x11", b"\xff" * 256, msgpack.packb([[[[]]]]), msgpack.packb({1: 2})]
    messages += [msgpack.packb(wrong) for wrong in (
        None, 17, [], [17], [17, -1], [-1, 1], [1 << 32, 1], [17, 1 << 40], [True, 1], [1.5, 1, 0], ["17", 1, 0], [17, 1, [0]],
        [17, 1, {}], [17, 1, 0, 0], [17, 1], [17, 1, "0"], [17, 1, True], [15, 1, -1], [15, 1, 1.0], [15, 1, b"1"],
        [15, 1, (1 << 64) - 1, 0], [18, 1, 0, "text"], [18, 1, 0, b"x" * 201], [29, 1, 2, 0, 0, b"why"],
        [29, 1, 2, 77, 0, ""], [32, 1, 4, 1 << 32], [20, 1, 0, -1, 1], [20, 1, 0, 0, 1 << 32],
        [17, 1, msgpack.ExtType(5, b"x")],
    )]  # fmt: skip
    for message in messages:
        reply = eve.do(f"return trap({message!r})")
        assert len(reply) == 2 and reply[1] in (EINVAL, EPERM, ENOSYS), message
    assert eve.do("return trap(b'x' * 257)") == -EMSGSIZE
    assert eve.do("return kernel.call(version.XenPageSize())") == 4096, "and she is still served"


def test_a_hypervisor_that_expects_good_messages_is_found_out() -> None:
    """Seed: a message is unpacked and taken apart. The first bad one ends the hypervisor."""
    with machine(seed="malformed_is_a_bug") as host:
        eve = host.guest("eve")
        assert eve.do("return trap(msgpack.packb([17, 1, 7]))") == [1, 0, 4096]
        with pytest.raises(AssertionError):
            eve.do("return trap(b'junk')")
        assert host.hypervisor.ended()


def test_numbers_that_are_no_call(eve: Guest) -> None:
    for op in (5, 9, 16, 40, 255, (1 << 32) - 1):
        assert eve.do(f"return trap(msgpack.packb([{op}, 3, 0]))") == [3, ENOSYS]
    for op in sorted(WITH_CMD):
        assert eve.do(f"return trap(msgpack.packb([{op}, 3, 9999]))")[1] in (ENOSYS, EPERM)


def test_every_privileged_call_is_refused(eve: Guest) -> None:
    """As a message with arguments that dom0 would have served, with none, and in a list."""
    assert privileged_answers(eve) == {EPERM}
    count = len(privileged())
    answered = eve.do(f"""
        import struct
        page = kernel.memory.alloc(1)
        entries = [struct.pack("<Qq6Q", op, 0, cmd, 3, 0, 0, 0, 0) for op, cmd in {privileged()}]
        memory.write(page.address, b"".join(entries))
        kernel.call(version.Multicall(page.va, {count}))
        return memory.read(page.address, 64 * {count})
    """)
    assert {result for _, result, *_ in struct.iter_unpack("<Qq6Q", bytes.fromhex(answered))} == {-EPERM}


def privileged() -> list[tuple[int, int]]:
    calls = [number for number, kind in ALL.items() if kind.PRIVILEGED]
    assert len(calls) > 10
    return calls


def privileged_answers(guest: Guest) -> set[int]:
    """What she is told: without arguments, and where they are domids and addresses, with good ones."""
    answers = set()
    for op, cmd in privileged():
        for arguments in ([], [0] * len(ALL[op, cmd].FIELDS)):
            answers.add(guest.do(f"return trap(msgpack.packb({[op, 4, cmd, *arguments]}))")[1])
    return answers


def test_a_hypervisor_that_takes_her_for_dom0_is_found_out() -> None:
    """Seed: no call is privileged."""
    with machine(seed="nothing_is_privileged") as host:
        eve, bob = host.guest("eve"), host.guest("bob")
        assert eve.do(f"return status(kernel.call, domctl.PauseDomain({bob.domid}))") == ""
        assert privileged_answers(eve) != {EPERM}


def test_lists_of_calls(eve: Guest) -> None:
    eve.do("global page; page = kernel.memory.alloc(2)")
    for address, count, refusal in (
        (0, 1, "BadAddress"), ("page.va + 8192 * 1024", 1, "BadAddress"), ((1 << 64) - 64, 1, "BadAddress"),
        ("layout.COMMANDS", 1, "BadAddress"), ("layout.SHARED_INFO", 1, "BadAddress"), ("layout.GRANT_BASE", 1, "BadAddress"),
        ("layout.VIRT_BASE - 64", 2, "BadAddress"), ("page.va", 1 << 31, "TooBig"), ("page.va", 0, ""),
    ):  # fmt: skip
        assert eve.do(f"return status(kernel.call, version.Multicall({address}, {count}))") == refusal, (address, count)
    nested = struct.pack("<Qq6Q", 13, 0, 0x100000, 1, 0, 0, 0, 0) + struct.pack("<Qq6Q", 17, 0, 7, 0, 0, 0, 0, 1)
    eve.do(f"memory.write(page.address, {nested!r}); kernel.call(version.Multicall(page.va, 2))")
    answered = bytes.fromhex(eve.do("return memory.read(page.address, 128)"))
    results = [result for _, result, *_ in struct.iter_unpack("<Qq6Q", answered)]
    assert results == [-EINVAL, -EINVAL], "a list within a list, and words that no field has"


def test_a_flood_without_reading_the_replies(eve: Guest, bob: Guest) -> None:
    """Her replies are lost, and only hers: the hypervisor waits for no reader."""
    lost = eve.do("""
        for i in range(5000):
            trap(msgpack.packb([17, i, 0]), replies=0)
        resync()
        return take(wait=False)
    """)
    assert lost == -ETIMEDOUT
    assert eve.do("return kernel.call(version.XenPageSize())") == 4096
    assert bob.do("return kernel.call(version.XenPageSize())") == 4096


def test_a_flood_does_not_starve_the_neighbour(eve: Guest, bob: Guest) -> None:
    eve.begin("""
        end = kernel.now_ns() + 500_000_000
        while kernel.now_ns() < end:
            trap(msgpack.packb([17, 1, 0]), replies=0)
        resync()
    """)
    before = bob.do("return rounds")
    eve.answer()
    assert bob.do("return rounds") - before > 50, "of about 300 in half a second alone"


def test_a_hypervisor_that_waits_for_a_reader_is_found_out() -> None:
    """Seed: its reply queues block. The flood above then stops everybody."""
    with machine(seed="replies_block") as host:
        eve, bob = host.guest("eve"), host.guest("bob")
        eve.begin("for i in range(10): trap(msgpack.packb([17, i, 0]), replies=0)\nwhile True: pass")
        assert until(lambda: not bob.speaks("return kernel.call(version.XenPageSize())", 1.0), 10)
        host.hypervisor.kill()
        assert host.hypervisor.ended()


def test_forged_replies_fool_nobody_else(eve: Guest) -> None:
    """Her queues are hers: she may fill the one she reads from, and read the one she writes to."""
    eve.do("""
        kernel.hypercall.settle()  # both places in the queue are free
        lie = ffi.new("char[]", msgpack.packb([1, 0, 4097]))
        for _ in range(2):
            raw(242, layout.FD_REPLY, address(lie), 6, 0, 0, 0)
        trap(msgpack.packb([17, 9, 0]), replies=0)
        resync()
    """)
    assert eve.do("return kernel.call(version.XenPageSize())") == 4096


def test_a_timer_flood_costs_no_memory(host: Machine, eve: Guest) -> None:
    """Each sets her one timer anew, a little earlier: those before it are cancelled, and not the next to be due."""
    timers = "for i in range(%d): trap(msgpack.packb([15, 1, (1 << 50) - i]))"
    eve.do(timers % 3000)
    before = host.hypervisor.memory()
    eve.do(timers % 12000)
    assert host.hypervisor.memory() - before < 1 << 20


def test_a_hypervisor_that_keeps_cancelled_timers_is_found_out() -> None:
    """Seed: nothing is swept."""
    with machine(seed="timers_stay") as host:
        eve = host.guest("eve")
        timers = "for i in range(%d): trap(msgpack.packb([15, 1, (1 << 50) - i]))"
        eve.do(timers % 3000)
        before = host.hypervisor.memory()
        eve.do(timers % 12000)
        assert host.hypervisor.memory() - before > 1 << 20


# ---- events


def test_ports_that_are_not_hers(host: Machine, eve: Guest, bob: Guest) -> None:
    dom0_ports = range(1, 20)
    assert eve.do(f"""
        out = set()
        for domid in (0, 1, 2, {bob.domid}, 77, 0x7ff0, 0xffff):
            for port in {list(dom0_ports)} + [0, 4095, 4096, 1 << 31]:
                out.add(status(kernel.call, evtchn.BindInterdomain(domid, port)))
        return sorted(out)
    """) == ["Invalid", "NoSuchDomain"]
    assert (
        eve.do(f"""
        return [
            status(kernel.call, evtchn.AllocUnbound(0, kernel.domid)),
            status(kernel.call, evtchn.AllocUnbound({bob.domid}, kernel.domid)),
            status(kernel.call, evtchn.AllocUnbound(types.DOMID_SELF, 77)),
            status(kernel.call, evtchn.EvtchnStatus({bob.domid}, 1)),
            status(kernel.call, evtchn.BindVirq(types.VIRQ_DOM_EXC)),
            status(kernel.call, evtchn.BindVirq(types.VIRQ_CONSOLE)),
            status(kernel.call, evtchn.BindVirq(types.VIRQ_TIMER)),
            status(kernel.call, evtchn.BindVirq(23)),
            *(status(kernel.call, call(port)) for call in (evtchn.EvtchnSend, evtchn.EvtchnClose, evtchn.EvtchnUnmask)
              for port in (0, 900, 1023, 1024, 4096, (1 << 32) - 1)),
        ]
    """)
        == ["NotPermitted"] * 2 + ["NoSuchDomain"] + ["NotPermitted"] * 3 + ["Exists", "Invalid"] + ["Invalid"] * 18
    )
    assert bob.do("return status(kernel.call, evtchn.EvtchnSend(kernel.start.console_evtchn))") == ""


def test_a_hypervisor_that_lets_anybody_bind_is_found_out() -> None:
    """Seed: who a port waits for is not asked."""
    with machine(seed="anybody_may_bind") as host:
        eve, bob = host.guest("eve"), host.guest("bob")
        port = bob.do("return kernel.call(evtchn.AllocUnbound(types.DOMID_SELF, 0))")
        assert eve.do(f"return status(kernel.call, evtchn.BindInterdomain({bob.domid}, {port}))") == ""


def test_ports_run_out_for_her_alone(eve: Guest, bob: Guest) -> None:
    assert (
        eve.do("""
        n = 0
        while not status(kernel.call, evtchn.BindIpi()):
            n += 1
        return n + 3  # her timer, store and console
    """)
        == 1024
    )
    assert bob.do("port = kernel.call(evtchn.BindIpi()); kernel.call(evtchn.EvtchnClose(port)); return 1") == 1


def test_a_storm_of_events_leaves_dom0_time_for_others(host: Machine, eve: Guest, bob: Guest) -> None:
    """To the console and the store, as fast as native calls go; then she closes all of it under dom0's hands."""
    eve.begin("""
        calls = [msgpack.packb([32, 1, 4, port]) for port in (kernel.start.console_evtchn, kernel.start.store_evtchn)]
        for i in range(4000):
            trap(calls[i % 2])
        trap(msgpack.packb([32, 1, 10]))
        while True:
            pass
    """)
    assert all(bob.do("return 1") == 1 for _ in range(100))
    assert host.ask("ledger")
    eve.destroy()


# ---- stores by native code


@pytest.mark.parametrize(
    "place",
    [
        "WINDOW + layout.MONITOR_CODE", "WINDOW + layout.COMMANDS", "WINDOW + layout.COMMANDS + 4096",
        "WINDOW + layout.COMMANDS + 8192", "WINDOW + layout.TRAP_TABLE", "WINDOW + layout.TRAP_TABLE + 4096",
        "WINDOW + layout.M2P", "WINDOW",
        "WINDOW + layout.VIRT_BASE - 1", "WINDOW + layout.virt(kernel.start.max_pages)", "WINDOW + layout.GRANT_BASE",
        "WINDOW + layout.SHARED_INFO - 1", "WINDOW + layout.SPACE_BYTES", "WINDOW + 16 * layout.SPACE_BYTES - 1",
    ],
)  # fmt: skip
def test_a_store_outside_her_frames_ends_her_alone(eve: Guest, place: str) -> None:
    assert PAGE_FAULT.fullmatch(eve.dies(f"memory.write({place}, b'x')"))


@pytest.mark.parametrize("place", ["0", "WINDOW - 1", "WINDOW + 16 * layout.SPACE_BYTES"])
def test_a_store_outside_her_windows_ends_her_alone(eve: Guest, place: str) -> None:
    assert SEGFAULT.fullmatch(eve.dies(f"memory.write({place}, b'x')"))


def test_all_of_her_own_frames_are_hers_to_spoil(host: Machine, eve: Guest) -> None:
    """shared_info, start_info, the rings, the grant table: whatever she writes there, only she is the worse for it."""
    eve.begin("""
        import random
        noise = random.Random(7).randbytes(4096)
        for _ in range(3):
            for pfn in (0, 2, 3, *range(4, 12)):
                memory.write(WINDOW + layout.virt(pfn), noise)
            for port in range(1, 5):
                trap(msgpack.packb([32, 1, 4, port]))
            noise = noise[1:] + noise[:1]
        while True:
            pass
    """)
    assert until(lambda: eve.row()["reason"])
    assert "ring violated" in eve.row()["reason"]
    eve.destroy()


# ---- who reads what she says


def test_what_she_says_never_reaches_a_terminal_raw(host: Machine, eve: Guest) -> None:
    """List, info and log show escapes; only an attached console gets her bytes."""
    evil = "\x1b]0;owned\x07\x9b31m\u202eété\r\n"
    eve.do(f"kernel.call(console.ConsoleWrite({evil.encode()!r})); return 1")
    eve.begin(f"kernel.call(sched.SchedShutdown(3, 1, {evil!r}))")
    reason = eve.wait().reason
    for text in (reason, host.row("eve")["reason"], host.ask("dmesg"), (host.state / "hypervisor.log").read_text()):
        assert text.isascii() and "\x1b" not in text and "\r" not in text and "\\x1b]0;owned" in text
    assert reason == "crash: \\x1b]0;owned\\x07\\xc2\\x9b31m\\xe2\\x80\\xae\\xc3\\xa9t\\xc3\\xa9\\x0d\\x0a"


def test_a_log_that_shows_them_raw_is_found_out() -> None:
    """Seed: nothing is escaped."""
    with machine(seed="nothing_is_escaped") as host:
        eve = host.guest("eve")
        eve.do(r"kernel.call(console.ConsoleWrite(b'\x1b]0;owned'))")
        assert "\x1b]0;owned" in host.ask("dmesg")


def test_a_flood_of_log_lines_hides_nobody(host: Machine, eve: Guest) -> None:
    eve.do("for i in range(3000): kernel.call(console.ConsoleWrite(b'eve' * 60))")
    host.ask("pause", name="eve")
    host.ask("unpause", name="eve")
    log = host.ask("dmesg")
    assert "ring1: 8192 frames" in log and log.count("(eve)") < 150


def test_everything_at_once(host: Machine, bob: Guest) -> None:
    """Six of them, each with another attack, for half a second; then they are destroyed."""
    attacks = [
        "trap(b'junk')",
        "trap(msgpack.packb([17, 1, 0]), replies=0); resync()",
        "kernel.console.write('x' * 499 + chr(10)); await kernel.sleep(0.001)",
        "trap(msgpack.packb([32, 1, 4, 2]))",
        "trap(msgpack.packb([29, 1, 0]))",
        "trap(msgpack.packb([36, 1, 2, 1]))",
    ]
    eves = [host.guest(f"eve{i}", memory=1) for i in range(len(attacks))]
    before = bob.do("return rounds")
    for eve, attack in zip(eves, attacks, strict=True):
        eve.begin(f"""
            end = kernel.now_ns() + 500_000_000
            while kernel.now_ns() < end:
                {attack}
                await kernel.sleep(0)
            return 1
        """)
    for eve in eves:
        assert eve.answer() == 1
        eve.destroy()
    assert bob.do("return rounds") > before
