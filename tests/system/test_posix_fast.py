"""Programs in a domain whose system calls are patched: `ring1 run --fast-syscalls` as its user has it."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dom0 import ramdisk
from tests.domain.posix.test_fast import native
from tests.system.machine import Machine
from tests.system.test_posix import BUSYBOX, FRAMES, run

SOURCES = Path(__file__).parents[1] / "domain/posix"
pytestmark = pytest.mark.skipif(not BUSYBOX.exists(), reason="needs busybox-static as /bin/busybox")


@pytest.fixture(scope="module")
def host() -> Iterator[Machine]:
    host = Machine(FRAMES)
    yield host
    host.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posix")
    (folder / "tree/bin").mkdir(parents=True)
    for name in ("fast", "programs"):
        program = str(folder / "tree/bin" / name)
        subprocess.run(["gcc", "-O1", "-static", "-pthread", str(SOURCES / f"{name}.c"), "-o", program], check=True)
    out = io.BytesIO()
    ramdisk.build(out, folder / "tree", BUSYBOX)
    (folder / "root.cpio").write_bytes(out.getvalue())
    return folder


@pytest.mark.parametrize("what", ["ids", "files", "old", "text", "restart", "threads", "tables", "steps", "moved"])
def test_a_program_cannot_tell(host: Machine, root: Path, what: str, tmp_path: Path) -> None:
    assert run(host, root, "fast", what, fast=True) == (native(root / "tree/bin/fast", what, tmp_path), 0)


@pytest.mark.parametrize("what", ["threads", "handlers", "memory"])
def test_nor_one_that_was_not_written_for_it(host: Machine, root: Path, what: str, tmp_path: Path) -> None:
    assert run(host, root, "programs", what, fast=True) == (native(root / "tree/bin/programs", what, tmp_path), 0)


def test_the_shell_cannot_tell(host: Machine, root: Path) -> None:
    script = """
        trap 'echo caught' USR1; kill -USR1 $$
        seq 500 >/tmp/f; while read a; do read b; done </tmp/f; echo $a $b $(tail -2 /tmp/f)
        for i in 1 2 3 4; do (echo $i | cat; exit $i) || echo $?; done | sort | tr 1-4 a-d
        tar cf - -C /bin fast | gzip -1 | gunzip | tar xOf - | cmp - /bin/fast; md5sum /tmp/f
        yes | head -c 100000 | wc -c; dd if=/bin/fast of=/tmp/g bs=999 2>/dev/null; cmp /bin/fast /tmp/g; kill -TERM $$; sleep 5
    """
    slow, fast = (run(host, root, "sh", "-c", script, fast=fast) for fast in (False, True))
    assert slow == fast
    assert slow[1] == 143 and slow[0].startswith("caught\n500 499 500\n"), slow


@pytest.mark.parametrize(
    ("how", "status"),
    [("table", "139"), ("code", "139"), ("readonly", "139"), ("position", "0"), ("data", ""), ("loop", "0"), ("jump 29", "0")],
)
def test_a_program_hurts_itself_alone(host: Machine, root: Path, how: str, status: str) -> None:
    output, code = run(host, root, "sh", "-c", f"fast {how} >/dev/null 2>&1; s=$?; fast files; fast ids; echo $s", fast=True)
    *after, last = output.split()
    assert (after, code) == (["files", "ids"], 0)
    assert status in ("", last)
