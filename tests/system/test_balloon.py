"""Memory that moves: domains shrink and grow, the machine's frames are counted, and the maximum holds whatever a guest does."""

from __future__ import annotations

from typing import Any

import pytest

from dom0.client import HostError
from domain.balloon import KEEP_FREE
from tests.system.machine import Guest, Machine, machine, until
from tests.system.test_cli import answer, refusal, ring1

FILL = """
    pages = kernel.memory.alloc(100)
    def number(pfn): return pfn.to_bytes(4, 'little') * 1024
    for pfn in pages.pfns:
        memory.write(WINDOW + layout.virt(pfn), number(pfn))
    global intact
    def intact(): return all(memory.read(WINDOW + layout.virt(pfn), 4096) == number(pfn) for pfn in pages.pfns)
"""
TOUCH_ALL = """
    runs = list(kernel.memory._free.runs)
    for pfn, count in runs:
        memory.write(WINDOW + layout.virt(pfn), bytes([170]) * 4096 * count)
    return sum(count for _, count in runs)
"""
DIRT = """
    return sum(any(memory.read(WINDOW + layout.virt(pfn + i), 4096)) for pfn, n in kernel.memory._free.runs for i in range(n))
"""
GRAB = """
    from hypervisor.public.memory import CurrentReservation, IncreaseReservation, PopulatePhysmap
    scratch, got = kernel.memory.alloc(1), []
    for kind in (PopulatePhysmap, IncreaseReservation):
        for order in (9, 3, 0):
            while n := kernel.call(kind(scratch.va, 1 if order else 512, order)):
                got.append(n << order)
    kernel.memory.free(scratch)
    return sum(got), kernel.call(CurrentReservation(types.DOMID_SELF))
"""


def free(host: Machine) -> int:
    """Frames of the machine that nobody owns."""
    frames: int = host.ask("host")["frames_free"]
    return frames


def owned(guest: Guest) -> int:
    """Frames."""
    kib: int = guest.row()["memory_kib"]
    return kib // 4


def settle(guest: Guest, kib: int) -> dict[str, Any]:
    """A target, and what its driver makes of it, once it stopped."""
    guest.machine.ask("mem-set", name=guest.name, kib=kib)

    def stopped() -> dict[str, Any]:
        facts: dict[str, Any] = guest.machine.ask("memory", name=guest.name)
        return facts if facts["stopped_kib"] == facts["memory_kib"] == kib else {}

    facts = until(stopped)
    assert facts, guest.machine.ask("memory", name=guest.name)
    return facts


# ---- to and fro


def test_a_domain_shrinks_and_grows_and_keeps_what_it_uses(host: Machine) -> None:
    guest = host.guest("alice", memory=4, maxmem=10)
    home, before = f"/local/domain/{guest.domid}", free(host)
    assert [host.ask("store-read", path=f"{home}/memory/{key}") for key in ("static-max", "target", "current")] == [
        "10240", "4096", "4096",
    ]  # fmt: skip
    assert until(lambda: host.ask("store-read", path=f"{home}/control/feature-balloon")) == "1"
    guest.do(FILL)
    for mib in (2, 10, 1, 7, 4):
        assert settle(guest, mib << 10)["memory_kib"] == mib << 10
        assert free(host) == before + (4 - mib) * 256
        assert guest.do("return intact(), kernel.memory.nr_pages") == [True, mib * 256]
    settle(guest, 10240)
    guest.do("big = kernel.memory.alloc(2000); memory.write(big.address, b'x' * 8192000); kernel.memory.free(big)")
    assert guest.do("return intact()")
    guest.destroy()
    assert free(host) == before + 4 * 256


def test_memory_goes_from_one_to_the_other_and_arrives_clean(host: Machine) -> None:
    """Nothing is free but what alice gives back, so bob gets every page that she wrote."""
    alice, bob = host.guest("alice", memory=6), host.guest("bob", memory=1, maxmem=24)
    written = alice.do(TOUCH_ALL)
    host.ask("mem-set", name="bob", kib=24 << 10)
    assert until(lambda: free(host) == 0), "the machine is empty, and bob waits"
    settle(alice, 1 << 10)
    assert until(lambda: free(host) == 0), "bob, who asks again, has it all"
    assert owned(alice) == 256 and written > 5 * 256
    assert bob.do(DIRT) == 0
    alice.destroy()
    bob.destroy()


def test_dirty_frames_are_found_out() -> None:
    """Seed: nothing is scrubbed."""
    with machine(seed="nothing_is_scrubbed") as host, pytest.raises(AssertionError, match=r"assert \d+ == 0"):
        test_memory_goes_from_one_to_the_other_and_arrives_clean(host)


