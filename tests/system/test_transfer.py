"""The main job, alice's disk to bob's over their interfaces, and the death of either in the middle of it."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from dom0 import demo
from tests.system.machine import Machine, until

SIZE = 8_000_000 + 77  # bytes: not whole sectors, not whole datagrams
SECTORS = -(-SIZE // 512)
REFUSED = 20  # datagrams that alice.py tries over her second interface


@pytest.fixture(scope="module")
def source(host: Machine) -> Path:
    """Alice's disk: bytes that repeat nowhere."""
    return host.disk("alice.img", SECTORS * 512, random.Random(1).randbytes(SIZE))


@pytest.fixture(autouse=True)
def rules(host: Machine) -> Any:
    """The demonstration's, and afterwards those of a fresh host."""
    host.ask("firewall-set", text=demo.RULES)
    yield
    host.ask("firewall-set", text="default accept\n")


def start_bob(host: Machine) -> Path:
    """His empty disk."""
    target = host.disk("bob.img", SECTORS * 512)
    disk = {"name": "xvda", "image": str(target), "mode": "w"}
    host.create("bob", demo.PROGRAMS / "bob.py", memory=8, cmdline=f"size={SIZE}", disk=[disk], vif=[{"ip": "10.0.0.2"}])
    return target


def start_alice(host: Machine, source: Path) -> int:
    disk = {"name": "xvda", "image": str(source), "mode": "r"}
    vifs = [{"ip": "10.0.0.1"}, {"ip": "10.0.0.9"}]
    return host.create("alice", demo.PROGRAMS / "alice.py", memory=8, cmdline=f"size={SIZE} to=10.0.0.2", disk=[disk], vif=vifs)


def written(host: Machine) -> int:
    """Bytes that bob's disk has got."""
    return sum(row.get("wr_bytes", 0) for row in host.ask("info", name="bob")["counters"])


def half_way(host: Machine) -> None:
    assert until(lambda: written(host) > SIZE // 4)


def finish(host: Machine, alice: int, target: Path) -> None:
    """Until alice says that bob has it all; then he has."""
    assert until(lambda: host.ask("store-read", path=f"/local/domain/{alice}/data/result"))
    for name in ("alice", "bob"):
        host.ask("shutdown", name=name)
    assert digest(target) == digest(target.with_name("alice.img"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()[:SIZE]).hexdigest()


def hits(host: Machine) -> dict[str, int]:
    """{rule: packets} and the counters beside them."""
    facts = host.ask("firewall-list")
    return {**dict(facts["rules"]), **{name: facts[name] for name in ("default", "spoofed", "malformed")}}


def test_bob_gets_what_alice_has(host: Machine, source: Path) -> None:
    target = start_bob(host)
    finish(host, start_alice(host, source), target)
    assert {row["name"]: row["reason"] for row in host.ask("list-domains") if row["name"] in ("alice", "bob")} == {
        "alice": "poweroff", "bob": "poweroff",
    }  # fmt: skip


def test_her_second_interface_is_refused_and_counted(host: Machine, source: Path) -> None:
    """All of it dropped by its rule, nothing delivered: bob would have taken it for the beginning of the file."""
    before = hits(host)
    target = start_bob(host)
    alice = start_alice(host, source)
    assert until(lambda: hits(host)["drop any in alice/1"] - before["drop any in alice/1"] == REFUSED)
    finish(host, alice, target)
    after = hits(host)
    assert after["default"] == before["default"] and after["spoofed"] == before["spoofed"]
    assert after["drop any in alice/1"] - before["drop any in alice/1"] == REFUSED


def test_what_the_firewall_lets_through_does_arrive(host: Machine, source: Path) -> None:
    """The seeded hole: with the rule turned round the same packets reach bob, and he has not what alice has."""
    host.ask("firewall-set", text=demo.RULES.replace("drop   any in alice/1", "accept any in alice/1"))
    target = start_bob(host)
    start_alice(host, source)
    assert until(lambda: hits(host)["accept any in alice/1"] == REFUSED)
    assert until(lambda: digest(target) != hashlib.sha256(bytes(SIZE)).hexdigest())
    assert target.read_bytes().startswith(b"must not arrive")
    for name in ("alice", "bob"):
        host.ask("destroy", name=name)


def test_alice_killed_half_way(host: Machine, source: Path) -> None:
    """Everybody goes on, what was hers is back, and the transfer can be made again."""
    start_bob(host)
    assert until(lambda: len(host.ask("info", name="bob")["counters"]) == 2), "his disk and his interface are connected"
    before = host.books()
    start_alice(host, source)
    half_way(host)
    os.kill(host.row("alice")["pid"], signal.SIGKILL)
    assert host.wait("alice") == (-1, "SIGKILL: killed from outside")
    assert 0 < written(host) < SIZE
    del before["grants"], before["frames_shared"]  # of bob's pools the backends map what is used, as it is used
    assert not host.balances(before)
    assert host.row("bob")["state"] == "running"
    host.ask("shutdown", name="bob")  # he obeys: he is well
    assert host.wait("bob") == (0, "poweroff")

    target = start_bob(host)
    finish(host, start_alice(host, source), target)


def test_bob_killed_half_way(host: Machine, source: Path) -> None:
    target = start_bob(host)
    assert until(lambda: len(host.ask("info", name="bob")["counters"]) == 2)
    start_alice(host, source)
    half_way(host)
    os.kill(host.row("bob")["pid"], signal.SIGKILL)
    assert host.wait("bob") == (-1, "SIGKILL: killed from outside")
    assert host.row("alice")["state"] == "running"
    host.ask("shutdown", name="alice")
    assert host.wait("alice") == (0, "poweroff")

    target = start_bob(host)
    finish(host, start_alice(host, source), target)


def test_both_killed_at_once(host: Machine, source: Path) -> None:
    start_bob(host)
    start_alice(host, source)
    half_way(host)
    for name in ("alice", "bob"):
        os.kill(host.row(name)["pid"], signal.SIGKILL)
    for name in ("alice", "bob"):
        assert host.wait(name).exit_code == -1


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", ["alice", "bob"])
def test_killed_at_many_moments(host: Machine, source: Path, victim: str) -> None:
    """A hundred times, wherever it is; `balanced` counts at the end."""
    for i in range(100):
        start_bob(host)
        start_alice(host, source)
        assert until(lambda: written(host) > i * SIZE // 120)  # noqa: B023 - called at once
        os.kill(host.row(victim)["pid"], signal.SIGKILL)
        host.wait(victim)
        for name in ("alice", "bob"):
            if name != victim:
                host.ask("destroy", name=name)
