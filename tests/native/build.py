"""python tests/native/build.py DIRECTORY: compile and link the kernels in C, as ABI.md section 3 asks for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PUBLIC = HERE.parent.parent / "hypervisor" / "public"
KERNELS = ("hello", "hostile", "paging", "exceptions")
COMPILE = [
    "gcc", "-c", "-std=c11", "-O2", "-ffreestanding", "-fpie", "-fno-stack-protector", "-fno-asynchronous-unwind-tables",
    "-fno-tree-loop-distribute-patterns", "-Wall", "-Wextra", "-Werror", f"-I{PUBLIC}",
]  # fmt: skip
LINK = ["gcc", "-nostdlib", "-static", "-no-pie", f"-Wl,-T,{HERE / 'kernel.lds'},--build-id=none,-z,noexecstack"]
POSITION_INDEPENDENT = {"R_X86_64_PC32", "R_X86_64_PLT32", "R_X86_64_PC64"}
SECONDS = 60


class BuildError(Exception):
    """What the compiler said, or which address cannot be."""


def build(name: str, directory: Path, source: Path | None = None) -> Path:
    """Link `name`.c (or `source`), `name`_*.c and kernel.c to a kernel in `directory`; returns the file. Raises BuildError."""
    parts = [source or HERE / f"{name}.c", *sorted(HERE.glob(f"{name}_*.c")), HERE / "kernel.c"]
    objects = [compile_object(path, directory) for path in parts]
    run([*LINK, *map(str, objects), "-o", str(directory / name)])
    return directory / name


def compile_object(source: Path, directory: Path) -> Path:
    """Raises BuildError also where the object has an address that the linker would make absolute."""
    out = directory / f"{source.stem}.o"
    run([*COMPILE, f"-I{HERE}", str(source), "-o", str(out)])
    kinds = set(re.findall(r"\bR_X86_64_\w+", run(["readelf", "-rW", str(out)])))
    if kinds - POSITION_INDEPENDENT:
        raise BuildError(f"{source.name}: {', '.join(sorted(kinds - POSITION_INDEPENDENT))}: an address in initialized data?")
    return out


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    for kernel in KERNELS:
        print(build(kernel, Path(sys.argv[1])))
