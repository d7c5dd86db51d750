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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.models.mutant import ROOT, Changes, changed

HERE = Path(__file__).resolve().parent
BUILT = ROOT / "build" / "proof"
HEADERS = (
    *("ringlib/ring.h", "ringlib/ringlib.h", "ringlib/shared.h", "ringlib/guard.h", "ringlib/spin.h"),
    *("hypervisor/hv.h", "hypervisor/pace.h", "domain/clock.h", "domain/guest.h", "domain/net.h"),
    *("dom0/blk.h", "dom0/switch.h"),
)
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
CHECKED = Tool("checked", "gcc", ("-O1", *ADDRESS, "-fsanitize=bounds-strict"))  # gcc: a last member is an array too
TRAPPED = Tool("trapped", "gcc", ("-O1", "-mgeneral-regs-only", "-fno-builtin", "-fcf-protection=none"))
THREADS = Tool("threads", "clang", ("-O1", "-fsanitize=thread", "-pthread"))
FUZZER = Tool("fuzzer", "clang", ("-O1", "-fsanitize=fuzzer", "-fno-sanitize-coverage=trace-cmp", *ADDRESS))


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


def program(driver: str, sources: Sequence[str], tool: Tool, changes: Changes | None = None) -> Path:
    """The driver and `sources` of ours (paths from the root), with `changes` made in these or in headers.

    Raises AssertionError with what the compiler said.
    """
    changes = changes or {}
    assert set(changes) <= {*HEADERS, *sources}
    ours = {path: changed(path, changes.get(path, ())) for path in HEADERS}
    theirs = {path.name: path.read_text() for path in sorted(HERE.glob("*.h"))}
    headers = {Path(path).name: text for path, text in ours.items()} | theirs
    texts = {path: changed(path, changes.get(path, ())) for path in sources}
    texts[f"tests/proof/{driver}"] = (HERE / driver).read_text()
    parts = []
    for path, text in texts.items():
        label = _label({name: changes[name] for name in (path, *HEADERS) if name in changes})
        out = BUILT / tool.name / f"{Path(path).stem}-{label}.o"
        parts.append(_made(out, tool, {Path(path).name: text} | headers, ["-c", Path(path).name]))
    keys = "".join(part.with_suffix(".key").read_text() for part in parts)
    out = BUILT / tool.name / f"{Path(driver).stem}-{_label(changes)}"
    return _made(out, tool, {}, [*map(str, parts), "-pthread", "-lrt"], keys)


def _label(changes: Changes) -> str:
    return hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:8] if changes else "right"


def _made(out: Path, tool: Tool, texts: dict[str, str], arguments: list[str], more: str = "") -> Path:
    """`out`, compiled anew unless it was made of the same texts by the same command."""
    command = [tool.compiler, *tool.flags, *WARN, *arguments]
    key = hashlib.sha256("\0".join([*command, *texts, *texts.values(), more]).encode()).hexdigest()
    stamp = out.with_suffix(".key")
    if out.exists() and stamp.exists() and stamp.read_text() == key:
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        for name, text in texts.items():
            (Path(scratch) / name).write_text(text)
        done = subprocess.run(
            [*command, "-o", "made"], cwd=scratch, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
        os.replace(f"{scratch}/made", out)
    stamp.write_text(key)
    return out
