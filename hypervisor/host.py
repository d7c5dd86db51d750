"""What this host allows: probed once at start, by trying, and said by name; no silent weakening.

    required   seccomp filters (probed); POSIX shared memory and queues, pidfd and sealed memfd (used at once, and missed then)
    layer 1    the system-call filter
    layer 2    as root: a uid per domain and no capability; otherwise Landlock and not dumpable

The state directory's journal names every object before it is created, so that a start after any crash sweeps exactly its
own leftovers. Nothing in it survives a reboot, so it is not fsynced.
"""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import secrets
import stat
from pathlib import Path

import posix_ipc

from hypervisor.gate import boot, policy
from hypervisor.gate._gate import lib

CLONE_NEWIPC = 0x08000000
MCL_CURRENT = 1


class StartupError(Exception):
    """The host cannot run; one sentence for the user."""


class Host:
    """The state directory, locked, and what the probes found."""

    def __init__(self, state: Path) -> None:
        if platform.machine() != "x86_64" or platform.system() != "Linux":
            raise StartupError(f"ring1 runs on Linux x86-64, this is {platform.system()} {platform.machine()}")
        self.state = state
        self._check_directory()
        self._lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError(f"a host is running in {state} already") from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())
        self.swept = self._sweep()
        self._journal = os.open(
            state / "journal", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        self.instance = f"ring1-{secrets.token_hex(8)}"
        self.isolation: list[str] = []
        self.layers = 0
        self.own_uids = False
        self.landlock = 0
        self._probe()

    # ---- the state directory

    def _check_directory(self) -> None:
        try:
            info = self.state.lstat()
        except OSError as error:
            raise StartupError(f"state directory {self.state}: {error.strerror}") from None
        if not stat.S_ISDIR(info.st_mode):
            raise StartupError(f"state directory {self.state} is not a directory of its own (a link is not followed)")
        if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) != 0o700:
            raise StartupError(f"state directory {self.state} must be yours with mode 0700")

    def journal(self, line: str) -> None:
        """Name an object before it is created."""
        os.write(self._journal, f"{line}\n".encode())

    def close(self) -> None:
        """An orderly end leaves logs, and the lock, which goes free with this process."""
        for name in ("control", "journal"):
            (self.state / name).unlink(missing_ok=True)

    def _sweep(self) -> int:
        """Remove what the last run here left behind; returns how many objects."""
        try:
            lines = (self.state / "journal").read_text().splitlines()
        except FileNotFoundError:
            return 0
        swept = 0
        for line in lines:
            kind, _, name = line.partition(" ")
            if not name.startswith("/ring1-"):
                continue
            unlink = {"queue": posix_ipc.unlink_message_queue, "shm": posix_ipc.unlink_shared_memory}.get(kind)
            try:
                if unlink:
                    unlink(name)
                    swept += 1
            except posix_ipc.ExistentialError:
                pass
        self.close()
        return swept

    # ---- probes

    def _probe(self) -> None:
        self._say("seccomp filter", "layer 1", self._seccomp())
        if os.getuid() == 0 and self._can_setuid():
            self.own_uids = True
            self.layers = 2
            self._say("a uid per domain", "layer 2", "uids 900001.., no capability")
        abi = lib.landlock_abi()
        if abi > 0:
            self.landlock = abi
            scope = "files, TCP, sockets and signals outside" if abi >= 6 else "files only, no signal scope"
            if not self.own_uids:
                self.layers = 2 if abi >= 6 else 1
            self._say("Landlock", "layer 2", f"ABI {abi}: {scope}")
        else:
            self._say("Landlock", "layer 2", "MISSING: this kernel has none")
        if self.layers < 2:
            self.layers = 1
            self._say("layers", "warning", "ONE layer stands: the system-call filter alone holds a domain")
        self._say("not dumpable", "layer 2", "ptrace and /proc/PID of a domain refused to its own user")
        self._say("IPC namespace", "queues", self._namespace())
        self._say("locked memory", "hypervisor", self._lock_memory())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._say("descriptors", "limit", f"{hard} (was {soft})")

    def _say(self, what: str, kind: str, finding: str) -> None:
        self.isolation.append(f"{what}: {finding} [{kind}]")

    def _seccomp(self) -> str:
        try:
            boot.prctl(38, 1)  # PR_SET_NO_NEW_PRIVS would hold for our children too: they all set it anyway
        except OSError:
            raise StartupError("this kernel has no NO_NEW_PRIVS; domains cannot be isolated") from None
        actions = Path("/proc/sys/kernel/seccomp/actions_avail")
        if not actions.exists() or "kill_process" not in actions.read_text():
            raise StartupError("this kernel has no seccomp filters; domains cannot be isolated")
        return "default EPERM, attack-only calls kill, no mmap family, no new descriptor"

    def _can_setuid(self) -> bool:
        """By trying: in a user namespace getuid() is 0 and other uids do not exist."""
        pid = os.fork()
        if pid == 0:
            try:
                os.setresuid(900_001, 900_001, 900_001)
            except OSError:
                os._exit(1)
            os._exit(0)
        return os.waitpid(pid, 0)[1] == 0

    def _namespace(self) -> str:
        if not self.own_uids:
            return "shared with the host: 256 queues for all of an ordinary user's programs"
        if boot.libc.unshare(CLONE_NEWIPC):
            return "shared with the host (unshare refused)"
        try:
            Path("/proc/sys/fs/mqueue/queues_max").write_text("4096")
        except OSError as error:
            return f"our own, 256 queues ({error.strerror})"
        return "our own, 4096 queues"

    def _lock_memory(self) -> str:
        return "all of it (mlockall)" if not boot.libc.mlockall(MCL_CURRENT) else "no: RLIMIT_MEMLOCK is too small"

    def drop_privileges(self) -> None:
        """After dom0, which opens disks, was exec'ed: keep what the hypervisor lives by."""
        if self.own_uids:
            result = lib.keep_capabilities(policy.CAPABILITIES)
            assert result == 0, os.strerror(-result)
        boot.prctl(4, 0)  # not dumpable