def test_below_what_is_in_use_it_goes_as_far_as_it_can_and_on_when_pages_are_freed(host: Machine) -> None:
    guest = host.guest("alice", memory=4)
    guest.do("global held; held = [kernel.memory.alloc(50) for _ in range(6)]")
    host.ask("mem-set", name="alice", kib=64)
    assert until(lambda: guest.do("return kernel.memory.nr_free") == KEEP_FREE)
    used = owned(guest)
    assert 300 < used < 400 and free(host) > 0
    said = f"/local/domain/{guest.domid}/memory/current"
    assert until(lambda: host.ask("store-read", path=said) == str(used * 4))
    for i in range(1, 7):
        guest.do("kernel.memory.free(held.pop())")
        assert until(lambda: owned(guest) == used - 50 * i)  # noqa: B023 - called at once
    guest.do(f"kernel.memory.free(kernel.memory.alloc({KEEP_FREE}))")
    guest.destroy()


def test_a_target_above_the_maximum(host: Machine) -> None:
    """Refused; and where it stands in the store all the same, the guest comes to its maximum and lives on."""
    guest = host.guest("alice", memory=2, maxmem=5)
    with pytest.raises(HostError, match=r"alice may own at most 5120 KiB, 6144 KiB were asked for; create alice again"):
        host.ask("mem-set", name="alice", kib=6144)
    host.ask("mem-max", name="alice", kib=3072)
    with pytest.raises(HostError, match=r"alice may own at most 3072 KiB, 4096 KiB were asked for; first `ring1 mem-max"):
        host.ask("mem-set", name="alice", kib=4096)
    target = f"/local/domain/{guest.domid}/memory/target"
    host.ask("store-write", path=target, value=str(1 << 30))
    assert until(lambda: owned(guest) == 768)
    host.ask("mem-max", name="alice", kib=5120)
    host.ask("store-write", path=target, value=str(1 << 30))
    assert until(lambda: owned(guest) == 1280)
    for nonsense in ("", "-1", "much", "9" * 40):
        host.ask("store-write", path=target, value=nonsense)
    assert guest.do("return kernel.memory.nr_pages") == 1280
    settle(guest, 2048)
    guest.destroy()


@pytest.mark.parametrize("moment", range(4))
def test_killed_in_the_middle(host: Machine, moment: int) -> None:
    """Its frames are all back (`balanced`)."""
    guest = host.guest("alice", memory=2, maxmem=12)
    host.ask("mem-set", name="alice", kib=12 << 10)
    assert until(lambda: owned(guest) > 512 * (moment + 1))
    guest.destroy()


# ---- who does not obey


def test_a_guest_that_gives_nothing_back(host: Machine) -> None:
    """It keeps what it has, says what it likes, and the wait is not deceived; others are resized as ever."""
    eve, bob = host.guest("eve", memory=4), host.guest("bob", memory=4)
    eve.do("kernel.memory.release = lambda nr: 0")
    assert refusal(host, "mem-set", "eve", "2", "--wait", "--timeout", "0.2") == (
        "eve owns 4096 KiB, not 2048, after 0.2 s: the rest is in use there; it gives more when pages are freed, or ask for "
        "less of it"
    )
    eve.do("await kernel.store.write('memory/current', 2048)")
    assert "eve owns 4096 KiB, not 2048" in refusal(host, "mem-set", "eve", "2", "-w", "--timeout", "0.2")
    eve.do("await kernel.store.write('memory/current', 'x' * 2000)")
    assert "eve owns 4096 KiB, not 2048" in refusal(host, "mem-set", "eve", "2", "-w", "--timeout", "0.2")
    assert answer(host, "mem-set", "eve", "2")["stopped_kib"] == -1
    eve.do("await kernel.store.write('control/feature-balloon', 0)")
    assert "says nothing of a balloon driver" in refusal(host, "mem-set", "eve", "2", "-w", "--timeout", "0.2")
    for key in ("target", "static-max", "new"):
        assert eve.do(f"try: await kernel.store.write('memory/{key}', 1)\nexcept Exception as e: return e.name") == "EACCES"
    settle(bob, 2048)
    eve.destroy()
    bob.destroy()


def enforced(host: Machine) -> None:
    """alice asks for frames by herself, in every way that there is; never has she more than her maximum."""
    alice = host.guest("alice", memory=2, maxmem=8)
    alice.do("kernel.memory.release = lambda nr: 0")  # nor does she give anything back
    try:
        host.ask("mem-max", name="alice", kib=3072)
        assert alice.do(GRAB) == [256, 768]
        host.ask("mem-max", name="alice", kib=4096)
        assert alice.do(GRAB) == [256, 1024]
        assert owned(alice) == 1024 and alice.row()["maxmem_kib"] == 4096
        with pytest.raises(
            HostError, match="alice owns 4096 KiB, which nobody takes from it; first `ring1 mem-set alice 2048k"
        ):
            host.ask("mem-max", name="alice", kib=2048)
        assert alice.do(GRAB) == [0, 1024]
    finally:
        alice.destroy()


