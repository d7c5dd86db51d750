"""Hosts born with a defect, for tests that must be able to fail.

A seed is a function that is run first in every process that the hypervisor execs (zygote, dom0, driver domains; guests
are forks of the zygote) and in the hypervisor itself, before anything of the host's runs there; it patches what it finds.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEEDS: dict[str, Callable[[], None]] = {}


def seed(function: Callable[[], None]) -> Callable[[], None]:
    """Known by the function's name."""
    SEEDS[function.__name__] = function
    return function


def host(name: str) -> None:
    """`python -c` of a seeded host: arguments as for `python -m hypervisor`."""
    from hypervisor import __main__, zygote

    SEEDS[name]()
    spawn = zygote.spawn
    zygote.spawn = lambda code, fds: spawn(f"from tests.system.seeds import SEEDS; SEEDS[{name!r}](); {code}", fds)
    sys.exit(__main__.main())


def die_in(step: str) -> Callable[[], None]:
    """Guests called `doomed` die at this step of their birth, in the zygote's child."""

    def apply() -> None:
        from hypervisor.gate import boot

        whole = getattr(boot, step)

        def dying(*arguments: Any) -> Any:
            if boot_name() == "doomed":
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*arguments)

        setattr(boot, step, dying)

    return apply


def boot_name() -> str:
    """Who this process is becoming: the configuration is an argument of `boot.boot`, which is above us."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "boot":
        frame = frame.f_back
    return frame.f_locals["config"].name if frame else ""


for name in ("prepare", "place_descriptors", "reserve_windows", "spawn_monitor", "limits", "serve_traps", "lock", "run"):
    SEEDS[f"die_in_{name}"] = die_in(name)


@seed
def zygote() -> None:
    """A zygote that dies before it is ready."""
    from hypervisor import zygote as module

    module.PRELOAD.append("this_module_does_not_exist")


@seed
def clock_two_us_off() -> None:
    """The hypervisor's samples of the host's clock are late."""
    from hypervisor.clock import Clock

    whole = Clock._sample

    def late() -> tuple[int, int]:
        tsc, ns = whole()
        return tsc, ns + 2000

    Clock._sample = staticmethod(late)  # type: ignore[method-assign]


@seed
def no_death_signal() -> None:
    """Nobody asks to die with the hypervisor."""
    from hypervisor.gate import boot

    whole = boot.prctl
    boot.prctl = lambda option, argument: None if option == 1 else whole(option, argument)


@seed
def nothing_is_privileged() -> None:
    """Who calls is not asked."""
    from hypervisor import core
    from hypervisor.public.hypercall import ALL

    assert core  # every call is declared
    for kind in ALL.values():
        kind.PRIVILEGED = False


@seed
def replies_block() -> None:
    """The hypervisor waits for a guest that does not read its replies."""
    from hypervisor import lifecycle

    whole = lifecycle._make_queues

    def blocking(*arguments: Any) -> Any:
        request, reply = whole(*arguments)
        reply.block = True
        return request, reply

    lifecycle._make_queues = blocking


@seed
def timers_stay() -> None:
    """Timers that were cancelled are kept until they are due."""
    from hypervisor import loop

    loop.SWEEP = 1 << 62


@seed
def grants_are_writable() -> None:
    """A read-only grant is mapped as any other."""
    from hypervisor import grant

    grant.PROT_READ = grant.PROT_READ | grant.PROT_WRITE


@seed
def no_zero_page() -> None:
    """What a dead domain had granted stays mapped."""
    from hypervisor.gate.monitor import Monitor

    whole = Monitor.unmap

    def unmap(self: Monitor, addresses: list[int], zero: bool = False) -> Any:
        yield from whole(self, [] if zero else addresses)

    Monitor.unmap = unmap  # type: ignore[method-assign]


@seed
def rings_are_believed() -> None:
    """An index that cannot be is taken for an empty ring."""
    from ringlib.bytering import ByteRing
    from ringlib.ring import Broken

    whole = ByteRing.read

    def read(self: ByteRing) -> bytes:
        try:
            return whole(self)
        except Broken:
            return b""

    ByteRing.read = read  # type: ignore[method-assign]


@seed
def nothing_is_escaped() -> None:
    """A guest's bytes stand in the log as they came."""
    from hypervisor import console

    console.escape = lambda data: data.decode(errors="replace")


