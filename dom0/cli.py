"""`ring1`: the command line. Its words are those of `xl`; data goes to stdout, everything else to stderr.

Exit codes: 0 ok, 1 failed, 2 usage, 3 host not running, 4 no such domain or device; `run` ends with the guest's own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from dom0 import client, config
from dom0.client import Connection, HostError

P = ParamSpec("P")
R = TypeVar("R")
USAGE = 2
END_OF_FILE = b"\x04\x04"  # ctrl-D as a terminal has it: the first ends a line that was begun
END_OF_INPUT = b"\x04\n"  # ctrl-D, as the prompt of --repl has it

app = typer.Typer(
    name="ring1",
    help="A paravirtualizing hypervisor made of ordinary Linux processes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
firewall_app = typer.Typer(help="The rules of the virtual switch.", no_args_is_help=True)
app.add_typer(firewall_app, name="firewall")

Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]


def domain_names(incomplete: str) -> list[str]:
    """For the shell's completion: the domains that are there; none where no host is."""
    try:
        with Connection() as host:
            names = [row["name"] for row in host.ask("list-domains") if row["state"] != "dead"]
    except HostError:
        return []
    return [name for name in names if name.startswith(incomplete)]


Domain = Annotated[str, typer.Argument(help="name or number of a domain", metavar="DOMAIN", autocompletion=domain_names)]
Size = Annotated[str, typer.Argument(help="MiB, or with one of the letters b k m g t", metavar="SIZE")]


def say(line: str) -> None:
    typer.echo(line, err=True)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """A failure is one line on stderr and an exit code, never a traceback."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except HostError as error:
            say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except config.ConfigError as error:
            say(f"error: {error}")
            raise typer.Exit(USAGE) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(1) from None

    return wrapped


def show(value: Any, as_json: bool, table: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(value, indent=2, default=str))
    else:
        table()


def printable(text: Any) -> str:
    """Guests choose names and reasons: no byte of theirs reaches a terminal raw."""
    return re.sub(r"[^\x20-\x7e]", lambda m: m[0].encode("unicode_escape").decode(), str(text))


def columns(rows: list[dict[str, Any]], names: list[str]) -> None:
    """A table without lines, so that awk works."""
    cells = [[name.upper() for name in names]] + [[printable(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# ---- the host


@app.command()
@command
def up(frames: Annotated[int, typer.Option(help="of 4 KiB; default 256 MiB of them, or half of /dev/shm")] = 0) -> None:
    """Start a host: hypervisor, zygote, dom0 and its driver domains."""
    state = client.state_directory()
    pid = client.up(state, frames)
    say(f"ring1 is up in {state}: hypervisor {pid}")


@app.command()
@command
def down() -> None:
    """End every domain and the host."""
    client.down(client.state_directory())


@app.command()
@command
def dmesg() -> None:
    """The hypervisor's log."""
    with Connection() as host:
        sys.stdout.write(host.ask("dmesg"))


@app.command()
@command
def ledger(as_json: Json = False) -> None:
    """Everything the system holds: shared memory, queues, sockets, processes, frames, grants, ports."""
    with Connection() as host:
        book = host.ask("ledger")
    show(book, as_json, lambda: columns([{"what": k, "held": v} for k, v in book.items()], ["what", "held"]))


@app.command()
@command
def doctor(
    as_json: Json = False,
    hole: Annotated[bool, typer.Option("--seed-hole", help="leave the filter off, to see the self-test fail")] = False,
) -> None:
    """What this host enforces, and a self-test: escapes tried by native code in throw-away domains."""
    from dom0 import doctor as check

    report = check.examine(hole)
    show(report, as_json, lambda: check.print_report(report))
    if not report["ok"]:
        raise typer.Exit(1)