def test_the_maximum_holds_against_a_guest_that_asks_by_itself(host: Machine) -> None:
    enforced(host)


def test_a_hypervisor_that_does_not_ask_for_the_maximum_is_found_out() -> None:
    with machine(seed="the_maximum_is_not_asked") as host, pytest.raises(AssertionError, match=r"== \[256, 768\]"):
        enforced(host)


def test_a_lower_maximum_takes_the_target_with_it(host: Machine) -> None:
    """One that was not reached yet."""
    guest = host.guest("alice", memory=2, maxmem=8)
    guest.do("kernel.memory.obtain = lambda nr: 0")
    assert host.ask("mem-set", name="alice", kib=8192)["target_kib"] == 8192
    assert host.ask("mem-max", name="alice", kib=3074)["target_kib"] == 3072
    guest.destroy()


# ---- words


def test_mem_set_and_mem_max_as_commands(host: Machine) -> None:
    guest = host.guest("alice", memory=4, maxmem=8)
    done = ring1(host, "mem-set", "alice", "3m")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "it asks and returns"
    facts = answer(host, "mem-set", str(guest.domid), "6144k", "--wait")
    assert facts == {
        "name": "alice", "domid": guest.domid, "state": "running", "memory_kib": 6144, "target_kib": 6144, "maxmem_kib": 8192,
        "static_max_kib": 8192, "stopped_kib": facts["stopped_kib"], "balloon": True,
    }  # fmt: skip
    assert answer(host, "mem-max", "alice", "7")["maxmem_kib"] == 7168
    assert answer(host, "mem-set", "alice", "2097153b", "--wait")["memory_kib"] == 2048, "whole pages"
    info = answer(host, "info", "alice")
    assert [info[key] for key in ("memory_kib", "maxmem_kib", "target_kib", "static_max_kib")] == [2048, 7168, 2048, 8192]
    facts = answer(host, "info")
    assert facts["memory_free_kib"] == 4 * facts["frames_free"] and facts["memory_kib"] == 32768
    rows = {row["name"]: row for row in answer(host, "top", "--once")["rows"]}
    assert (rows["alice"]["memory_kib"], rows["alice"]["maxmem_kib"]) == (2048, 7168)
    assert "2.0/7.0" in ring1(host, "top", "--once").stdout
    ring1(host, "pause", "alice")
    assert refusal(host, "mem-set", "alice", "3", "-w", "--timeout", "0").endswith("it is paused; `ring1 unpause alice`")
    ring1(host, "unpause", "alice")
    guest.destroy()


def test_what_mem_set_and_mem_max_refuse(host: Machine) -> None:
    guest = host.guest("alice", memory=2, maxmem=4)
    for word in ("mem-set", "mem-max"):
        assert refusal(host, word, "nobody", "3", code=4).startswith("no domain nobody")
        assert "dom0 keeps the memory it has from the start" in refusal(host, word, "dom0", "3")
        assert "netback is a driver domain" in refusal(host, word, "netback", "3")
        for size in ("", "x", "1.5", "3q", "0", "4095b", "99999t", "\u0664"):
            assert "is no size" in refusal(host, word, "alice", size, code=2), size
    assert refusal(host, "mem-max", "alice", "5") == (
        "alice has page tables for 4096 KiB, 5120 KiB were asked for; create alice again with a greater `maxmem` in its "
        "configuration"
    )
    guest.destroy()
    assert "maxmem: 1 MiB, and it starts with memory = 2" in refusal(
        host, "create", write(host, "memory = 2\nmaxmem = 1"), code=2
    )
    assert "the whole machine has 8192; lower `maxmem`" in refusal(host, "create", write(host, "memory = 2\nmaxmem = 64"))


def write(host: Machine, text: str) -> Any:
    path = host.work / "domain.toml"
    path.write_text(f'name = "x"\nkernel = "{host.program("async def main(kernel): pass")}"\n{text}\n')
    return path


def test_run_has_the_option_too(host: Machine) -> None:
    program = host.program("""
        async def main(kernel):
            print(kernel.start.nr_pages, kernel.start.max_pages, await kernel.store.read("memory/static-max"))
    """)
    assert ring1(host, "run", program, "--memory", "2", "--maxmem", "3").stdout == "512 768 3072\n"
    assert ring1(host, "run", program, "--memory", "2").stdout == "512 512 2048\n"


def test_the_shell_completes_names(host: Machine) -> None:
    guest = host.guest("alice")
    for words, completed in (
        ("mem-set ", {"alice", "blkback", "netback", "dom0"}),
        ("mem-max a", {"alice"}),
        ("pause x", set()),
    ):
        environment = {"_RING1_COMPLETE": "complete_bash", "COMP_WORDS": f"ring1 {words}", "COMP_CWORD": "2"}
        assert set(ring1(host, environment=environment).stdout.split()) == completed
    guest.destroy()
