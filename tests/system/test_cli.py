"""The command `ring1` as its users have it: words, exit codes, what goes to stdout and stderr, and nothing of a guest's raw."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TIMEOUT
from tests.system.machine import GUESTS, Machine, until

RING1 = Path(sys.prefix) / "bin" / "ring1"
ECHO = """
async def main(kernel):
    while (line := await kernel.console.readline()) != "end\\n":
        print(line.upper(), end="")
    return 5
"""
NOT_PRELOADED = "sqlite3 is not preloaded, and a locked domain opens no file"
EVIL = "\x1b]0;owned\x07\x9b31m\u202e"
IDLE = GUESTS / "puppet.py"


def ring1(
    host: Machine | Path, *words: str | Path, stdin: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    state = host if isinstance(host, Path) else host.state
    env = {**os.environ, "RING1_STATE": str(state), "COLUMNS": "200", "NO_COLOR": "1", **(environment or {})}
    return subprocess.run([RING1, *words], input=stdin, env=env, check=False, capture_output=True, text=True, timeout=TIMEOUT)


def answer(host: Machine, *words: str | Path) -> Any:
    """The one JSON document on stdout, nothing on stderr, exit code 0."""
    done = ring1(host, *words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def refusal(host: Machine | Path, *words: str | Path, code: int = 1) -> str:
    """The one line on stderr, nothing on stdout."""
    done = ring1(host, *words)
    assert (done.returncode, done.stdout) == (code, ""), done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").rstrip()


def configuration(host: Machine, text: str) -> Path:
    path = host.work / "domain.toml"
    path.write_text(text)
    return path


# ---- what it shows


def test_list_has_its_columns(host: Machine) -> None:
    host.create("alice", IDLE, memory=3, maxmem=5)
    rows = {row["name"]: row for row in answer(host, "list")}
    assert list(rows)[:3] == ["dom0", "blkback", "netback"] and rows["alice"]["domid"] > 2
    for row in rows.values():
        kinds = {
            "name": str,
            "domid": int,
            "state": str,
            "memory_kib": int,
            "maxmem_kib": int,
            "cpu_s": float,
            "pid": int,
            "reason": str,
        }
        assert {name: type(row[name]) for name in kinds} == kinds and row["cpu_s"] >= 0
    alice = rows["alice"]
    assert (alice["state"], alice["memory_kib"], alice["maxmem_kib"]) == ("running", 3072, 5120)
    assert (alice["reason"], alice["isolated"]) == ("", True)
    assert not rows["dom0"]["isolated"]

    lines = [line.split() for line in ring1(host, "list").stdout.splitlines()]
    assert lines[0] == ["NAME", "DOMID", "STATE", "MEMORY_KIB", "MAXMEM_KIB", "CPU_S", "PID", "REASON"]
    assert ["alice", str(alice["domid"]), "running", "3072", "5120"] in [line[:5] for line in lines]
    host.ask("destroy", name="alice")
    assert ["alice", "dead", "destroyed"] in [[row["name"], row["state"], row["reason"]] for row in answer(host, "list")]


def test_info_of_a_domain_and_of_the_host(host: Machine) -> None:
    image = host.disk("a.img")
    guest = host.guest("alice", memory=4, disk=[{"name": "xvda", "image": str(image)}], cmdline="a b")
    guest.do("disk = await kernel.block(); await disk.read(0, 8)")
    facts = answer(host, "info", "alice")
    assert facts == {**answer(host, "info", str(guest.domid)), **{k: facts[k] for k in ("cpu_s", "cpu_ns")}}
    assert facts["hypercalls"] > 0 and facts["monitor_pid"] > 0 and facts["config"]["cmdline"] == "a b"
    assert facts["devices"] == [{"kind": "vbd", "handle": 51712, "backend": host.row("blkback")["domid"]}]
    assert [row["rd_bytes"] for row in facts["counters"]] == [4096]
    guest.destroy()

    facts = answer(host, "info")
    assert facts["pid"] == host.pid and facts["frames_total"] == 8192 == facts["frames_free"] + facts["frames_owned"]
    assert any("seccomp" in line for line in facts["isolation"]) and facts["layers"] >= 1
    assert "isolation" in ring1(host, "info").stdout


def test_ledger_is_everything(host: Machine) -> None:
    book = answer(host, "ledger")
    assert {"shm", "queues", "sockets", "processes", "grants", "ports", "frames_owned", "control_socket"} <= set(book)
    assert len(book["processes"]) == 8 and book["domains"] == ["dom0", "blkback", "netback"]
    assert book["control_socket"] == str(host.state / "control")
    assert re.search(r"^processes +\[", ring1(host, "ledger").stdout, re.M)


def test_what_frames_are_used_as_is_counted(host: Machine) -> None:
    """Of alice in the ledger: a root, an L2 and an L1, all of them mapped read-only; and in top."""
    host.create("alice", IDLE, memory=1)
    row = next(row for row in answer(host, "ledger")["paging"] if row["domain"] == "alice")
    assert (row["l1"], row["l2"], row["l3"], row["windows"]) == (1, 1, 1, 1)
    assert row["none"] + row["l1"] + row["l2"] + row["l3"] + row["writable"] == 256 == row["mapped"]
    shown = next(row for row in answer(host, "top", "--once")["rows"] if row["name"] == "alice")
    assert (shown["page_tables"], shown["pages_mapped"]) == (3, 256)
    host.ask("destroy", name="alice")


def test_dmesg_is_the_log(host: Machine) -> None:
    done = ring1(host, "dmesg")
    assert done.returncode == 0 and all(re.match(r"\[ *\d+\.\d{6}] ", line) for line in done.stdout.splitlines())
    assert re.search(rf"] ring1: 8192 frames, pid {host.pid}, 0 leftovers swept$", done.stdout.splitlines()[0])


# ---- the life of a domain, word by word


def test_a_life_in_commands(host: Machine) -> None:
    file = configuration(host, f'name = "alice"\nkernel = "{IDLE}"\nmemory = 2\n')
    done = ring1(host, "create", file, "--paused")
    assert (done.returncode, done.stdout) == (0, "") and re.fullmatch(r"alice is domain \d+\n", done.stderr)
    assert host.row("alice")["state"] == "paused"
    for word, state in (("unpause", "running"), ("pause", "paused"), ("unpause", "running")):
        done = ring1(host, word, "alice")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert host.row("alice")["state"] == state
    assert refusal(host, "create", file) == "a domain named alice runs already"
    assert refusal(host, "unpause", "alice") == "alice is running"
    assert ring1(host, "shutdown", "alice").returncode == 0
    assert host.row("alice")["reason"] == "poweroff"
    ring1(host, "create", file)
    assert ring1(host, "destroy", "alice").returncode == 0 and host.row("alice")["reason"] == "destroyed"


def test_up_and_down(tmp_path_factory: pytest.TempPathFactory) -> None:
    state = tmp_path_factory.mktemp("r") / "s"
    done = ring1(state, "up", "--frames", "4096")
    assert done.returncode == 0 and re.fullmatch(rf"ring1 is up in {state}: hypervisor \d+\n", done.stderr)
    assert refusal(state, "up") == f"a host is running in {state} already"
    assert ring1(state, "down").returncode == 0
    assert refusal(state, "down", code=3) == f"no host is running in {state}; `ring1 up` starts one"


# ---- exit codes


def test_exit_code_2_is_usage(host: Machine) -> None:
    for words in (
        ["nonsense"],
        ["list", "--nonsense"],
        ["destroy"],
        ["run"],
        ["run", "a.py", "--repl"],
        ["up", "--frames", "x"],
    ):
        done = ring1(host, *words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert done.stderr


def test_exit_code_3_is_no_host(tmp_path: Path) -> None:
    for words in (
        ["list"],
        ["info", "x"],
        ["dmesg"],
        ["ledger"],
        ["destroy", "x"],
        ["down"],
        ["run", str(IDLE)],
        ["top", "-b"],
    ):
        assert refusal(tmp_path / "none", *words, code=3).endswith("none; `ring1 up` starts one"), words


def test_exit_code_4_is_no_such_domain(host: Machine) -> None:
    for word in ("info", "destroy", "shutdown", "pause", "unpause", "console"):
        assert refusal(host, word, "nobody", code=4) == "no domain nobody; there are: blkback, netback"


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ('name = "x"\nkernel = "k"\nmemory = "much"\n', 3, "memory: expected `int`, got `str`"),
        ('name = "x"\n', 1, "kernel: this key is missing"),
        ('name = "x"\nkernel = "k"\n\ncolour = 1\n', 4, "colour: no such key"),
        ('name = "-"\nkernel = "k"\n', 1, "name: expected `str` matching regex"),
        ('name = "x"\nkernel = "k"\n[[disk]]\nname = "xvda"\nimage = "i"\nmode = "x"\n', 6, "disk[0].mode: invalid enum"),
        ('name = "x"\nkernel = "k"\n[[disk]]\nname = "hda"\nimage = "i"\n', 3, "disk[0]: hda: a virtual disk is called"),
        ('name = "x"\nkernel = "k"\n[[vif]]\n[[vif]]\nip = "10.0.0.256"\n', 4, "vif[1]: octet 256"),
    ],
)
def test_a_wrong_configuration_names_line_and_key(host: Machine, text: str, line: int, complaint: str) -> None:
    file = configuration(host, text)
    assert refusal(host, "create", file, code=2).lower().startswith(f"{file}: line {line}: {complaint}".lower())


def test_a_configuration_that_is_no_toml_names_its_line(host: Machine) -> None:
    file = configuration(host, 'name = "x"\nkernel = \n')
    assert re.match(rf"{file}: .*line 2", refusal(host, "create", file, code=2))
    assert "No such file" in refusal(host, "create", file.with_name("none.toml"), code=2)


# ---- run


def test_run_carries_a_program_s_input_and_output(host: Machine) -> None:
    """Byte for byte: stdout is the guest's, stderr ours. Its exit code is the command's."""
    program = host.program(ECHO)
    done = ring1(host, "run", program, stdin="one\ntwo\nend\n")
    assert (done.returncode, done.stdout, done.stderr) == (5, "ONE\nTWO\n", "")
    lines = "".join(f"line {i}\n" for i in range(20_000))  # more than every buffer on the way
    program = host.program("""
        import hashlib
        async def main(kernel):
            digest, line = hashlib.sha256(), ""
            while (line := await kernel.console.readline()) != "end\\n":
                digest.update(line.encode())
            print(digest.hexdigest())
    """)
    done = ring1(host, "run", program, stdin=f"{lines}end\n")
    assert (done.returncode, done.stdout) == (0, f"{hashlib.sha256(lines.encode()).hexdigest()}\n")


def test_run_gives_what_was_asked_for(host: Machine) -> None:
    image = host.disk("run.img", content=b"on the disk")
    program = host.program("""
        async def main(kernel):
            disk, net = await kernel.block("xvdb"), await kernel.net("eth0")
            print(kernel.name, kernel.cmdline, kernel.start.nr_pages, (await disk.read(0, 1))[:11], disk.readonly, net.ip)
    """)
    done = ring1(
        host, "run", program, "--name", "runner", "--memory", "5", "--cmdline", "x=1", "--disk", f"xvdb={image}:r",
        "--vif", "10.0.0.7",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "runner x=1 1280 b'on the disk' True 10.0.0.7\n")
    assert not [row for row in host.ask("list-domains") if row["name"] == "runner" and row["state"] != "dead"]


@pytest.mark.parametrize(
    ("program", "code", "out", "err"),
    [
        ("async def main(kernel):\n    return 255\n", 255, "", ""),
        ("async def main(kernel):\n    1 / 0\n", 1, "ZeroDivisionError: division by zero\n", "crash: main failed: ZeroDiv"),
        ("import sqlite3\nasync def main(kernel): pass\n", 1, NOT_PRELOADED, NOT_PRELOADED),
        ("print('no main')\n", 1, "no main\n", "cannot be started"),
        ("from domain._guest import lib\nlib.raw6(101, 0, 0, 0, 0, 0, 0)\n", 1, "", "SIGSYS: a forbidden system call"),
        ("async def main(kernel):\n    open('/etc/passwd')\n", 1, "PermissionError: [Errno 1]", "crash: main failed: Perm"),
    ],
)  # fmt: skip
def test_run_ends_as_its_program_does(host: Machine, program: str, code: int, out: str, err: str) -> None:
    done = ring1(host, "run", host.program(program))
    assert done.returncode == code and out in done.stdout and err in done.stderr
    assert "Traceback" not in done.stderr


def test_run_refuses_what_is_no_program(host: Machine) -> None:
    assert "No such file" in refusal(host, "run", host.work / "none.py")
    assert "line 1" in refusal(host, "run", host.program("this is no Python\n"))


def test_interrupting_run_ends_the_domain(host: Machine) -> None:
    program = host.program("async def main(kernel):\n    print('ready')\n    await kernel.sleep(3600)\n")
    environment = {**os.environ, "RING1_STATE": str(host.state)}
    command = [RING1, "run", program, "--name", "endless"]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
    assert until(lambda: host.row("endless")["state"] == "dead")


def test_a_prompt_in_a_locked_domain(host: Machine) -> None:
    typed = (
        "1 + 1\nfor i in (7, 8):\n    print(i)\n\nawait kernel.store.read('name')\n1 / 0\nimport sqlite3\nraise SystemExit(4)\n"
    )
    done = ring1(host, "run", "--repl", stdin=typed)
    out = done.stdout
    assert done.returncode == 4 and re.match(r"Python \d.\d+.\d+ in domain \d+, locked\. .*\n>>> 2\n>>> ", out)
    assert "7\n8\n" in out and re.search(r"'repl-\d+'\n", out) and "ZeroDivisionError: division by zero" in out
    assert f"ImportError: {NOT_PRELOADED}" in out


def test_the_end_of_its_input_ends_a_prompt(host: Machine) -> None:
    done = ring1(host, "run", "--repl", stdin="for i in range(2):\n    print(i + 40)")
    assert done.returncode == 0 and "40\n41\n" in done.stdout


def test_a_console_can_be_left_and_its_domain_lives_on(host: Machine) -> None:
    """Attached twice, each sees everything that was printed; the end of a pipe is no end of the domain."""
    host.create("echo", ECHO)
    first = ring1(host, "console", "echo", stdin="hello\nend\n")
    assert (first.returncode, first.stdout) == (5, "HELLO\n")
    assert ring1(host, "console", "echo").stdout == "HELLO\n", "its last words are kept"


# ---- what guests choose


def test_a_guest_s_bytes_are_raw_on_its_console_alone(host: Machine) -> None:
    """In list, info, dmesg, top and messages they are escaped."""
    program = host.program(f"""
        from hypervisor.public.console import ConsoleWrite
        async def main(kernel):
            print({EVIL!r})
            kernel.call(ConsoleWrite({EVIL.encode()!r}))
            raise ValueError({EVIL!r})
    """)
    done = ring1(host, "run", program, "--name", "evil")
    assert EVIL in done.stdout, "only here"
    texts = [done.stderr, *(ring1(host, *words).stdout for words in (["list"], ["info", "evil"], ["dmesg"], ["top", "--once"]))]
    texts += [ring1(host, *words, "--json").stdout for words in (["list"], ["info", "evil"])]
    assert "owned" in texts[0] and "owned" in texts[1]
    for text in texts:
        assert not set("\x1b\x07\x9b\u202e") & set(text), text


# ---- firewall


def test_firewall_rules_are_set_whole_or_not_at_all(host: Machine) -> None:
    before = answer(host, "firewall", "list")
    rules = host.work / "rules"
    rules.write_text("default drop\naccept udp from 10.0.0.1 to any port 53  # names\n")
    assert ring1(host, "firewall", "set", rules).returncode == 0
    assert answer(host, "firewall", "list")["rules"] == [["accept udp from 10.0.0.1 to any port 53", 0]]
    rules.write_text("default drop\naccept udp from nowhere\n")
    assert refusal(host, "firewall", "set", rules) == "firewall: line 2: 'nowhere' is not an address"
    assert answer(host, "firewall", "list")["rules"] == [["accept udp from 10.0.0.1 to any port 53", 0]]
    done = ring1(host, "firewall", "set", "-", stdin=before["text"])
    assert done.returncode == 0 and answer(host, "firewall", "list")["text"] == before["text"]


def test_as_many_rules_as_the_switch_has(host: Machine) -> None:
    before = answer(host, "firewall", "list")["text"]
    many = "default accept\n" + "".join(f"drop udp from 10.{i // 250}.{i % 250}.1 to any port {i + 1}\n" for i in range(1000))
    try:
        assert ring1(host, "firewall", "set", "-", stdin=many).returncode == 0
        assert len(answer(host, "firewall", "list")["rules"]) == 1000
        assert "at most" in ring1(host, "firewall", "set", "-", stdin=many + many.partition("\n")[2]).stderr
    finally:
        host.ask("firewall-set", text=before)