@app.command()
@command
def top(
    once: Annotated[bool, typer.Option("--once", "-b", help="one table, then end")] = False,
    delay: Annotated[float, typer.Option("--delay", "-d", min=0.1, help="seconds between tables")] = 2.0,
    as_json: Json = False,
) -> None:
    """Processes, hypercalls, events, rings, and I/O of every domain."""
    from dom0 import top as view

    view.run(once, delay, as_json)


@app.command()
@command
def demo(
    file: Annotated[Path | None, typer.Argument(help="what alice sends to bob; default: Python's own files")] = None,
    as_json: Json = False,
) -> None:
    """The main job: alice reads FILE from her disk and sends it to bob, who writes it to his."""
    from dom0 import demo as demonstration

    raise typer.Exit(demonstration.run(file, as_json))


# ---- domains


@app.command()
@command
def create(
    file: Annotated[Path, typer.Argument(help="configuration, TOML", metavar="FILE.toml")],
    paused: Annotated[bool, typer.Option("--paused", "-p", help="do not let it run yet")] = False,
    console: Annotated[bool, typer.Option("--console", "-c", help="attach its console")] = False,
) -> None:
    """Make a domain from its configuration."""
    from dom0 import terminal

    tree = config.to_tree(config.load(file))
    with Connection() as host:
        made = host.ask("create", tree=tree, paused=paused)
    say(f"{made['name']} is domain {made['domid']}")
    if console:
        raise typer.Exit(terminal.attach(str(made["domid"])).exit_code)


@app.command()
@command
def run(
    file: Annotated[str, typer.Argument(help="a guest program, or a native kernel", metavar="FILE.py")] = "",
    words: Annotated[list[str] | None, typer.Argument(help="with --ramdisk: PROGRAM ARGUMENT ...", metavar="[-- ...]")] = None,
    ramdisk: Annotated[Path | None, typer.Option(help="run PROGRAM of this cpio archive, an unmodified Linux program")] = None,
    name: Annotated[str, typer.Option(help="default: the file's")] = "",
    memory: Annotated[int, typer.Option(help="MiB; default 16, with --ramdisk 64")] = 0,
    maxmem: Annotated[int, typer.Option(help="MiB that mem-set can give it; default: as --memory")] = 0,
    disk: Annotated[list[str] | None, typer.Option(help="xvda=IMAGE[:r|:w], may be repeated")] = None,
    vif: Annotated[list[str] | None, typer.Option(help="an IPv4 address, may be repeated")] = None,
    cmdline: Annotated[str, typer.Option(help="handed to the kernel")] = "",
    repl: Annotated[bool, typer.Option("--repl", help="a Python prompt inside a locked domain")] = False,
    fast: Annotated[bool, typer.Option("--fast-syscalls", help="with --ramdisk: patch system calls in memory")] = False,
) -> None:
    """Create a domain, attach its console, remove it at the end; ends with the guest's exit code."""
    from dom0 import terminal

    if (ramdisk is None and bool(file) == repl) or (ramdisk and repl) or (words and not ramdisk):
        say("error: give a FILE, or --repl, or --ramdisk FILE -- PROGRAM")
        raise typer.Exit(USAGE)
    source = ramdisk or (Path(file) if file else Path(__file__).parent / "programs" / "repl.py")
    farewell = END_OF_FILE if ramdisk else END_OF_INPUT if repl else b""
    if ramdisk:
        cmdline, memory = shlex.join([file or "/bin/sh", *(words or [])]), memory or 64
    tree = {
        "name": name or re.sub(r"[^A-Za-z0-9_.-]", "-", source.stem)[:24].lstrip("-_.") + f"-{os.getpid()}",
        "kernel": str(source.absolute()),
        "memory": memory or 16,
        "maxmem": maxmem,
        "cmdline": cmdline,
        "fast_syscalls": fast,
        "disk": [_disk(text) for text in disk or []],
        "vif": [{"ip": text} for text in vif or []],
    }
    checked = config.to_tree(config.from_tree(tree).resolved(Path.cwd()))
    with Connection() as host:
        domid = str(host.ask("create", tree=checked)["domid"])
    raise typer.Exit(terminal.run(domid, farewell))


