"""python -m hypervisor --state DIR [--frames N] [--entry MODULE] [--cmdline TEXT]: run a host until dom0 ends it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from hypervisor.core import Hypervisor
from hypervisor.gate import boot
from hypervisor.host import Host, StartupError
from hypervisor.public.types import PAGE_SIZE

DEFAULT_FRAMES = 65536  # 256 MiB, or half of what /dev/shm has free


def default_frames() -> int:
    free = os.statvfs("/dev/shm")
    return min(DEFAULT_FRAMES, free.f_bavail * free.f_frsize // 2 // PAGE_SIZE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hypervisor")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=0)
    parser.add_argument("--entry", default="dom0.main")
    parser.add_argument("--cmdline", default="")
    options = parser.parse_args()
    os.umask(0o077)
    boot.libc.prctl(15, b"ring1/hypervisor\0", 0, 0, 0)
    try:
        host = Host(options.state)
        hv = Hypervisor(host, options.frames or default_frames())
    except (StartupError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    hv.log(f"ring1: {hv.machine.nr_frames} frames, pid {os.getpid()}, {host.swept} leftovers swept")
    for line in hv.isolation:
        hv.log(line)
    hv.boot_dom0(options.entry, f"state={shlex.quote(str(options.state))} {options.cmdline}".strip())
    why = hv.run()
    hv.log(f"ended: {why}")
    host.close()
    return 0 if not why.startswith("panic") else 1


if __name__ == "__main__":
    sys.exit(main())
