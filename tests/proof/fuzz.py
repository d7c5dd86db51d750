"""Plays against our C: `scripts/fuzz [--runs N] [TARGET ...]`, and what test_fuzz.py runs.

A target is fuzz_TARGET.c with the C that it questions, under the address and undefined-behaviour sanitizers. libFuzzer makes
the plays; where clang is missing, generate.c makes random ones, which is worse and better than nothing. Either makes the same
ones for the same seed. What was found once is kept in corpus/TARGET and played again each time.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.models.mutant import Changes
from tests.proof.build import BUILT, CHECKED, FUZZER, HERE, Tool, program

TOTAL = 20_000_000  # executions of a night, over all targets
SEED = 1
NIGHT = 8 * 3600.0  # seconds
LONGEST = 200  # bytes of a play
PLAYS = 200  # random ones that libFuzzer begins with: from none it is slow to get anywhere


class Target(NamedTuple):
    """What it links, and its share of the executions, in hundredths."""

    sources: tuple[str, ...]
    share: int


TARGETS = {
    "ring": Target(("ringlib/ring.c",), 25),
    "blk": Target(("dom0/blk.c",), 10),
    "switch": Target(("dom0/switch.c",), 15),
    "net": Target(("domain/net.c",), 15),
    "callring": Target(("hypervisor/callring.c", "hypervisor/evtchn.c", "domain/guest.c"), 15),
    "grant": Target(("hypervisor/grant.c", "hypervisor/frames.c", "domain/guest.c"), 20),
}


class Result(NamedTuple):
    """How it ended: sound, or what the target or a sanitizer said, and the play that showed it where there is one."""

    sound: bool
    says: str
    play: Path | None


def engine() -> Tool:
    return CHECKED if FUZZER.missing else FUZZER


def build(name: str, changes: Changes | None = None, tool: Tool | None = None) -> Path:
    tool = tool or engine()
    generator = [] if tool is FUZZER else ["tests/proof/generate.c"]
    return program(f"fuzz_{name}.c", [*TARGETS[name].sources, *generator], tool, changes)


def play(name: str, runs: int, changes: Changes | None = None, tool: Tool | None = None, seed: int = SEED) -> Result:
    """`runs` executions. A play that shows something is kept in build/proof/found, where the engine can tell which it was."""
    path = build(name, changes, tool)
    if (tool or engine()) is CHECKED:
        return _run([str(path), str(runs), str(seed)])
    found = BUILT / "found"
    found.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        dice = random.Random(seed)
        for i in range(PLAYS):
            (Path(scratch) / f"{i:03}").write_bytes(dice.randbytes(LONGEST))
        options = f"-runs={runs} -seed={seed} -keep_seed=1 -max_len={LONGEST} -len_control=0 -timeout=20"
        return _run([str(path), *options.split(), f"-artifact_prefix={found}/{name}-", scratch])


def replay(path: Path, changes: Changes | None = None) -> Result:
    """A play of the corpus."""
    return _run([str(build(path.parent.name, changes)), str(path)])


def corpus() -> list[Path]:
    """What showed something once: corpus/TARGET/what-it-showed."""
    return sorted(path for path in (HERE / "corpus").glob("*/*") if path.parent.name in TARGETS)


def _run(command: list[str]) -> Result:
    """The sanitizers as they are by default, whatever the environment says, but for leaks: they cannot be looked for here."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", timeout=NIGHT, check=False
    )
    text = done.stdout + done.stderr
    play = next((Path(line.split()[-1]) for line in text.splitlines() if "Test unit written to" in line), None)
    return Result(done.returncode == 0, text, play if play and play.exists() else None)


def share(name: str, total: int) -> int:
    return total * TARGETS[name].share // 100


def main() -> int:
    text = str(__doc__).partition("\n\n")[2]
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=text)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--runs", type=int, default=TOTAL, help="executions, if all targets are run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="another number, other plays")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}")
    if FUZZER.missing:
        print(f"{FUZZER.missing}: random plays only")
    bad = 0
    for name in options.targets or TARGETS:
        runs = share(name, options.runs)
        result = play(name, runs, seed=options.seed)
        print(f"{name}: {runs} executions, {'sound' if result.sound else 'NOT SOUND'}", flush=True)
        if not result.sound:
            bad += 1
            print(result.says[-4000:], f"the play: {result.play}; again: {build(name)} {result.play}", sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