def _disk(text: str) -> dict[str, str]:
    name, _, rest = text.partition("=")
    image, colon, mode = rest.rpartition(":")
    return {"name": name, "image": image, "mode": mode} if colon and mode in ("r", "w") else {"name": name, "image": rest}


@app.command("list")
@command
def list_domains(as_json: Json = False) -> None:
    """The domains, and the last ones that ended, with the reason.

    Keys of --json: name, domid, state, memory_kib (owned now), maxmem_kib (owned at most), cpu_s, pid, reason, isolated.
    """
    with Connection() as host:
        rows = host.ask("list-domains")

    def table() -> None:
        for row in rows:
            row["reason"] = row["reason"] if row["isolated"] else f"not isolated {row['reason']}".strip()
        columns(rows, ["name", "domid", "state", "memory_kib", "maxmem_kib", "cpu_s", "pid", "reason"])

    show(rows, as_json, table)


@app.command()
@command
def info(domain: Annotated[str | None, typer.Argument(metavar="[DOMAIN]")] = None, as_json: Json = False) -> None:
    """One domain in full; without a name, the host."""
    with Connection() as host:
        facts = host.ask("info", name=domain) if domain else host.ask("host")
    show(facts, as_json, lambda: columns([{"what": k, "value": v} for k, v in facts.items()], ["what", "value"]))


@app.command()
@command
def console(domain: Domain) -> None:
    """Attach to a domain's console; ctrl-] at the beginning of a line leaves it."""
    from dom0 import terminal

    raise typer.Exit(terminal.attach(domain).exit_code)


def _simple(verb: str, domain: str, **arguments: Any) -> None:
    with Connection() as host:
        host.ask(verb, name=domain, **arguments)


@app.command()
@command
def pause(domain: Domain) -> None:
    """Stop a domain where it is."""
    _simple("pause", domain)


@app.command()
@command
def unpause(domain: Domain) -> None:
    """Let it go on, or begin."""
    _simple("unpause", domain)


@app.command()
@command
def shutdown(domain: Domain, timeout: Annotated[float, typer.Option(help="seconds to wait")] = 10.0) -> None:
    """Ask a domain to end, and wait for it."""
    _simple("shutdown", domain, seconds=timeout)


@app.command()
@command
def destroy(domain: Domain) -> None:
    """End a domain now."""
    _simple("destroy", domain)


@app.command("mem-set")
@command
def mem_set(
    domain: Domain,
    size: Size,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="until the domain owns so much")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="seconds to wait at most")] = 30.0,
    as_json: Json = False,
) -> None:
    """Ask a domain to own SIZE of memory: its balloon driver gives pages back to the machine, or gets more."""
    from dom0 import resize

    kib = resize.parse(size)
    with Connection() as host:
        facts = host.ask("mem-set", name=domain, kib=kib)
        if wait:
            facts = resize.follow(host, facts, timeout)
    show(facts, as_json, lambda: None)


@app.command("mem-max")
@command
def mem_max(domain: Domain, size: Size, as_json: Json = False) -> None:
    """Let a domain own at most SIZE of memory, whatever it asks for."""
    from dom0 import resize

    kib = resize.parse(size)
    with Connection() as host:
        facts = host.ask("mem-max", name=domain, kib=kib)
    show(facts, as_json, lambda: None)


# ---- ramdisks


