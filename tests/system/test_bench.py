"""scripts/bench: what it computes, and that it runs (conftest sees whether it leaves anything)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks import harness
from scripts.benchmarks.harness import Failed, Row, pair, report, run, spread, table

ROOT = Path(__file__).resolve().parent.parent.parent
KEYS = (
    "id what unit better ours limit limit_is peer peer_value ratio_limit ratio_peer spread gate absolute gate_holds holds peers"
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
        assert row["ours"] > 0 and row["limit"] > 0
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