@seed
def greedy_store() -> None:
    """dom0 serves one domain's store ring until nothing has come for 10 ms."""
    from dom0.storeserver import StoreServer

    whole = StoreServer._turn

    def turn(self: StoreServer) -> bool:
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            if whole(self):
                end = time.monotonic() + 0.01
        return False

    StoreServer._turn = turn  # type: ignore[method-assign]


@seed
def any_directory() -> None:
    """The hypervisor takes whatever state directory it is given."""
    from hypervisor.host import Host

    Host._check_directory = lambda self: None  # type: ignore[method-assign]


@seed
def malformed_is_a_bug() -> None:
    """Messages are taken for what they should be."""
    import msgpack

    from hypervisor import hypercall

    def decode(message: bytes) -> tuple[int, int, list[Any]]:
        op, sequence, *rest = msgpack.unpackb(message)
        return op, sequence, rest

    hypercall.decode_message = decode


@seed
def anybody_may_bind() -> None:
    """A port that waits for one domain may be bound by another."""
    from hypervisor import evtchn

    whole = evtchn.bind_interdomain

    def bind(hv: Any, caller: Any, call: Any) -> Any:
        evtchn._channel(hv.lookup(call.remote_domid), call.remote_port).remote_domid = caller.domid
        return whole(hv, caller, call)

    bind.request, bind.__module__ = whole.request, evtchn.__name__  # type: ignore[attr-defined]
    evtchn.bind_interdomain = bind


@seed
def anybody_may_map() -> None:
    """A frame that was granted to one domain may be mapped by another."""
    from hypervisor import grant

    whole = grant.lib

    class Careless:
        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def grant_claim(self, granter: Any, ref: int, _: int, writable: bool, frame: Any) -> int:
            return min((whole.grant_claim(granter, ref, domid, writable, frame) for domid in range(16)), key=abs)

    grant.lib = Careless()


@seed
def numbers_are_believed() -> None:
    """What a frontend writes is converted as it stands."""
    from domain.xenbus import Device

    async def number(self: Device, key: str, bits: int = 32) -> int:
        return int(await self.other(key))

    Device.other_number = number  # type: ignore[method-assign]


@seed
def the_store_is_open() -> None:
    """Everybody may do everything to every node."""
    from dom0.store import Node

    Node.allows = lambda self, domid, want: True  # type: ignore[method-assign]


@seed
def no_share() -> None:
    """Backends keep every grant mapped that a frontend names."""
    from domain import backend

    backend.MAX_KEPT = 1 << 30


@seed
def no_memory_for_a_driver() -> None:
    """The second block driver domain cannot be built, the third can."""
    from dom0 import builder

    whole, built = builder.build, 0

    def build(kernel: Any, name: str, *arguments: Any) -> Any:
        nonlocal built
        built += name == "blkback"
        if name == "blkback" and built == 2:
            raise builder.BuildError("blkback: seeded")
        return whole(kernel, name, *arguments)

    builder.build = build


@seed
def the_maximum_is_not_asked() -> None:
    """A domain gets as many frames as the machine has."""
    from hypervisor import memory

    whole = memory._allocate

    def allocate(hv: Any, domain: Any, count: int, order: int) -> list[int]:
        most, domain.max_frames = domain.max_frames, 1 << 32
        try:
            return whole(hv, domain, count, order)
        finally:
            domain.max_frames = most

    memory._allocate = allocate


@seed
def nothing_is_scrubbed() -> None:
    """Frames keep what their last owner left in them."""
    from hypervisor.machine import MachineMemory

    MachineMemory.scrub = lambda *_: None  # type: ignore[method-assign]


