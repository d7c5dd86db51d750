"""A domain from its creation to its end, by every way there is, and as if it had never been."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from dom0.client import HostError
from dom0.config import DomainConfig, to_tree
from tests.conftest import TIMEOUT
from tests.system.machine import GUESTS, Machine, machine, until

SPIN = "async def main(kernel):\n    while True: pass\n"
RETURN_7 = "async def main(kernel):\n    return 7\n"


def refusal(host: Machine, name: str, kernel: str | Path = SPIN, **options: object) -> str:
    """Why it is not created."""
    with pytest.raises(HostError) as refused:
        host.create(name, kernel, **options)  # type: ignore[arg-type]
    assert refused.value.exit_code == 1
    return str(refused.value)


# ---- creation and end


def test_fifty_lives_leave_nothing(host: Machine) -> None:
    """Each connects a disk and an interface, then ends in one of three ways. `balanced` counts, descriptors too."""
    before = host.books()
    image = host.disk("shared.img")
    for i in range(50):
        devices = {"disk": [{"name": "xvda", "image": str(image)}], "vif": [{"ip": "10.0.0.1"}]} if i % 5 == 0 else {}
        guest = host.guest("phoenix", memory=4, **devices)
        if devices:
            guest.do("global disk, net; disk, net = await kernel.block(), await kernel.net()")
        if i % 3 == 0:
            guest.destroy()
        elif i % 3 == 1:
            assert guest.dies("raise SystemExit(i)".replace("i)", f"{i})")) == "poweroff"
        else:
            os.kill(guest.row()["pid"], signal.SIGKILL)
            guest.wait()
    assert not host.balances(before)
    assert sum(row["name"] == "phoenix" for row in host.ask("list-domains")) in (32, 33), "the last ones stay listed"


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_thousand_lives_leave_nothing(host: Machine) -> None:
    """Neither in the books nor in the hypervisor's own memory, once its heap has found its size."""

    def live(times: int) -> int:
        for _ in range(times):
            host.create("phoenix", RETURN_7, memory=1)
            assert host.wait("phoenix") == (7, "poweroff")
        return host.hypervisor.memory()

    before = live(1500)
    assert live(1000) < before + (1 << 20)


def test_the_count_notices_what_is_left(host: Machine) -> None:
    """The check of every test here: a domain that lives on is off balance in every column that it touches."""
    before = host.books()
    image = host.disk("left.img")
    guest = host.guest("left", memory=4, disk=[{"name": "xvda", "image": str(image)}])
    guest.do("global disk; disk = await kernel.block()")
    now = host.books()
    assert {name for name in before if now[name] != before[name]} == set(before)
    guest.destroy()
    assert not host.balances(before)


def test_a_program_that_returns_ends_its_domain(host: Machine) -> None:
    for value, code in (("7", 7), ("None", 0), ("'text'", 0), ("256 + 3", 3)):
        host.create("brief", f"async def main(kernel):\n    return {value}\n")
        assert host.wait("brief") == (code, "poweroff")


def test_exit_ends_a_domain_with_its_code(host: Machine) -> None:
    for code, said in (("raise SystemExit(42)", 42), ("import sys; sys.exit()", 0), ("import sys; sys.exit('why')", 1)):
        guest = host.guest("brief")
        guest.begin(code)
        assert guest.wait() == (said, "poweroff")


