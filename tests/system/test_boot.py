"""The host itself: it comes up and goes down whole, and what is left when one of its processes is killed at any time."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from dom0 import client
from dom0.client import HostError
from tests.conftest import TIMEOUT
from tests.system.machine import FRAMES, Machine, Patient, Process, exists, machine, until, up

DRIVERS = ("blkback", "netback")
NOBODY = 65534


def refusal(state: Path) -> str:
    """Why `up` there fails."""
    with pytest.raises(HostError) as refused:
        pid = client.up(state, FRAMES)
        os.kill(pid, 9)
    return str(refused.value)


@contextlib.contextmanager
def all_processes(host: Machine) -> Iterator[list[Process]]:
    processes = host.processes()
    try:
        yield processes
    finally:
        for process in processes:
            process.close()


# ---- up and down


def test_a_host_that_ends_leaves_nothing() -> None:
    with machine() as host:
        disk = {"name": "xvda", "image": str(host.disk("a.img"))}
        alice = host.guest("alice", memory=4, disk=[disk], vif=[{"ip": "10.0.0.1"}])
        assert alice.do("disk, net = await kernel.block(), await kernel.net(); return disk.sectors") == 2048
        machine_memory = host.ask("ledger")["shm"][0]["name"]
        assert not exists(machine_memory), "machine memory has no name once the host runs"
    # Machine.close has looked: no process, no name of the journal, no control socket


def test_what_looks_for_leftovers_finds_them() -> None:
    """The check of every test here: a process, and an object that the journal names, would be seen."""
    with machine() as host:
        queue = posix_ipc.MessageQueue("/ring1-left-by-a-test", posix_ipc.O_CREX)
        with (host.state / "journal").open("a") as journal:
            journal.write("queue /ring1-left-by-a-test\n")
        try:
            assert host._down() == ["/ring1-left-by-a-test"]
        finally:
            queue.unlink()
            queue.close()


def test_two_hosts_side_by_side() -> None:
    with machine() as one, machine() as two:
        here, there = one.guest("alice"), two.guest("alice")
        assert here.do("return 1") + there.do("return 2") == 3
        assert one.ask("ledger")["shm"] != two.ask("ledger")["shm"]
        before = two.books()
        one.close()
        assert there.do("return 4") == 4 and not two.balances(before)


def test_a_second_host_in_the_same_place_is_refused() -> None:
    with machine() as host:
        alice = host.guest("alice")
        assert refusal(host.state) == f"a host is running in {host.state} already"
        again = subprocess.run(
            [sys.executable, "-I", "-m", "hypervisor", "--state", str(host.state)],
            check=False, capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        assert again.returncode == 1 and again.stderr == f"error: a host is running in {host.state} already\n"
        assert alice.do("return 5") == 5


# ---- where its state may be


def test_a_state_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    assert "must be a directory of its own (no link), yours, with mode 0700" in refusal(tmp_path / "link")
    assert not list((tmp_path / "real").iterdir())


def test_a_state_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o755)
    assert "with mode 0700" in refusal(state)
    assert stat.S_IMODE(state.stat().st_mode) == 0o755 and not list(state.iterdir()), "nothing was touched"


def test_the_hypervisor_looks_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who starts it may have been deceived. Seed: it does not look, and runs in a directory that others may enter."""
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o755)
    (tmp_path / "link").symlink_to("state")
    for place, why in ((state, "must be yours with mode 0700"), (tmp_path / "link", "(a link is not followed)")):
        command = [sys.executable, "-I", "-m", "hypervisor", "--state", str(place)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 1 and done.stderr.startswith("error: state directory") and why in done.stderr
    assert not list(state.iterdir())

    monkeypatch.setattr(client, "_open_log", lambda state: (state / "hypervisor.log").open("wb"))
    pid = up(state, seed="any_directory")
    client.down(state)
    os.waitpid(pid, 0)


def test_a_state_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    if os.getuid() == 0:
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        os.chown(state, NOBODY, NOBODY)
        assert "yours" in refusal(state)
    else:
        assert refusal(Path("/proc/self/task")), "root's, and we may not"


def test_a_state_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none" / "state") == f"state directory {tmp_path}/none/state: No such file or directory"
    (tmp_path / "file").write_text("")
    assert "must be a directory of its own" in refusal(tmp_path / "file")


def test_more_memory_than_there_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"/dev/shm has no \d+ MiB free for machine memory"):
        client.up(tmp_path / "s", 1 << 30)
    assert not client.is_running(tmp_path / "s")


# ---- after a crash


def test_the_next_start_sweeps_its_own_leftovers_and_nothing_else(tmp_path: Path) -> None:
    state = tmp_path / "s"
    state.mkdir(mode=0o700)
    mine = ["/ring1-0123-machine", "/ring1-0123-queue"]
    foreign = "/test-of-ring1-foreign"
    for name in (mine[0], foreign):
        posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=4096).close_fd()
    posix_ipc.MessageQueue(mine[1], posix_ipc.O_CREX).close()
    (state / "journal").write_text(f"shm {mine[0]}\nqueue {mine[1]}\nqueue /ring1-never-made\nshm {foreign}\nnonsense\n")
    try:
        up(state)
        with Patient(state) as host:
            assert ", 2 leftovers swept" in host.ask("dmesg").splitlines()[0]
        client.down(state)
        assert [exists(name) for name in (*mine, foreign)] == [False, False, True]
    finally:
        for name in (mine[0], foreign):
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(name)
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_message_queue(mine[1])


