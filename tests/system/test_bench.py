"""scripts/bench: what it computes, and that it runs (conftest sees whether it leaves anything)."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks import harness, places
from scripts.benchmarks.harness import Failed, Row, pair, report, run, spread, table
from tests.conftest import TIMEOUT

ROOT = Path(__file__).resolve().parent.parent.parent
KEYS = (
    "id what unit better ours absent limit limit_is peer peer_value ratio_limit ratio_peer spread "
    "gate absolute gate_holds holds peers"
).split()


def never() -> float:
    raise AssertionError


def row(better: str, gate: float | None = None) -> Row:
    return Row("x1", "something", "s", better, never, never, "the limit", {"one": never, "two": never, "three": "absent"}, gate)


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    values = {"ours": [1.0, 10.0, 100.0], "limit": [2.0, 10.0, 1000.0], "one": [1.0, 1.0, 1.0], "two": [4.0, 5.0, 6.0]}
    got = report(row("more", 0.5), values)
    assert list(got) == KEYS
    assert (got["ours"], got["limit"], got["ratio_limit"]) == (10.0, 10.0, 0.5)
    assert (got["peer"], got["peer_value"], got["ratio_peer"]) == ("two", 5.0, 2.0)
    assert got["holds"] is True
    assert got["peers"][2] == {"peer": "three", "absent": "absent", "gate": None, "holds": None}
    assert report(row("less", 0.4), values)["holds"] is False
    assert report(row("less"), values)["peer"] == "one"
    assert report(row("less"), values)["holds"] is None


def test_peers_have_gates_of_their_own() -> None:
    values = {"ours": [10.0], "limit": [20.0], "one": [2.0], "two": [5.0]}

    def judged(gate: float | None, **gates: float) -> tuple[bool | None, bool | None, list[bool | None]]:
        got = report(replace(row("more", gate), peer_gates=gates), values)
        assert "nan" not in table([got])
        return got["holds"], got["gate_holds"], [peer["holds"] for peer in got["peers"]]

    assert judged(0.5) == (True, True, [None, None, None])
    assert judged(0.5, one=5, two=2) == (True, True, [True, True, None])
    assert judged(0.5, one=6) == (False, True, [False, None, None])
    assert judged(None, two=3) == (False, None, [None, False, None])
    assert judged(0.6, two=2) == (False, False, [None, True, None])
    assert judged(None, three=1) == (None, None, [None, None, None]), "one that is absent proves nothing"
    missed = table([report(replace(row("less"), peer_gates={"one": 2, "two": 1}), values)])
    assert missed.count("GATE MISSED") == 2 and "2 x peer" in missed


def test_what_is_absent_says_why_and_is_not_judged() -> None:
    values = {"limit": [20.0], "one": [2.0], "two": [5.0]}
    got = report(replace(row("less", 0.5), ours="not built", peer_gates={"one": 1}), values)
    assert list(got) == KEYS
    assert got["absent"] == "not built"
    assert [got[key] for key in ("ours", "ratio_limit", "ratio_peer", "spread", "gate_holds", "holds")] == [None] * 6
    assert (got["limit"], got["peer"], got["peer_value"]) == (20.0, "one", 2.0)
    assert "not built" in table([got])


def test_a_peer_that_fails_is_absent_and_ours_is_an_error() -> None:
    asked: list[str] = []

    def fails(name: str) -> float:
        asked.append(name)
        raise Failed(f"{name} hung")

    def good() -> float:
        return 1.0

    peers: dict[str, harness.Measure | str] = {"bad": partial(fails, "bad"), "good": good}
    (got,) = run([Row("x1", "", "", "less", good, good, "", peers, peer_gates={"bad": 0.1})], 3, lambda text: None)
    assert asked == ["bad"] and got["holds"] is None and got["peer"] == "good"
    assert got["peers"][0] == {"peer": "bad", "absent": "bad hung", "gate": 0.1, "holds": None}
    with pytest.raises(Failed, match="ours hung"):
        run([Row("x1", "", "", "less", partial(fails, "ours"), good, "")], 1, lambda text: None)


def test_spread() -> None:
    assert spread([5.0]) == 0
    assert spread([float(i) for i in range(1, 12)]) == pytest.approx((10 - 2) / 6)


def test_rounds_interleave_and_begin_with_another_each_time() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return 1.0

    rows = [Row(i, "", "", "more", partial(measure, f"{i} ours"), partial(measure, f"{i} limit"), "", {}) for i in ("a", "b")]
    results = run(rows, 2, lambda text: None)
    assert order == ["a ours", "a limit", "b ours", "b limit", "a limit", "a ours", "b limit", "b ours"]
    assert "a " in table(results)


def test_a_pair_meets_and_a_failed_one_is_an_error() -> None:
    def side(meet: harness.Meet) -> int:
        meet()
        return os.getpid()

    server, client = pair(side, side)
    assert len({server, client, os.getpid()}) == 3

    def fails(meet: harness.Meet) -> int:
        raise ValueError("on purpose")

    for sides in ((fails, side), (side, fails)):
        with pytest.raises(Failed):
            pair(*sides)


def document(name: str) -> dict[str, Any]:
    """What one quick round of a benchmark says."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench", name, "--quick", "--json", "--rounds", "1"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr  # 1: a gate is missed, as one round on a busy machine may
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["benchmark"] == name and said["quick"] is True and said["rounds"] == 1
    ids = [row["id"] for row in said["rows"]]
    assert len(set(ids)) == len(ids)
    for row in said["rows"]:
        assert list(row) == KEYS
        assert row["limit"] > 0 and (row["absent"] or row["ours"] > 0)
    return said