def test_a_crash_says_why(host: Machine) -> None:
    """In one sentence in the list, with its traceback on the console and in the log."""
    host.create("crasher", "async def main(kernel):\n    return [][3]\n")
    assert host.wait("crasher") == (1, "crash: main failed: IndexError: list index out of range")
    assert host.row("crasher")["reason"] == "crash: main failed: IndexError: list index out of range"
    assert "(crasher) IndexError: list index out of range" in host.ask("dmesg")
    assert 'File "<crasher>", line 2, in main' in (host.state / "console" / "crasher.log").read_text()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raw(62, __import__('os').getpid(), 11, 0, 0, 0, 0)", "SIGSEGV, which it sent itself"),
        ("raw(101, 0, 0, 0, 0, 0, 0)", "SIGSYS: a forbidden system call"),
        ("raw(62, __import__('os').getpid(), 6, 0, 0, 0, 0)", "SIGABRT: killed by a signal"),
        ("raw(231, 9, 0, 0, 0, 0, 0)", "exited with status 9"),
        ("kernel.call(sched.SchedShutdown(1, 5, ''))", "reboot"),
        ("kernel.call(sched.SchedShutdown(3, 5, 'by hand'))", "crash: by hand"),
    ],
)
def test_every_end_has_its_reason(host: Machine, code: str, reason: str) -> None:
    assert host.guest("mortal").dies(code) == reason
    assert f"): {reason}\n" in host.ask("dmesg")


def test_shutdown_asks_and_destroy_does_not(host: Machine) -> None:
    guest = host.guest("polite")
    host.ask("shutdown", name="polite", seconds=TIMEOUT)
    assert guest.wait() == (0, "poweroff")

    host.create("stubborn", SPIN)
    with pytest.raises(HostError, match=r"stubborn did not shut down within 0\.05 s; destroy ends it"):
        host.ask("shutdown", name="stubborn", seconds=0.05)
    host.ask("destroy", name="stubborn")
    assert host.row("stubborn")["reason"] == "destroyed"


def test_a_paused_domain_stands_still_and_goes_on(host: Machine) -> None:
    guest = host.guest("sleeper")
    host.ask("pause", name="sleeper")
    process = psutil.Process(guest.row()["pid"])
    assert guest.row()["state"] == "paused" and until(lambda: process.status() == psutil.STATUS_STOPPED)
    guest.begin("return 'awake'")
    for verb, state in (("pause", "paused"), ("unpause", "running")):
        if verb == "unpause":
            host.ask("unpause", name="sleeper")
            assert guest.answer() == "awake"
        with pytest.raises(HostError, match=f"sleeper is {state}"):
            host.ask(verb, name="sleeper")
    guest.destroy()


def test_a_paused_domain_can_be_ended(host: Machine) -> None:
    for born_paused in (True, False):
        host.create("sleeper", SPIN, paused=born_paused)
        if not born_paused:
            host.ask("pause", name="sleeper")
        assert host.row("sleeper")["state"] == "paused"
        host.ask("destroy", name="sleeper")


def test_a_domain_born_paused_runs_nothing(host: Machine) -> None:
    host.create("unborn", RETURN_7, paused=True)
    process = psutil.Process(host.row("unborn")["pid"])
    assert process.name() == "unborn" and host.ask("info", name="unborn")["hypercalls"] == 0
    host.ask("unpause", name="unborn")
    assert host.wait("unborn") == (7, "poweroff")


def test_names_are_reused_and_numbers_are_not(host: Machine) -> None:
    domids = []
    for _ in range(5):
        domids.append(host.create("again", RETURN_7))
        assert host.wait("again") == (7, "poweroff")
    assert domids == sorted(set(domids)) and len(domids) == 5
    assert host.wait(str(domids[2])) == (7, "poweroff"), "an ended one is found by its number"


def test_keys_for_a_domain_that_ended_go_nowhere(host: Machine) -> None:
    """Its console's page is not dom0's any more: whoever stored there would fault."""
    host.create("late", RETURN_7)
    host.wait("late")
    console = host.connect()
    console.ask("console", name="late")
    console.send({"data": b"keys\n"})
    assert next(console.messages()) == {"end": 7, "reason": "poweroff"}
    console.close()
    assert host.row("dom0")["state"] == "running"


def test_a_console_log_that_cannot_be_written_is_done_without(host: Machine) -> None:
    """The disk is full, say; here a directory is in its place."""
    place = host.state / "console" / "mute.log"
    place.mkdir()
    guest = host.guest("mute")
    assert guest.do("print('one'); print('two'); return 1") == 1
    assert until(lambda: guest.row()["reason"]) == "console log: Is a directory"
    assert host.ask("dmesg").count("mute: console log") == 1
    guest.destroy()
    place.rmdir()