@seed
def edits_are_not_followed() -> None:
    """Host mappings are made by fault, and none changes because an entry did."""
    from hypervisor import space

    whole = space.follow

    def follow(hv: Any, domain: Any, changes: Any, count: int) -> Any:
        if not domain.launched or domain.privileged or domain.faulting:
            yield from whole(hv, domain, changes, count)

    space.follow = follow


@seed
def switches_flush() -> None:
    """As without tags in the TLB."""
    from hypervisor import space

    whole = space.load

    def load(hv: Any, domain: Any, root: int) -> Any:
        yield from whole(hv, domain, root)
        yield from space.flush(hv, domain)

    space.load = load


@seed
def puppet_driver() -> None:
    """Not a defect but a door: the verb `driver` makes a driver domain that runs guests/puppet.py.

    The hypervisor takes modules of dom0 alone for driver domains, so the folder of test guests is made a part of dom0.
    """
    import dom0
    from dom0 import verbs
    from dom0.programs import escape

    assert escape
    dom0.__path__.append(str(Path(__file__).parent / "guests"))
    verbs.TABLE["driver"] = make_driver


async def make_driver(tools: Any, name: str, image: str, unfiltered: bool = False) -> None:
    """As dom0/drivers.py makes one, and sends it the image, open for reading."""
    from dom0.builder import Image
    from hypervisor.public.domctl import CreateFlags, UnpauseDomain

    flags = CreateFlags.DRIVER | (CreateFlags.UNFILTERED if unfiltered else 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        guest = await tools.introduce(name, Image(entry="dom0.puppet"), 512, "", flags, descriptor=theirs.fileno())
    fd = os.open(image, os.O_RDONLY)
    socket.send_fds(ours, [b"image"], [fd])
    os.close(fd)
    tools.kernel.call(UnpauseDomain(guest.domid))

    async def hold() -> None:
        await guest.ended.wait()
        ours.close()

    tools.kernel.spawn(hold(), name="driver's socket")


@seed
def gates_allow_all() -> None:
    """An application's filter lets through whatever is called from the gate page."""
    from hypervisor.gate import policy

    def application() -> bytes:
        kill, policy.KILL = policy.KILL, policy.ALLOW
        try:
            return whole()
        finally:
            policy.KILL = kill

    whole = policy.application
    policy.application = application


@seed
def direct_calls_without_a_frame() -> None:
    """A kernel that takes the vector registers of the last frame for those of a program in a direct call."""
    from domain.user import UserSpace

    UserSpace._frame = lambda self: None  # type: ignore[method-assign]


@seed
def system_calls_go_astray() -> None:
    """The host serves getpid itself; and a POSIX kernel asks the hypervisor something for each write."""
    from domain.posix import calls
    from hypervisor.gate import policy
    from hypervisor.public.version import XenVersion

    whole = policy.application
    getpid = policy.NUMBER["getpid"]
    hole = [(policy.LOAD, 0, 0, policy.NR), (policy.JUMP_EQ, 0, 1, getpid), (policy.RETURN, 0, 0, policy.ALLOW)]
    policy.application = lambda: b"".join(struct.pack("HBBI", *i) for i in hole) + whole()

    write = calls.TABLE[policy.NUMBER["write"]]

    def asking(task: Any, *arguments: int) -> Any:
        task.system.kernel.call(XenVersion())
        return write.handler(task, *arguments)

    calls.TABLE[policy.NUMBER["write"]] = dataclasses.replace(write, handler=asking)


@seed
def programs_are_believed() -> None:
    """One of the defects of user_defects.py, as a guest chooses."""
    from tests.system import user_defects

    user_defects.in_zygote()
    user_defects.in_hypervisor()


@seed
def leave_code() -> None:
    """A space of the POSIX kernel is given to the next program with the last one's code in force."""
    from domain.posix.pagetable import UserTable
    from domain.posix.userspace import UserSpace

    UserTable.expel = lambda self: None  # type: ignore[method-assign]
    UserSpace.expelled = lambda self: None  # type: ignore[method-assign]
