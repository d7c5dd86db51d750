"""Programs as the distribution of the host has them, with ld.so and libraries, unmodified: they say what they say there."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dom0 import ramdisk
from tests.system.machine import Machine
from tests.system.test_posix import BUSYBOX, FRAMES, run

PROGRAMS = [Path(name) for name in ("/bin/bash", "/usr/bin/perl", "/usr/bin/sort", "/usr/bin/sha256sum", "/bin/ls")]
pytestmark = pytest.mark.skipif(
    not all(path.exists() for path in (BUSYBOX, *PROGRAMS)), reason="needs busybox-static, bash, perl and coreutils"
)


@pytest.fixture(scope="module")
def host() -> Iterator[Machine]:
    host = Machine(FRAMES)
    yield host
    host.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamic")
    out = io.BytesIO()
    ramdisk.build(out, None, BUSYBOX, programs=PROGRAMS)
    (folder / "root.cpio").write_bytes(out.getvalue())
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["/bin/bash", "-c", "for i in 3 1 2; do (echo $((i * i))); done | /usr/bin/sort -n; echo ${BASH_VERSION}; exit 5"],
        ["/bin/bash", "-c", "trap 'echo caught' USR1; kill -USR1 $$; read x < <(echo from a process); echo $x"],
        ["/usr/bin/perl", "-e", "%h = map { $_ => $_ ** 2 } 1 .. 500; print join(',', sort { $a <=> $b } values %h), qq(\\n)"],
        ["/usr/bin/perl", "-e", "pipe R, W; if (!fork) { print W 'child'; exit 3 } close W; print <R>; wait; print $? >> 8"],
        ["/usr/bin/sha256sum", "/usr/bin/perl"],
        ["/bin/ls", "-l", "--time-style=+", "--numeric-uid-gid", "/usr/bin/sha256sum"],
    ],
)
@pytest.mark.parametrize("fast", [False, True], ids=["trapped", "patched"])
def test_it_says_what_it_says_on_the_host(host: Machine, root: Path, words: list[str], fast: bool) -> None:
    there = subprocess.run(words, check=False, capture_output=True, text=True, env={}, cwd="/")
    assert there.stdout and not there.stderr
    assert run(host, root, *words, fast=fast) == (there.stdout, there.returncode)


def test_what_a_program_needs_is_packed_with_it() -> None:
    assert ramdisk.libraries(str(BUSYBOX)) == [] and ramdisk.interpreter("/bin/bash").startswith("/lib")
    needed = ramdisk.libraries("/bin/bash")
    assert any("libc.so" in name for name in needed) and all(Path(name).is_absolute() for name in needed)