@pytest.mark.parametrize("victim", ["hypervisor", "dom0"])
def test_without_the_hypervisor_or_dom0_nothing_survives(victim: str) -> None:
    """The hypervisor's death kills its children (PDEATHSIG); dom0's is the hypervisor's reason to end them."""
    with machine() as host:
        host.guest("alice")
        names = [line.split()[1] for line in (host.state / "journal").read_text().splitlines()]
        with all_processes(host) as processes:
            assert len(processes) == 1 + 2 + 2 * 4, "the hypervisor, both zygotes, four domains with a monitor each"
            dom0 = host.row("dom0")["pid"]
            next(p for p in processes if p.pid == {"hypervisor": host.pid, "dom0": dom0}[victim]).kill()
            assert all(process.ended() for process in processes)
        assert not [name for name in names if exists(name)]
        if victim == "dom0":
            log = (host.state / "hypervisor.log").read_text()
            assert "PANIC: dom0 ended: SIGKILL: killed from outside" in log
        os.waitpid(host.pid, 0)

        up(host.state)
        with Patient(host.state) as again:
            assert [row["name"] for row in again.ask("list-domains")] == ["dom0", *DRIVERS]
        client.down(host.state)


def test_without_the_death_signal_something_would_survive() -> None:
    """Seed: PR_SET_PDEATHSIG is not set. The check above would see it."""
    with machine(seed="no_death_signal") as host:
        host.guest("alice")
        with all_processes(host) as processes:
            facts = host.ask("info", name="alice")
            domain, monitor = (next(p for p in processes if p.pid == facts[name]) for name in ("pid", "monitor_pid"))
            host.hypervisor.kill()
            assert monitor.ended(), "its socket hangs up"
            assert not domain.ended(0)
            for process in processes:
                process.kill()
            assert all(process.ended() for process in processes)


def test_a_dead_zygote_is_replaced_and_nobody_notices() -> None:
    with machine() as host:
        alice = host.guest("alice")
        before, zygote = host.books(), host.ask("host")["zygote_pid"]
        os.kill(zygote, 9)
        assert until(lambda: host.ask("host")["zygote_pid"] != zygote)
        assert alice.do("return 6") == 6
        bob = host.guest("bob")
        assert bob.do("return 7") == 7
        bob.destroy()
        assert not host.balances(before)
        assert "zygote died; starting another" in host.ask("dmesg")


def test_a_zygote_that_cannot_live_ends_the_host() -> None:
    """It is not started for ever. Seed: a zygote that dies at birth; the host may end before or after dom0 is ready."""
    with tempfile.TemporaryDirectory(prefix="ring1-") as folder:
        state = Path(folder) / "state"
        try:
            hypervisor = Process(up(state, seed="zygote"))
        except HostError as error:
            assert "PANIC: the zygote cannot start" in str(error)
        else:
            assert hypervisor.ended()
            os.waitpid(hypervisor.pid, 0)
            hypervisor.close()
        assert "PANIC: the zygote cannot start" in (state / "hypervisor.log").read_text()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_dead_driver_domain_is_replaced_and_serves_again(driver: str) -> None:
    """Its devices are closed and their owners told; other domains go on; new devices work."""
    with machine() as host:

        def device(owner: str) -> dict[str, object]:
            disk = {"name": "xvda", "image": str(host.disk(f"{owner}.img")), "mode": "w"}
            return {"disk": [disk]} if driver == "blkback" else {"vif": [{"ip": "10.0.0.1"}]}

        opens = f"global device; device = await kernel.{'block' if driver == 'blkback' else 'net'}()"
        before = host.books()
        alice, carol = host.guest("alice", memory=4, **device("alice")), host.guest("carol")
        alice.do(opens)
        old = host.row(driver)
        os.kill(old["pid"], 9)
        assert host.replaced(old)
        assert carol.do("return 8") == 8
        assert until(lambda: alice.do("return device.error")) == "the backend closed"
        assert not host.ask("info", name="alice")["devices"]

        bob = host.guest("bob", memory=4, **device("bob"))
        bob.do(opens)
        for guest in (alice, bob, carol):
            guest.destroy()
        assert not host.balances(before)
        assert f"{driver} ended; starting another" in host.ask("dmesg")


def test_a_driver_domain_that_cannot_be_built_is_built_later() -> None:
    """Seed: its successor finds no memory, once."""
    with machine(seed="no_memory_for_a_driver") as host:
        old = host.row("blkback")
        os.kill(old["pid"], 9)
        assert host.replaced(old)
        assert "blkback cannot be started: blkback: seeded" in host.ask("dmesg")


def test_a_domain_ends_with_its_monitor() -> None:
    with machine() as host:
        before = host.books()
        alice, bob = host.guest("alice"), host.guest("bob")
        os.kill(host.ask("info", name="alice")["monitor_pid"], 9)
        assert alice.wait().reason == "monitor died"
        assert bob.do("return 9") == 9
        bob.destroy()
        assert not host.balances(before)


def test_a_killed_guest_ends_alone() -> None:
    with machine() as host:
        before = host.books()
        alice, bob = host.guest("alice"), host.guest("bob")
        os.kill(alice.row()["pid"], 9)
        assert alice.wait() == (-1, "SIGKILL: killed from outside")
        assert bob.do("return 10") == 10
        bob.destroy()
        assert not host.balances(before)


def test_down_with_everything_running() -> None:
    """Twelve domains, one of them stopped: `down` waits for no guest."""
    with machine() as host:
        for i in range(12):
            host.create(f"guest{i}", "async def main(kernel):\n    while True: pass\n", memory=1)
        host.ask("pause", name="guest3")
        assert re.fullmatch(r"running|paused", host.row("guest3")["state"])
