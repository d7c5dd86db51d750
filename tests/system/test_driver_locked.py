"""A driver domain taken over by hostile native code: it reaches the frames granted to it and its own image, nothing else.

The driver is a puppet (seeds.puppet_driver): what it is told to do is what code in blkback or netback could do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dom0.programs import escape
from hypervisor.gate.policy import CAPABILITIES
from tests.system.machine import PAGE_FAULT, Guest, Machine

EPERM, EBADF, EFAULT = 1, 9, 14
PREADV2, PWRITEV2, RECVMSG, FALLOCATE, FDATASYNC = 327, 328, 47, 285, 75
IMAGE = 3  # the lowest number that is free when it comes
CONTENT = b"what is on the disk" * 1000
DENIED, BAD_DOMAIN = -8, -2  # grant statuses
SURVIVED = [attempt for attempt in escape.attempts() if isinstance(attempt.verdict, int)]
DEADLY = [attempt for attempt in escape.attempts() if isinstance(attempt.verdict, str)]


@pytest.fixture(scope="module")
def host() -> Iterator[Machine]:
    host = Machine(seed="puppet_driver")
    host.disk("image", content=CONTENT)
    yield host
    host.close()


def take_over(host: Machine, unfiltered: bool = False) -> Guest:
    """A driver domain in our hands, with its image's descriptor in `image`."""
    host.ask("driver", name="hostile", image=str(host.work / "image"), unfiltered=unfiltered)
    driver = Guest(host, "hostile")
    driver.do("""
        global image, room, iovec
        import socket
        ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, layout.FD_DESCRIPTORS)
        _, (image,), _, _ = socket.recv_fds(ours, 16, 1)
        ours.detach()
        room = kernel.memory.alloc(2)
        def iovec(at, length):
            memory.write(room.address, at.to_bytes(8, "little") + length.to_bytes(8, "little"))
            return room.address
    """)
    return driver


@pytest.fixture
def driver(host: Machine) -> Iterator[Guest]:
    driver = take_over(host)
    yield driver
    if driver.row()["state"] != "dead":
        driver.destroy()


@pytest.fixture
def victim(host: Machine) -> Iterator[Guest]:
    guest = host.guest("victim")
    yield guest
    guest.destroy()


def attempt_all(driver: Guest) -> dict[str, int]:
    """What each attempt that a domain survives came to."""
    results = driver.do("""
        from dom0.programs import escape
        return {a.name: escape.perform(a) for a in escape.attempts() if isinstance(a.verdict, int)}
    """)
    assert isinstance(results, dict)
    return results


# ---- the attempts of doctor


def test_no_attempt_succeeds(driver: Guest) -> None:
    """But fallocate, which a driver domain lives by: it fails on a queue, as it would for anybody."""
    results = attempt_all(driver)
    assert results.pop("allocate in a file") < 0
    assert results == {attempt.name: -int(attempt.verdict) for attempt in SURVIVED if attempt.name != "allocate in a file"}


@pytest.mark.parametrize("name", [attempt.name for attempt in DEADLY])
def test_what_only_an_attack_would_do_ends_it(driver: Guest, name: str) -> None:
    verdict = next(attempt.verdict for attempt in DEADLY if attempt.name == name)
    end = driver.dies(f"""
        from dom0.programs import escape
        escape.perform(next(a for a in escape.attempts() if a.name == {name!r}))
    """)
    assert end.startswith(str(verdict))


def test_without_the_filter_it_would_get_out(host: Machine) -> None:
    """The seeded hole: a driver domain that was not locked opens files and makes sockets."""
    driver = take_over(host, unfiltered=True)
    assert driver.do("""
        path = ffi.new("char[]", b"/etc/passwd")
        return [raw(257, -100, address(path), 0, 0, 0, 0) > 0, raw(41, 1, 1, 0, 0, 0, 0) > 0]
    """) == [True, True]
    assert not host.row("hostile")["isolated"], "and the list says so"
    driver.destroy()


# ---- descriptors


