"""The other end of the control socket: finding a host, starting and ending one, asking it."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack

UP_SECONDS = 30.0
DOWN_SECONDS = 30.0
LOOK_SECONDS = 0.01  # how often `up` looks whether the host it started listens


class HostError(Exception):
    """The command failed; `exit_code` says how."""

    def __init__(self, why: str, exit_code: int = 1) -> None:
        super().__init__(why)
        self.exit_code = exit_code


def state_directory() -> Path:
    """$RING1_STATE, else $XDG_RUNTIME_DIR/ring1, else /run/ring1 for root and /tmp/ring1-UID for others."""
    if named := os.environ.get("RING1_STATE"):
        return Path(named).absolute()
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "ring1"
    return Path("/run/ring1") if os.getuid() == 0 else Path(f"/tmp/ring1-{os.getuid()}")


class Connection:
    """One connection to a running host. Raises HostError (exit code 3) where there is none."""

    def __init__(self, state: Path | None = None) -> None:
        self.state = state or state_directory()
        self._unpacker = msgpack.Unpacker()
        self._check_owner()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.connect(str(self.state / "control"))
        except OSError:
            self._sock.close()
            raise self._nobody() from None

    def _check_owner(self) -> None:
        """A socket that somebody else put there would be handed our requests."""
        try:
            info = self.state.lstat()
        except OSError:
            raise self._nobody() from None
        if not stat.S_ISDIR(info.st_mode) or info.st_uid not in (0, os.getuid()):
            raise HostError(f"state directory {self.state} is not ours")

    def _nobody(self) -> HostError:
        return HostError(f"no host is running in {self.state}; `ring1 up` starts one", exit_code=3)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def ask(self, do: str, **arguments: Any) -> Any:
        """The verb's result (dom0/verbs.py). Raises HostError."""
        self.send({"do": do, **arguments})
        reply = next(self.messages(), None)
        if reply is None:
            raise HostError("the host ended", exit_code=3)
        if "error" in reply:
            raise HostError(reply["error"], exit_code=reply["exit"])
        return reply["ok"]

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._sock.sendall(msgpack.packb(message))
        except OSError:
            raise HostError("the host ended", exit_code=3) from None

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it sends, until it ends."""
        while True:
            yield from self._unpacker
            if not self.feed():
                return

    def feed(self) -> bool:
        """Read once; False at the end."""
        try:
            data = self._sock.recv(65536)
        except OSError:
            return False
        self._unpacker.feed(data)
        return bool(data)

    def ready(self) -> Iterator[dict[str, Any]]:
        """Whole messages that came already."""
        yield from self._unpacker


def is_running(state: Path) -> bool:
    try:
        Connection(state).__exit__(None, None, None)
    except HostError:
        return False
    return True


def up(state: Path, frames: int = 0) -> int:
    """Start a host in `state`; returns the hypervisor's pid once dom0 listens. Raises HostError."""
    try:
        state.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise HostError(f"state directory {state}: {error.strerror}") from None
    if is_running(state):
        raise HostError(f"a host is running in {state} already")
    log = _open_log(state)
    command = [sys.executable, "-I", "-m", "hypervisor", "--state", str(state)]
    with log:
        process = subprocess.Popen(
            command + ([f"--frames={frames}"] if frames else []),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
        )  # fmt: skip
    return _await_ready(state, process)


def _open_log(state: Path) -> Any:
    """Only in a directory that is real and ours: the hypervisor checks the same, but we write there first."""
    info = state.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) != 0o700:
        raise HostError(f"state directory {state} must be a directory of its own (no link), yours, with mode 0700")
    log = state / "hypervisor.log"
    if log.exists():
        log.replace(state / "hypervisor.log.1")  # the last run's, for who wants to know why it ended
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(log, flags, 0o600), "wb")


def _await_ready(state: Path, process: subprocess.Popen[bytes]) -> int:
    pidfd = os.pidfd_open(process.pid)
    end = time.monotonic() + UP_SECONDS
    try:
        while time.monotonic() < end:
            ended, _, _ = select.select([pidfd], [], [], LOOK_SECONDS)
            if ended:
                process.wait()
                break
            if _serves(state, process.pid):
                process.returncode = 0  # it lives on by itself
                return process.pid
        else:
            process.kill()
            process.wait()
    finally:
        os.close(pidfd)
    said = (state / "hypervisor.log").read_bytes().decode(errors="replace").strip().splitlines()
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    raise HostError(errors[-1] if errors else "\n".join(["the host did not start; it said last:", *said[-5:]]))


def _serves(state: Path, pid: int) -> bool:
    """Whether the host that listens there is the one whose hypervisor is `pid`."""
    try:
        with Connection(state) as host:
            served: bool = host.ask("hello")["hypervisor_pid"] == pid
            return served
    except HostError:
        return False


def down(state: Path) -> None:
    """End the host and wait until nothing of it runs. Raises HostError."""
    with Connection(state) as host:
        host.send({"do": "down"})
        for _ in host.messages():
            pass
    _await_unlocked(state)


def _await_unlocked(state: Path) -> None:
    """The hypervisor holds the lock to its last breath."""
    fd = os.open(state / "lock", os.O_RDWR | os.O_CLOEXEC)
    try:
        end = time.monotonic() + DOWN_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise HostError(f"the host in {state} does not end") from None
                select.select([], [], [], LOOK_SECONDS)
    finally:
        os.close(fd)