@app.command()
@command
def ramdisk(
    output: Annotated[Path, typer.Option("-o", "--output", help="the archive", metavar="FILE")],
    tree: Annotated[Path | None, typer.Argument(help="what is to be in it", metavar="DIR")] = None,
    busybox: Annotated[Path | None, typer.Option(help="a static busybox, with all of its applets", metavar="FILE")] = None,
    program: Annotated[list[Path] | None, typer.Option(help="of the host, and its libraries; repeatable")] = None,
) -> None:
    """Pack a tree of the host as the root of a domain that runs programs of Linux. The same tree gives the same bytes."""
    from dom0 import ramdisk as archive

    if tree is None and busybox is None and not program:
        raise config.ConfigError("nothing to pack: name a DIR, --busybox, --program, or several")
    try:
        with open(output, "wb") as out:
            entries, size = archive.build(out, tree, busybox, programs=program or ())
    except (archive.RamdiskError, OSError) as error:
        output.unlink(missing_ok=True)
        raise HostError(str(error)) from None
    say(f"{output}: {entries} entries, {size} bytes")


@app.command()
@command
def sched(
    domain: Annotated[str, typer.Argument(metavar="[DOMAIN]", autocompletion=domain_names)] = "",
    weight: Annotated[int | None, typer.Option("--weight", "-w", help="beside those of the others; 256 at start")] = None,
    cap: Annotated[int | None, typer.Option("--cap", "-c", help="percent of one CPU at most; 0: no cap")] = None,
    warp: Annotated[int | None, typer.Option(help="us that it is preferred by when an event wakes it")] = None,
    warp_limit: Annotated[int | None, typer.Option(help="us that it runs so at most; 0: until it sleeps")] = None,
    unwarp: Annotated[int | None, typer.Option(help="us that it is not preferred after that limit")] = None,
    as_json: Json = False,
) -> None:
    """Who gets how much of the CPUs: show it, or with options change it for DOMAIN.

    Keys of --json: name, domid, weight, cap, warp_us, warp_limit_us, unwarp_us.
    """
    options = {"weight": weight, "cap": cap, "warp_us": warp, "warp_limit_us": warp_limit, "unwarp_us": unwarp}
    changes = {name: value for name, value in options.items() if value is not None}
    if changes and not domain:
        say("error: whose? give a DOMAIN")
        raise typer.Exit(USAGE)
    with Connection() as host:
        rows = host.ask("sched", name=domain, changes=changes)
    names = ["name", "domid", "weight", "cap", "warp_us", "warp_limit_us", "unwarp_us"]
    show(rows, as_json, lambda: columns(rows, names))


@app.command("vcpu-list")
@command
def vcpu_list(
    domain: Annotated[str, typer.Argument(metavar="[DOMAIN]", autocompletion=domain_names)] = "", as_json: Json = False
) -> None:
    """Where the virtual CPU of each domain is, and where its time went since its launch.

    Keys of --json: name, domid, vcpu, cpu, state (running, runnable, blocked, offline), scheduled (on, off: stopped, others
    have their turn; idle; -: never stopped), affinity, running_s, runnable_s, blocked_s, offline_s.
    """
    with Connection() as host:
        rows = host.ask("vcpu-list", name=domain)
    names = "name domid vcpu cpu state scheduled affinity running_s runnable_s blocked_s offline_s".split()
    show(rows, as_json, lambda: columns(rows, names))


# ---- firewall


@firewall_app.command("set")
@command
def firewall_set(file: Annotated[Path, typer.Argument(help="rules; - for stdin", metavar="FILE")]) -> None:
    """Replace all rules (the language: dom0/firewall.py)."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text()
    except OSError as error:
        raise HostError(f"{file}: {error.strerror}") from None
    with Connection() as host:
        host.ask("firewall-set", text=text)


@firewall_app.command("list")
@command
def firewall_list(as_json: Json = False) -> None:
    """The rules, and how many packets met each."""
    with Connection() as host:
        facts = host.ask("firewall-list")

    def table() -> None:
        columns([{"packets": n, "rule": rule} for rule, n in facts["rules"]], ["packets", "rule"])
        print(f"{facts['default']} met no rule; {facts['spoofed']} spoofed, {facts['malformed']} malformed")

    show(facts, as_json, table)


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
