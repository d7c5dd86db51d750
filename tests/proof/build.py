"""Our C without Python: copied, perhaps with a defect, and compiled together with a driver of tests/proof.

    path = program("kill.c", ["ringlib/ring.c"], PLAIN)
    path = program("kill.c", ["ringlib/ring.c"], PLAIN, {"ringlib/ring.h": [("these lines", "become these")]})

Programs are kept in build/proof and made again when something they depend on changed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.models.mutant import ROOT, Changes, changed

HERE = Path(__file__).resolve().parent
BUILT = ROOT / "build" / "proof"
HEADERS = ("ringlib/ring.h", "ringlib/ringlib.h", "hypervisor/hv.h", "domain/guest.h", "domain/net.h", "dom0/blk.h",
           "dom0/switch.h")  # fmt: skip
WARN = ("-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-unused-parameter")
SECONDS = 120  # to compile one program


class Tool(NamedTuple):
    """A compiler and what it is asked for."""

    name: str
    compiler: str
    flags: tuple[str, ...]

    @property
    def missing(self) -> str:
        """Why it cannot be used here, or nothing."""
        return _missing(self)


ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
PLAIN = Tool("plain", "gcc", ("-O2", "-Wl,-z,now"))  # as the modules are compiled
CHECKED = Tool("checked", "gcc", ("-O1", *ADDRESS))
TRAPPED = Tool("trapped", "gcc", ("-O1", "-mgeneral-regs-only", "-fno-builtin", "-fcf-protection=none"))
THREADS = Tool("threads", "clang", ("-O1", "-fsanitize=thread", "-pthread"))
FUZZER = Tool("fuzzer", "clang", ("-O1", "-fsanitize=fuzzer", *ADDRESS))


@functools.cache
def _missing(tool: Tool) -> str:
    """Compiling a program that does nothing is the only question whose answer counts: clang comes without its runtime."""
    if not shutil.which(tool.compiler):
        return f"{tool.compiler} is missing"
    entry = "LLVMFuzzerTestOneInput(const char *p, unsigned long n) { return *p + (int)n; }"
    text = f"int {entry if 'fuzzer' in tool.name else 'main(void) { return 0; }'}\n"
    with tempfile.TemporaryDirectory() as folder:
        command = [tool.compiler, *tool.flags, "-x", "c", "-", "-o", f"{folder}/probe"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS, check=False)
    return f"{tool.compiler} has no runtime for {tool.flags[1]}" if done.returncode else ""


def program(driver: str, sources: Sequence[str], tool: Tool, changes: Changes | None = None, extra: Iterable[str] = ()) -> Path:
    """The driver and `sources` of ours (paths from the root), with `changes` made in these or in headers.

    `extra`: more drivers. Raises AssertionError with what the compiler said.
    """
    changes = changes or {}
    texts = {path: changed(path, changes.get(path, ())) for path in (*HEADERS, *sources)}
    assert set(changes) <= set(texts)
    drivers = [HERE / driver, *(HERE / name for name in extra)]
    mine = [path.read_text() for path in (*drivers, *sorted(HERE.rglob("*.h")))]
    key = hashlib.sha256("\0".join([*tool.compiler, *tool.flags, *WARN, *texts.values(), *mine]).encode()).hexdigest()
    label = hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:8] if changes else "right"
    folder = BUILT / f"{Path(driver).stem}-{tool.name}-{label}"
    stamp, out = folder / "key", folder / "program"
    if out.exists() and stamp.exists() and stamp.read_text() == key:
        return out

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for path, text in texts.items():
            (Path(scratch) / Path(path).name).write_text(text)
        copies = [f"{scratch}/{Path(path).name}" for path in sources]
        where = [f"-I{scratch}", f"-I{HERE}", "-o", f"{scratch}/program"]
        command = [tool.compiler, *tool.flags, *WARN, *where, *map(str, drivers), *copies, "-pthread", "-lrt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr
        os.replace(f"{scratch}/program", out)
    stamp.write_text(key)
    return out