def test_paging_as_one_document() -> None:
    said = document("paging")
    assert {row["id"].split("-")[0] for row in said["rows"]} == {f"p{i}" for i in range(1, 15)}
    assert {row["id"].split("-")[0]: row["gate"] for row in said["rows"] if row["gate"]} == {
        "p2": 2000,
        "p3": 0.1,
        "p4": 3,
        "p5": 10,
        "p6": 3,
        "p8": 35,
        "p14": 3,
    }


def test_cpu_as_one_document() -> None:
    said = document("cpu")
    gates = {row["id"]: row["gate"] for row in said["rows"]}
    assert {name: gate for name, gate in gates.items() if gate} == {"t2": 2000, "s1": 5, "s2": 1, "s3": 5, "s4": 2}
    assert {name for name, gate in gates.items() if not gate} == {"t1", "t3", "x1", "s5-warp", "s5-plain"}


def test_rings_as_one_document() -> None:
    said = document("rings")
    assert {row["id"].split("-")[0] for row in said["rows"]} == {"a1", "a2", "a3", "a4", "a5", "a6"}
    assert {peer["peer"] for row in said["rows"] for peer in row["peers"]} >= {
        "os.pipe",
        "multiprocessing.Queue",
        "membridge",
    }


def test_syscalls_as_one_document() -> None:
    said = document("syscalls")
    rows = {row["id"]: row for row in said["rows"]}
    assert list(rows) == ["n1", "n2", "n3", "n4", "n5-1", "n5-4k", "f1", "f2", "f3", "f4", "p1", "p2"]
    gates = {id: row["gate"] for id, row in rows.items() if row["gate"] is not None}
    assert gates == {"n2": 60, "n3": 1, "f1": 15, "f2": 15, "p1": 12, "p2": 4}
    uml = {id: peer["gate"] for id, row in rows.items() for peer in row["peers"] if peer["peer"] == "User Mode Linux"}
    assert {id: gate for id, gate in uml.items() if gate is not None} == {"n1": 0.5, "f1": 1, "f2": 1}
    assert not any(rows[id]["absent"] for id in ("n1", "f1", "f2", "f3", "p1", "p2"))
    ours = {peer["peer"]: peer for peer in rows["n1"]["peers"]}
    assert all(ours[name]["value"] > 0.5 for name in ("ptrace, SYSEMU", "seccomp, user notification")), "intercepted, really"


def test_whoever_stops_it_finds_no_host_left(tmp_path: Path) -> None:
    bench = [sys.executable, ROOT / "scripts" / "bench", "events", "--quick", "--json"]
    with subprocess.Popen(bench, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL) as process:
        pidfd = os.pidfd_open(process.pid)
        while not list(tmp_path.glob("ring1-bench-*/state/control")):
            ended, _, _ = select.select([pidfd], [], [], 0.01)
            assert not ended, "it ended before it had a host"
        process.terminate()
        assert select.select([pidfd], [], [], TIMEOUT)[0]
        os.close(pidfd)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_not_there_or_ends_is_absent() -> None:
    assert places.peer("no-such-tool-of-ring1") == "no-such-tool-of-ring1 is not installed"
    assert "does not run here" in str(places.peer("false"))


def test_a_place_is_believed_when_it_answers_what_it_was_asked() -> None:
    script = "echo = ready 1; while read what n; do echo $what $n; echo = other 2; echo = $what 3.5; done"
    place = places.Command(["sh", "-c", script])
    assert places.begun(place) is place
    assert [place.ask("null", 5), place.ask("other", 5), place.ask("other", 5)] == [3.5, 2.0, 3.5]
    place.end()
    with pytest.raises(Failed, match="it ended"):
        place.ask("null", 5)
