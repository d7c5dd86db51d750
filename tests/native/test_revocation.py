"""What is taken away is gone. The revocation hammer: native code stores in a loop while the hypervisor takes the frame away
under it, by each of its paths. Once it was acknowledged that the frame is unmapped, no store lands in it; where nobody waits
for that, stores do. And a monitor that is killed, stopped or starved: its domain ends, or goes on, and every frame is back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hypervisor.gate.monitor import ACK_SECONDS
from tests.conftest import NIGHTLY
from tests.native.build import build
from tests.native.paging_hammer import WISHES
from tests.native.paging_machine import run

ROUNDS = (3000 if NIGHTLY else 300) // len(WISHES)
SEEDED_ROUNDS = 20


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("paging", tmp_path_factory.mktemp("kernels"))


def hammer(kernel: Path, state: Path, rounds: int, *defects: str) -> dict[str, int]:
    """Late stores, by path."""
    jobs = [
        {"kernel": str(kernel), "cmdline": f"attack=hammer-{how} rounds={rounds}", "defects": defects} for how in WISHES
    ]
    late = {}
    for how, end in zip(WISHES, run(jobs, state), strict=True):
        assert (end["reason"], end["exit_code"], end["lost"]) == ("poweroff", 0, 0)
        assert end["said"][0].endswith(" 1"), "it did store"
        done, _, stores, _ = end["seen"][0].split()
        assert int(done) == rounds
        late[how] = int(stores)
    return late


def test_no_store_lands_after_the_acknowledgement(kernel: Path, tmp_path: Path) -> None:
    assert hammer(kernel, tmp_path, ROUNDS) == dict.fromkeys(WISHES, 0)


def test_stores_land_where_nobody_waits_for_it(kernel: Path, tmp_path: Path) -> None:
    late = hammer(kernel, tmp_path, SEEDED_ROUNDS, "no acknowledgement")
    assert all(late.values()), late


# ---- monitors


SPOILED = {"killed": "monitor died", "killed-later": "monitor died", "stopped": "monitor silent for 2 s"}
SLACK = 1.5  # seconds, of a busy machine, until a domain that is told to end has ended


@pytest.fixture(scope="module")
def without_monitor(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = (*SPOILED, "starved")
    jobs = [{"kernel": str(kernel), "cmdline": f"attack=hammer-monitor-{name}"} for name in names]
    return dict(zip(names, run(jobs, tmp_path_factory.mktemp("state")), strict=True))


@pytest.mark.parametrize("name", SPOILED)
def test_a_monitor_that_does_not_answer_ends_its_domain(without_monitor: dict[str, Any], name: str) -> None:
    """In time, and nothing of the domain stores to a frame that is free."""
    end = without_monitor[name]
    assert end["reason"] == SPOILED[name]
    assert end["seconds"] < (ACK_SECONDS if name == "stopped" else 0) + SLACK
    assert (end["lost"], end["dirty"]) == (0, 0)


def test_a_starved_monitor_is_waited_for_or_ends_its_domain(without_monitor: dict[str, Any]) -> None:
    end = without_monitor["starved"]
    assert (end["lost"], end["dirty"]) == (0, 0)
    if end["reason"] != "monitor silent for 2 s":
        assert (end["reason"], end["said"]) == ("poweroff", [" ".join(["1 faulted"] * 8)])


@pytest.mark.nightly
def test_a_deadline_that_is_too_patient_is_seen(kernel: Path, tmp_path: Path) -> None:
    job = {"kernel": str(kernel), "cmdline": "attack=hammer-monitor-stopped", "defects": ["a patient deadline"]}
    assert run([job], tmp_path)[0]["seconds"] > ACK_SECONDS + SLACK


# ---- a guest that does its worst to its own memory map pays for it; what its neighbour notices is measured (bench paging)


STORMS = ("flushes", "pins", "ring")
NO_CHARGE = "nothing is charged"


@pytest.fixture(scope="module")
def storms(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Any]:
    which = [(name, beside) for name in STORMS for beside in (True, False)]
    jobs = [
        {"kernel": str(kernel), "cmdline": f"attack=hammer-{name} rounds={20 if name == 'ring' else 1}", "neighbour": beside}
        for name, beside in which
    ]
    return dict(zip(which, run(jobs, tmp_path_factory.mktemp("state")), strict=True))


@pytest.mark.parametrize(("name", "beside"), [(name, beside) for name in STORMS for beside in (True, False)])
def test_who_storms_is_parked_while_a_neighbour_wants_something(
    storms: dict[tuple[str, bool], Any], name: str, beside: bool
) -> None:
    end = storms[name, beside]
    assert (end["reason"], end["exit_code"], end["lost"], end["dirty"]) == ("poweroff", 0, 0, 0)
    assert bool(end["parked"]) == beside


def test_without_the_charge_nobody_is_parked(kernel: Path, tmp_path: Path) -> None:
    job = {"kernel": str(kernel), "cmdline": "attack=hammer-pins rounds=1", "neighbour": True, "defects": [NO_CHARGE]}
    assert run([job], tmp_path)[0]["parked"] == 0
