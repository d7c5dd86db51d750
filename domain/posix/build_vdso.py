"""Link vdso.c to `linux-vdso.so.1`, a file of one page that needs nothing and nobody."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPILE = "-std=gnu11 -O2 -Wall -Wextra -Werror -ffreestanding -fpic -fvisibility=hidden -fno-stack-protector"
LINK = "-soname=linux-vdso.so.1 --hash-style=both --build-id=none --eh-frame-hdr -z,max-page-size=4096"


def build(folder: Path) -> None:
    """Into `folder`. Raises CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    script, source, target = (str(path) for path in (HERE / "vdso.lds", HERE / "vdso.c", folder / "linux-vdso.so.1"))
    options = ["-shared", "-nostdlib", *(f"-Wl,{word}" for word in (*LINK.split(), f"-T,{script}"))]
    subprocess.run([os.environ.get("CC", "gcc"), *COMPILE.split(), *options, source, "-o", target], check=True)


if __name__ == "__main__":
    build(HERE)