# ---- creation refused, everything undone


def test_what_cannot_be_created_leaves_nothing(host: Machine, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("async def main(kernel:\n")
    (tmp_path / "elf").write_bytes(b"\x7fELF nonsense")
    os.mkfifo(tmp_path / "fifo")
    free = host.ask("ledger")["frames_free"]
    before = host.books()
    for why, found in (
        ("big: the machine has not that much memory free", refusal(host, "big", memory=(free >> 8) + 1)),
        ("is too little: image and page tables end at frame", refusal(host, "huge", SPIN + "#" * (2 << 20), memory=1)),
        ("name: expected `str` matching regex", refusal(host, "-bad", tmp_path / "any")),
        ("name: expected `str` matching regex", refusal(host, "a" * 33, tmp_path / "any")),
        ("none.py: No such file or directory", refusal(host, "none", tmp_path / "none.py")),
        ("not a regular file", refusal(host, "fifo", tmp_path / "fifo")),
        ("not a regular file", refusal(host, "zero", Path("/dev/zero"))),
        ("'(' was never closed", refusal(host, "wrong", tmp_path / "wrong.py")),
        ("not a 64-bit little-endian ELF file", refusal(host, "elf", tmp_path / "elf")),
        ("xvda: /none.img: No such file", refusal(host, "disk", disk=[{"name": "xvda", "image": "/none.img"}])),
        ("is neither a file nor a block device", refusal(host, "tty", disk=[{"name": "xvda", "image": "/dev/null"}])),
    ):
        assert why in found
        assert not host.balances(before), why


def test_two_domains_of_one_name_are_refused(host: Machine) -> None:
    guest = host.guest("alice")
    assert refusal(host, "alice") == "a domain named alice runs already"
    assert refusal(host, "blkback") == "a domain named blkback runs already"
    assert refusal(host, "dom0") == "dom0: there is a domain of that name"
    assert guest.do("return 1") == 1
    guest.destroy()


def test_sectors_are_never_attached_twice_where_one_writes(host: Machine) -> None:
    image = str(host.disk("one.img"))

    def disk(mode: str, extents: str = "") -> dict[str, object]:
        return {"disk": [{"name": "xvda", "image": image, "mode": mode, "extents": extents}]}

    host.create("writer", SPIN, **disk("w", "0:100"))
    for mode in "rw":
        assert "are attached to domain" in refusal(host, "other", **disk(mode, "99:5")), mode
    host.create("beside", SPIN, **disk("w", "100:100"))
    for name in ("writer", "beside"):
        host.ask("destroy", name=name)
    host.create("again", SPIN, **disk("w"))
    host.ask("destroy", name="again")


# ---- death at the wrong moment


def test_a_child_killed_as_it_is_born(host: Machine) -> None:
    """The creation fails or the domain ends; either way its frames, queues and descriptors come back."""
    before = host.books()
    known = set(host.ask("ledger")["processes"])
    outcomes = set()
    for _ in range(15):
        birth = host.connect()
        birth.send({"do": "create", "tree": {"name": "doomed", "kernel": str(host.program(SPIN)), "memory": 1}})
        os.kill(newborn(host.pid, known), signal.SIGKILL)
        reply = next(birth.messages())
        birth.close()
        outcomes.add(reply.get("error") or host.wait("doomed").reason)
    assert not host.balances(before)
    refused = "doomed: its process could not be started; `ring1 dmesg` says why"
    ended = "doomed: it ended while it was built: "
    assert all(outcome.startswith((refused, ended, "SIGKILL", "monitor died")) for outcome in outcomes), outcomes


def newborn(parent: int, known: set[int]) -> int:
    """The first child of `parent` that is not `known`. Without a pause between two looks: a birth takes a millisecond."""
    children, end = Path(f"/proc/{parent}/task/{parent}/children"), time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        for pid in map(int, children.read_text().split()):
            if pid not in known:
                return pid
    raise AssertionError("nobody was born")


@pytest.mark.parametrize(
    "step", "prepare place_descriptors reserve_windows spawn_monitor limits serve_traps lock run".split()
)
def test_death_at_every_step_of_a_birth(step: str) -> None:
    """Seed: every guest called `doomed` dies at the named step of hypervisor/gate/boot.py."""
    with machine(seed=f"die_in_{step}") as host:
        before = host.books()
        for _ in range(3):
            try:
                host.create("doomed", SPIN)
                assert step in ("limits", "serve_traps", "lock", "run"), "its monitor may be told of before it dies"
                host.wait("doomed")
            except HostError as error:
                assert "doomed: " in str(error)
        assert not host.balances(before)
        survivor = host.guest("alice")
        assert survivor.do("return 1") == 1
        survivor.destroy()


def test_destroyed_before_its_backend_looked(host: Machine) -> None:
    """The block driver domain is stopped while a domain with a disk comes and goes; it finds nothing, and serves the next."""
    before = host.books()
    driver = host.row("blkback")["pid"]
    image = host.disk("early.img")
    disk = {"disk": [{"name": "xvda", "image": str(image), "mode": "w"}]}
    os.kill(driver, signal.SIGSTOP)
    try:
        host.create("early", SPIN, **disk)
        destroying = host.connect()
        destroying.send({"do": "destroy", "name": "early"})
        assert until(lambda: host.row("early")["state"] == "dead")
    finally:
        os.kill(driver, signal.SIGCONT)
    assert next(destroying.messages()) == {"ok": None}
    destroying.close()
    later = host.guest("later", memory=4, **disk)
    assert later.do("disk = await kernel.block(); return disk.sectors") == 2048
    later.destroy()
    assert not host.balances(before)


def test_a_driver_domain_that_dies_while_a_device_goes() -> None:
    with machine() as host:
        guest = host.guest("alice", memory=4, disk=[{"name": "xvda", "image": str(host.disk("a.img"))}])
        guest.do("global disk; disk = await kernel.block()")
        driver = host.row("blkback")
        os.kill(driver["pid"], signal.SIGSTOP)
        destroying = host.connect()
        destroying.send({"do": "destroy", "name": "alice"})
        assert until(lambda: host.row("alice")["state"] == "dead")
        os.kill(driver["pid"], signal.SIGKILL)
        assert next(destroying.messages()) == {"ok": None}
        assert host.replaced(driver)


def test_a_device_for_a_driver_domain_that_just_died() -> None:
    """It is refused or it is served, whatever moment it was; the host goes on."""
    with machine() as host:
        disk = {"disk": [{"name": "xvda", "image": str(host.disk("a.img"))}]}
        before = host.books()
        for _ in range(5):
            driver = host.row("blkback")
            os.kill(driver["pid"], signal.SIGKILL)
            try:
                host.create("alice", SPIN, **disk)
                host.ask("destroy", name="alice")
            except HostError as error:
                assert str(error) == "alice: disk xvda: the block driver domain has ended; another is being started"
            assert host.replaced(driver)
        assert not host.balances(before)


def test_a_tree_that_is_no_configuration_is_refused(host: Machine) -> None:
    """The control socket takes trees from scripts too: each is checked whole."""
    good = to_tree(DomainConfig(name="x", kernel=str(GUESTS / "puppet.py")))
    for tree in (5, [], {}, {**good, "memory": "much"}, {**good, "memory": 0}, {**good, "kernel": "a\0b"}, {**good, "more": 1}):
        with pytest.raises(HostError):
            host.ask("create", tree=tree)
    for request in ({"name": ["x"]}, {}, {"name": "x", "seconds": 1e300}, {"name": "x", "nonsense": 1}):
        with pytest.raises(HostError):
            host.ask("shutdown", **request)
    with pytest.raises(HostError):
        host.ask("firewall-set", text=5)
