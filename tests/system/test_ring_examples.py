"""examples/: the pair that moves a file, of several sizes; and that each notices what goes wrong with the other."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ringlib import SharedRing, Slots
from tests.conftest import TIMEOUT
from tests.ringlib.peers import fork, new_name, process

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def loaded() -> Any:
    """The producer as a module, for its names."""
    spec = importlib.util.spec_from_file_location("example_producer", EXAMPLES / "producer.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PRODUCER = loaded()


@contextmanager
def started(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, str(EXAMPLES / f"{script}.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def said(child: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it printed, once it has ended."""
    out, _ = child.communicate(timeout=TIMEOUT)
    return child.returncode, out


@pytest.mark.parametrize("size", [0, 1, PRODUCER.SLOT, 20 * PRODUCER.SLOT + 12_345])
def test_a_file_arrives(tmp_path: Path, size: int) -> None:
    name, original, copy = new_name(), tmp_path / "original", tmp_path / "copy"
    original.write_bytes(random.Random(size).randbytes(size))
    copy.write_bytes(b"what was there before, and may be longer")
    with started("consumer", copy, "--name", name) as consumer, started("producer", original, "--name", name) as producer:
        code, out = said(producer)
        assert code == 0 and out.startswith(f"sent {size} bytes") and out.endswith("the same arrived\n"), out
        assert said(consumer) == (0, f"received {size} bytes, checksum right\n")
    assert copy.read_bytes() == original.read_bytes()


def lie(name: str, data: bytes, digest: bytes) -> None:
    """A producer whose checksum is another file's."""
    with SharedRing.create(name, PRODUCER.CHUNK.size, PRODUCER.ANSWER.size, payload=PRODUCER.SLOT * 2) as ring:
        slots = Slots(ring, PRODUCER.SLOT)
        slots[0][: len(data)] = data
        slots[1][: len(digest)] = digest
        ring.put(PRODUCER.CHUNK.pack(0, 0, len(data)) + PRODUCER.CHUNK.pack(len(data), 1, 0))
        answers = b""
        while len(answers) < 2 * PRODUCER.ANSWER.size:
            answers += ring.get(timeout=TIMEOUT)
        assert list(PRODUCER.ANSWER.iter_unpack(answers)) == [(0, 1), (1, 0)]


def test_a_wrong_checksum_is_noticed(tmp_path: Path) -> None:
    name = new_name()
    with started("consumer", tmp_path / "copy", "--name", name) as consumer, process(lie, name, b"data", bytes(32)):
        assert said(consumer) == (1, "received 4 bytes, CHECKSUM WRONG\n")


def refuse(name: str) -> None:
    """A consumer that found something else."""
    with SharedRing.attach(name, TIMEOUT) as ring:
        for batch in iter(lambda: ring.get(timeout=TIMEOUT), b""):
            ring.put(b"".join(PRODUCER.ANSWER.pack(slot, length > 0) for _, slot, length in PRODUCER.CHUNK.iter_unpack(batch)))


def test_a_copy_that_is_another_is_noticed(tmp_path: Path) -> None:
    name, original = new_name(), tmp_path / "original"
    original.write_bytes(b"data")
    with process(refuse, name), started("producer", original, "--name", name) as producer:
        code, out = said(producer)
        assert code == 1 and "something else arrived" in out


def hang(name: str, attached: Any) -> None:
    with SharedRing.attach(name, TIMEOUT) as ring:
        ring.get(timeout=TIMEOUT)
        attached.set()
        os.read(os.pipe()[0], 1)


def leave(name: str) -> None:
    with SharedRing.attach(name, TIMEOUT) as ring:
        ring.get(timeout=TIMEOUT)


def test_who_is_left_alone_says_so(tmp_path: Path) -> None:
    name, original, attached = new_name(), tmp_path / "original", fork.Event()
    original.write_bytes(b"data")
    with process(hang, name, attached) as child, started("producer", original, "--name", name) as producer:
        assert attached.wait(TIMEOUT)
        child.kill()
        assert said(producer) == (1, "producer: the peer died\n")
    with process(leave, name), started("producer", original, "--name", name) as producer:
        code, out = said(producer)
        assert code == 1 and "closed" in out
    with started("consumer", tmp_path / "copy", "--name", name, "--wait", 0.01) as consumer:
        code, out = said(consumer)
        assert code == 1 and "no shared memory" in out
