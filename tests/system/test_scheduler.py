"""Domains that share a CPU: weights and caps by their CPU clocks, a pause that holds, deaths while stopped, the commands."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import psutil
import pytest

from dom0.client import HostError
from tests.conftest import TIMEOUT
from tests.system.machine import Machine, machine, until
from tests.system.test_cli import answer, refusal, ring1

SPIN = "async def main(kernel):\n    while True: pass\n"


@pytest.fixture(scope="module")
def host() -> Iterator[Machine]:
    """All of it on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with machine() as made:
            os.sched_setaffinity(0, before)
            yield made
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture(autouse=True)
def nobody_is_left(host: Machine) -> Iterator[None]:
    yield
    for row in host.ask("list-domains"):
        if row["name"].startswith("spin") and row["state"] != "dead":
            host.ask("destroy", name=row["name"])


def spin(host: Machine, count: int, **options: int) -> list[str]:
    names = [f"spin-{i}" for i in range(count)]
    for name in names:
        host.create(name, SPIN, memory=1, **options)
    return names


def ran(host: Machine, names: list[str], seconds: float) -> list[float]:
    """Parts of what they ran together, until that is so many seconds of CPU."""
    clock = {name: host.row(name)["cpu_s"] for name in names}

    def now() -> list[float]:
        return [host.row(name)["cpu_s"] - clock[name] for name in names]

    until(lambda: sum(now()) >= seconds, TIMEOUT)
    return [one / sum(now()) for one in now()]


def test_weights(host: Machine) -> None:
    names = spin(host, 2)
    assert ring1(host, "sched", names[0], "--weight", "768").returncode == 0
    three, one = ran(host, names, 1.5)
    assert three == pytest.approx(0.75, abs=0.05) and one == pytest.approx(0.25, abs=0.05)
    rows = answer(host, "sched")
    assert [row["weight"] for row in rows if row["name"] in names] == [768, 256]
    places = {row["name"]: row for row in answer(host, "vcpu-list")}
    assert all(places[name]["scheduled"] in ("on", "off") for name in names) and places["blkback"]["scheduled"] == "-"
    assert places[names[1]]["runnable_s"] > 0.5, "what others took from it"


def test_a_cap_in_the_configuration_and_by_command(host: Machine) -> None:
    (name,) = spin(host, 1, cap=20)
    assert host.ask("sched", name=name)[0]["cap"] == 20
    begin, before = time.monotonic(), host.row(name)["cpu_s"]
    until(lambda: host.row(name)["cpu_s"] - before >= 0.2, TIMEOUT)
    assert (host.row(name)["cpu_s"] - before) / (time.monotonic() - begin) <= 0.22
    assert ring1(host, "sched", name, "--cap", "0").returncode == 0
    until(lambda: host.ask("vcpu-list", name=name)[0]["scheduled"] == "on", TIMEOUT)
    assert answer(host, "sched", name)[0]["cap"] == 0


def test_refusals(host: Machine) -> None:
    (name,) = spin(host, 1)
    assert refusal(host, "sched", name, "--weight", "0").startswith(f"{name}: weight is 1 to 65535")
    assert refusal(host, "sched", name, "--cap", "101").startswith(name)
    assert refusal(host, "sched", name, "--warp", "-1").startswith(name)
    assert ring1(host, "sched", "--weight", "3").returncode == 2
    assert ring1(host, "sched", "nobody").returncode == 4 == ring1(host, "vcpu-list", "nobody").returncode
    with pytest.raises(HostError):
        host.create("spin-bad", SPIN, cap=101)
    with pytest.raises(HostError):
        host.create("spin-bad", SPIN, weight=0)


def test_a_paused_domain_uses_no_cpu_and_its_monitor_still_works(host: Machine) -> None:
    """What it maps of another is taken away while it is stopped: the other one ends, and every frame comes back."""
    before = host.books()
    giver, taker = host.guest("giver"), host.guest("taker")
    ref = giver.do(
        f"global page\npage = kernel.memory.alloc(1)\nmemory.write(page.address, b'shared')\n"
        f"return kernel.grants.give({taker.domid}, page.pfn)"
    )
    taker.do(f"global shown\nshown = kernel.grants.map({giver.domid}, [{ref}])")
    assert taker.do("return memory.read(shown.address, 6).decode()") == "shared"
    host.ask("pause", name="taker")
    process = psutil.Process(taker.row()["pid"])
    until(lambda: process.status() == psutil.STATUS_STOPPED)
    clock = taker.row()["cpu_s"]
    giver.destroy()
    assert host.ask("list-domains")[-1]["state"] == "dead" and process.status() == psutil.STATUS_STOPPED
    spent = taker.row()["cpu_s"] - clock
    assert spent < 0.005, "its monitor's, and nothing of its own"
    host.ask("unpause", name="taker")
    assert taker.do("return memory.read(shown.address, 6).hex()") == "00" * 6
    taker.destroy()
    assert not host.balances(before)


def test_ended_while_it_is_stopped(host: Machine) -> None:
    names = spin(host, 4)
    until(lambda: any(row["scheduled"] == "off" for row in host.ask("vcpu-list")), TIMEOUT)
    off = next(row["name"] for row in host.ask("vcpu-list") if row["scheduled"] == "off")
    host.ask("destroy", name=off)
    left = [name for name in names if name != off]
    assert all(part == pytest.approx(1 / 3, abs=0.08) for part in ran(host, left, 0.6))


def test_a_host_that_is_killed_takes_stopped_domains_along() -> None:
    with machine() as host:
        host.create("spin", SPIN, memory=1, cap=1)
        host.create("spin-paused", SPIN, memory=1)
        host.ask("pause", name="spin-paused")
        until(lambda: host.ask("vcpu-list", name="spin")[0]["scheduled"] == "off", TIMEOUT)
        processes = host.processes()
        host.hypervisor.kill()
        assert all(process.ended() for process in processes)
        for process in processes:
            process.close()