def test_its_descriptors_are_nine(host: Machine, driver: Guest) -> None:
    """Three that are /dev/null, its image, two queues, the upcall, dom0's socket, the one of page faults."""
    assert driver.do("return [fd for fd in range(1024) if raw(72, fd, 1, 0, 0, 0, 0) >= 0]") == [0, 1, 2, IMAGE, *range(8, 13)]
    if os.getuid() == 0:
        for name, images in (("hostile", {IMAGE: str(host.work / "image")}), ("blkback", {}), ("netback", {})):
            fds = Path(f"/proc/{host.row(name)['pid']}/fd")
            places = {int(fd.name): os.readlink(fd) for fd in fds.iterdir()}
            assert places == {**dict.fromkeys(range(3), "/dev/null"), **images, **{fd: places[fd] for fd in range(8, 13)}}
            assert [places[fd].split(":")[0].split("/")[0] for fd in (10, 11, 12)] == ["anon_inode", "socket", "socket"]


def test_its_image_is_its_own_to_read_and_no_more(host: Machine, driver: Guest) -> None:
    read = driver.do(
        f"return [raw({PREADV2}, image, iovec(room.address + 4096, 4096), 1, 0, 0, 0), memory.read(room.address + 4096, 4096)]"
    )
    assert read == [4096, CONTENT[:4096].hex()]
    assert driver.do(f"""
        return [
            raw({PWRITEV2}, image, iovec(room.address, 64), 1, 0, 0, 0), raw({FALLOCATE}, image, 3, 0, 4096, 0, 0),
            raw(1, image, room.address, 64, 0, 0, 0), raw(9, 0, 4096, 1, 2, image, 0), raw(77, image, 0, 0, 0, 0, 0),
            raw(72, image, 0, 50, 0, 0, 0), raw(33, image, 50, 0, 0, 0, 0),
        ]
    """) == [-EBADF, -EBADF, -EBADF, -EPERM, -EPERM, -EPERM, -EPERM]
    assert host.holds("image", 0, CONTENT)


def test_no_descriptor_comes_or_goes_any_other_way(driver: Guest) -> None:
    """It receives from dom0's socket alone, and sends none: what it was given stays with it."""
    assert (
        driver.do(f"""
        memory.zero(room.address, 64)
        return [
            *(raw({RECVMSG}, fd, room.address, 0x40, 0, 0, 0) for fd in (0, 1, 8, 9, 10, image, -1)),
            raw(46, layout.FD_DESCRIPTORS, room.address, 0, 0, 0, 0), raw(44, layout.FD_DESCRIPTORS, room.address, 8, 0, 0, 0),
            raw(45, layout.FD_DESCRIPTORS, room.address, 8, 0x40, 0, 0), raw(288, layout.FD_DESCRIPTORS, 0, 0, 0, 0, 0),
            raw(50, layout.FD_DESCRIPTORS, 1, 0, 0, 0, 0), raw(42, layout.FD_DESCRIPTORS, room.address, 16, 0, 0, 0),
        ]
    """)
        == [-EPERM] * 13
    )


def test_what_it_writes_to_dom0_is_not_read(host: Machine, driver: Guest) -> None:
    """The socket that its image came over carries nothing back: its fill is its own to wait for."""
    assert driver.do("return raw(1, layout.FD_DESCRIPTORS, room.address, 64, 0, 0, 0)") == 64
    assert host.ask("ledger")


# ---- memory


def test_the_image_is_read_into_its_own_frames_alone(driver: Guest) -> None:
    """The kernel refuses every other place of the window, on its behalf too."""
    places = [
        "WINDOW + layout.MONITOR_CODE", "WINDOW + layout.COMMANDS", "WINDOW + layout.GRANT_BASE", "WINDOW",
        "WINDOW + layout.virt(kernel.start.nr_pages)", "WINDOW + layout.SPACE_BYTES - (1 << 25)",
    ]  # fmt: skip
    for place in places:
        assert driver.do(f"return raw({PREADV2}, image, iovec({place}, 4096), 1, 0, 0, 0)") == -EFAULT, place


