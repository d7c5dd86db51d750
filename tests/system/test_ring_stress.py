"""Many rings between several processes at once, every record checked; and ends that are killed at any instant."""

from __future__ import annotations

import itertools
import os
import random
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import posix_ipc
import pytest

from ringlib import Broken, SharedRing
from tests.conftest import NIGHTLY, TIMEOUT
from tests.ringlib.defects import Edit, compiled, copy
from tests.ringlib.peers import fork, new_name

WORKER = Path(__file__).with_name("ring_worker.py")
RECORDS = 600_000 if NIGHTLY else 50_000  # of each ring
KILLS = 600 if NIGHTLY else 40
PROCESSES = 4
SEED = 20030


def stress(records: int, environment: dict[str, str]) -> tuple[int, list[str]]:
    """Each process has a one-way and a two-way ring to every other one. Records checked, and what workers complained of."""
    ends: list[list[str]] = [[] for _ in range(PROCESSES)]
    names = []
    for ident, (front, back) in enumerate([*itertools.permutations(range(PROCESSES), 2)] * 2):
        ways = "one" if ident % 2 else "two"
        names.append(new_name())
        ends[front].append(f"front:{ways}:{ident}:{names[-1]}")
        ends[back].append(f"back:{ways}:{ident}:{names[-1]}")
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(SEED), str(records), *mine],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        for mine in ends
    ]
    checked, complaints = 0, []
    try:
        for worker in workers:
            out, error = worker.communicate(timeout=(20 if NIGHTLY else 4) * TIMEOUT)
            if worker.returncode:
                complaints.append(error)
            else:
                checked += int(out)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for name in names:
            try:
                posix_ipc.unlink_shared_memory(name)
            except posix_ipc.ExistentialError:
                pass
    return checked, complaints


@pytest.mark.timeout(600)
def test_many_rings_between_several_processes() -> None:
    checked, complaints = stress(RECORDS, {})
    assert not complaints, complaints[0]
    assert checked == RECORDS * 2 * PROCESSES * (PROCESSES - 1)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nobody looks between two instructions of one CPU")
def test_a_record_that_is_published_before_it_is_written_is_caught(tmp_path: Path) -> None:
    fill = "    ring_copy_in(f->sh, old, f->nr_ents, f->slot_size, requests, f->req_size, n);\n"
    push = "    return ring_push(&f->sh->req_prod, &f->sh->req_event, old, old + n);\n"
    account = "    f->req_prod_pvt = old + n;\n"
    gap = "    for (volatile int i = 0; i < 20000; i++)\n        ;\n"  # some 10 us, so that somebody does look
    early = push.replace("return", "int32_t r =") + gap + fill + "    return r;\n"
    copy(tmp_path, Edit("ring.h", fill + account + push, account + early))
    built = compiled(tmp_path, tmp_path / "ring.c", tmp_path / "shared.c")
    _, complaints = stress(10_000, {"RINGLIB_BUILT": str(built)})
    assert any("AssertionError" in text for text in complaints)


# ---- killed at any instant


def record(i: int) -> bytes:
    body = struct.pack("<Q", i).ljust(60, b"%c" % (i % 251))
    return body + struct.pack("<I", zlib.crc32(body))


def number(data: bytes) -> int:
    assert struct.unpack("<I", data[60:])[0] == zlib.crc32(data[:60]), "a torn record"
    value: int = struct.unpack_from("<Q", data)[0]
    return value


def send_for_ever(name: str, seed: int) -> None:
    dice, i = random.Random(seed), 0
    ring = SharedRing.create(name, 64, pages=1)
    while True:
        n = dice.randint(1, ring.nr_ents)
        ring.put(b"".join(record(i + j) for j in range(n)))
        i += n


@contextmanager
def started(target: Any, *arguments: object) -> Iterator[BaseProcess]:
    child = fork.Process(target=target, args=arguments)
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()


def test_a_front_that_is_killed_leaves_whole_records() -> None:
    dice = random.Random(SEED)
    for kill in range(KILLS):
        name, got = new_name(), 0
        with started(send_for_ever, name, kill) as child:
            with SharedRing.attach(name, TIMEOUT) as ring, pytest.raises(Broken, match="died"):
                until = dice.randint(0, 2000)
                while True:
                    batch = ring.get(dice.randint(1, 99), TIMEOUT)
                    for at in range(0, len(batch), 64):
                        assert number(batch[at : at + 64]) == got
                        got += 1
                    if got >= until:
                        child.kill()
            assert got >= until
        posix_ipc.unlink_shared_memory(name)


def answer_for_ever(name: str, seed: int, attached: Any) -> None:
    dice = random.Random(seed)
    ring = SharedRing.attach(name)
    attached.set()
    while True:
        batch = ring.get(dice.randint(1, 20))
        ring.put(batch)


def test_backs_that_are_killed_lose_and_repeat_nothing() -> None:
    """One front, one back after the other: each takes again what the last one left unanswered."""
    dice, attached = random.Random(SEED), fork.Event()
    sent = answered = 0
    with SharedRing.create(new_name(), 64, 64, pages=1) as ring:
        for kill in range(KILLS):
            attached.clear()
            with started(answer_for_ever, ring.name, kill, attached) as child:
                assert attached.wait(TIMEOUT)
                until = answered + dice.randint(1, 2000)
                with pytest.raises(Broken, match="died"):
                    while True:
                        n = dice.randint(1, ring.nr_ents)
                        ring.put(b"".join(record(sent + i) for i in range(n)), TIMEOUT)
                        sent += n
                        for data in whole(ring.get(timeout=TIMEOUT)):
                            assert number(data) == answered
                            answered += 1
                        if answered >= until:
                            os.kill(child.pid or 0, signal.SIGKILL)
        attached.clear()
        with started(answer_for_ever, ring.name, 0, attached):
            assert attached.wait(TIMEOUT)
            while answered < sent:
                for data in whole(ring.get(timeout=TIMEOUT)):
                    assert number(data) == answered
                    answered += 1


def whole(batch: bytes) -> list[bytes]:
    return [batch[at : at + 64] for at in range(0, len(batch), 64)]