def test_frames_of_others_are_not_to_be_had(host: Machine, driver: Guest, victim: Guest) -> None:
    others = [0, host.row("blkback")["domid"], host.row("netback")["domid"], victim.domid]
    assert driver.do(f"""
        out = set()
        for domid in {others}:
            entries = b"".join(grant.MAP_REF.pack(layout.GRANT_BASE, 2 | i % 2 * 4, i // 2, domid, 0, 0, 0) for i in range(128))
            memory.write(room.address, entries)
            out.add(kernel.call(grant.GrantMap(room.va, 128)))
            out |= {{entry[4] for entry in grant.MAP_REF.iter_unpack(memory.read(room.address, 4096))}}
        return sorted(out)
    """) == [DENIED, 0], "none of 128 was mapped, each for want of permission"
    assert driver.do(f"""
        return [status(kernel.call, call) for call in (
            domctl.MapForeign({victim.domid}, 0, 1, layout.GRANT_BASE), domctl.DestroyDomain({victim.domid}),
            domctl.CreateDomain("another", 64, 0, 0, ""), sysctl.ReadConsole(room.va, 4096), sysctl.Ledger(room.va, 4096),
            evtchn.AllocUnbound({victim.domid}, kernel.domid), evtchn.BindInterdomain({victim.domid}, 1),
        )]
    """) == ["NotPermitted"] * 6 + ["Invalid"]


@pytest.mark.parametrize(
    ("act", "end"),
    [
        ("memory.read(ADDRESS, 6); memory.write(ADDRESS + 4096, b'x')", None),  # the writable one
        ("memory.write(ADDRESS, b'x')", PAGE_FAULT),  # the one for reading
        ("memory.read(ADDRESS - 1, 1)", PAGE_FAULT),
        ("memory.read(ADDRESS + 8192, 1)", PAGE_FAULT),
    ],
)
def test_of_a_guest_it_has_what_was_granted(driver: Guest, victim: Guest, act: str, end: re.Pattern[str] | None) -> None:
    refs = victim.do(f"""
        pages = kernel.memory.alloc(4)
        memory.write(pages.address + 4096, b"secret" * 2000)
        give = kernel.grants.give
        return [give({driver.domid}, pages.pfn + 1, readonly=True), give({driver.domid}, pages.pfn + 2)]
    """)
    driver.do(f"""
        entries = b"".join(
            grant.MAP_REF.pack(layout.GRANT_BASE + (8 + i) * 4096, flags, ref, {victim.domid}, 0, 0, 0)
            for i, (ref, flags) in enumerate(zip({refs}, (6, 2)))
        )
        memory.write(room.address, entries)
        assert kernel.call(grant.GrantMap(room.va, 2)) == 2
    """)
    code = act.replace("ADDRESS", "(WINDOW + layout.GRANT_BASE + 8 * 4096)")
    if end:
        assert end.fullmatch(driver.dies(code))
    else:
        assert driver.do(f"{code}; return 1") == 1
        driver.destroy()
    assert victim.do("return 2") == 2


# ---- processes


def test_it_signals_nobody(host: Machine, driver: Guest, victim: Guest) -> None:
    pids = [host.pid, *host.ask("ledger")["processes"], 1]
    own = host.row("hostile")["pid"]
    for call in ("raw(62, pid, 0, 0, 0, 0, 0)", "raw(62, pid, 9, 0, 0, 0, 0)", "raw(234, pid, pid, 9, 0, 0, 0)"):
        assert driver.do(f"return [{call} for pid in {[*(pid for pid in pids if pid != own), -1, 0]}]") == [-EPERM] * (
            len(pids) + 1
        )
    assert victim.do("return 3") == 3


def test_every_locked_process_is_held_by_what_start_up_said(host: Machine, driver: Guest, victim: Guest) -> None:
    """Filter on, no new privileges, no capability; as root a uid of its own. Monitors too."""
    facts, outer = host.ask("host"), int(held(os.getpid())["Seccomp_filters"])
    for name in ("blkback", "netback", "hostile", "victim"):
        info = host.ask("info", name=name)
        for pid in (info["pid"], info["monitor_pid"]):
            status = held(pid)
            assert (int(status["Seccomp_filters"]), status["NoNewPrivs"]) == (outer + 1, "1"), (name, pid)
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapInh"], 16) == 0
            assert int(status["CapBnd"], 16) & ~CAPABILITIES == 0 or os.getuid() != 0
            uids = {str(900_000 + info["domid"]) if facts["own_uids"] else str(os.getuid())}
            assert set(status["Uid"].split()) == uids
    assert int(held(host.row("dom0")["pid"])["Seccomp_filters"]) == outer, "and the one that is not locked is told apart"


def held(pid: int) -> dict[str, Any]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
