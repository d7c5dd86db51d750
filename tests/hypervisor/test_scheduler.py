"""The scheduler over real processes: who is stopped, what the clocks say, and that it stays out of the way.

The domains are records, their processes children of the test that burn CPU or sleep; the hypervisor's loop runs here. All of
them share one CPU. Shares are parts of what all of them ran, so that whatever else the machine does changes nothing.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypervisor import bvt, scheduler
from hypervisor.bvt import Params
from hypervisor.clock import run_state, virtual_ns
from hypervisor.domain import Domain, Process
from hypervisor.loop import Loop
from hypervisor.public.clock import RunState
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.errors import Invalid, NoSuchDomain
from hypervisor.public.scheduler import MAX_CAP, MAX_WARP_US, MAX_WEIGHT, SchedulerCommand, SchedulerOp, SchedulerParams
from hypervisor.scheduler import Scheduler, State
from tests.conftest import TIMEOUT
from tests.models.stand_in import StandIn

BEGIN = "import os\nos.sched_setaffinity(0, {{{cpu}}})\nos.write({tell}, b'!')\n"
BURN = "while True: pass"
SLEEP = "import signal\nwhile True: signal.pause()"
SECOND = 1_000_000_000


class Host:
    """A scheduler of one CPU, and the children that it arbitrates."""

    def __init__(self) -> None:
        self.cpu = min(os.sched_getaffinity(0))
        self.loop = Loop()
        self.scheduler = Scheduler(self.loop, frozenset({self.cpu}))
        self.children: list[subprocess.Popen[bytes]] = []
        self.domains: list[Domain] = []

    def domain(self, code: str = BURN, flags: CreateFlags = CreateFlags.NONE, **params: int) -> Domain:
        """One whose process has begun, on our CPU, and takes part."""
        begun, tell = os.pipe()
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", BEGIN.format(cpu=self.cpu, tell=tell) + code], pass_fds=[tell]
        )  # fmt: skip
        os.close(tell)
        assert select.select([begun], [], [], TIMEOUT)[0] and os.read(begun, 1) == b"!"
        os.close(begun)
        domain = Domain(len(self.domains) + 1, f"dom{len(self.domains) + 1}", flags)
        domain.process = Process(child.pid, os.pidfd_open(child.pid))
        domain.state, domain.launched, domain.launched_ns = "running", True, time.monotonic_ns()
        domain.share.set(**params)
        self.children.append(child)
        self.domains.append(domain)
        self.scheduler.enter(domain)
        return domain

    def until(self, look: Callable[[], object]) -> None:
        """Run the loop until `look()` is true."""
        end = time.monotonic() + TIMEOUT
        while not look():
            assert time.monotonic() < end, "not in time"
            guard = self.loop.at(time.monotonic_ns() + 2_000_000, lambda: None)
            self.loop.step()
            guard.cancel()

    def run(self, ns: int) -> list[float]:
        """Until they ran so long together; the part of each."""
        before = [virtual_ns(domain) for domain in self.domains]
        self.until(lambda: sum(map(virtual_ns, self.domains)) - sum(before) >= ns)
        ran = [virtual_ns(domain) - was for domain, was in zip(self.domains, before, strict=True)]
        return [one / sum(ran) for one in ran]

    def state(self, domain: Domain) -> str:
        return self.scheduler.state_of(domain)[0]

    def close(self) -> None:
        for child, domain in zip(self.children, self.domains, strict=True):
            self.scheduler.leave(domain)
            child.kill()
            child.wait()
            assert domain.process is not None
            domain.process.close()
        self.loop._epoll.close()


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


def stopped(domain: Domain) -> bool:
    """By the host's own word."""
    assert domain.process is not None
    with open(f"/proc/{domain.process.pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] == b"T"


def test_weights_are_shares(host: Host) -> None:
    for weight in (768, 256):
        host.domain(weight=weight)
    three, one = host.run(SECOND)
    assert three == pytest.approx(0.75, abs=0.04) and one == pytest.approx(0.25, abs=0.04)
    assert host.scheduler.switches > 10


def test_many_get_the_same(host: Host) -> None:
    for _ in range(5):
        host.domain()
    assert all(part == pytest.approx(0.2, abs=0.04) for part in host.run(3 * SECOND // 2))


def test_a_cap_holds_though_nobody_else_wants_the_cpu(host: Host) -> None:
    domain = host.domain(cap=25)
    host.run(bvt.CAP_PERIOD_NS)
    begin, before = time.monotonic_ns(), virtual_ns(domain)
    host.until(lambda: virtual_ns(domain) - before >= SECOND // 5)
    elapsed = time.monotonic_ns() - begin
    assert (virtual_ns(domain) - before) / elapsed <= 0.25 + bvt.CAP_PERIOD_NS / elapsed


def test_it_stays_out_of_the_way(host: Host) -> None:
    """No timer where there are no more domains than CPUs; nobody is stopped where no more want to run."""
    first = host.domain()
    assert host.scheduler._timer is None
    second = host.domain(SLEEP)
    assert host.scheduler._timer is not None
    host.until(lambda: host.state(second) == "idle")
    host.until(lambda: not host.scheduler.arbitrating)
    switches = host.scheduler.switches
    host.run(SECOND // 10)
    assert host.scheduler.switches == switches and host.state(first) == "on" and not stopped(first)
    assert os.sched_getaffinity(first.process.pid) == {host.cpu}  # type: ignore[union-attr]
    host.scheduler.leave(second)
    assert host.scheduler._timer is None


def test_a_kernel_lives_with_its_programs_and_weighs_less(host: Host) -> None:
    """Else the host's scheduler lets a program wait that its kernel has woken, until that one sleeps."""
    kernel, first, second = (host.domain(SLEEP) for _ in range(3))
    pids = [one.process.pid for one in (kernel, first, second) if one.process]
    for pid in pids[1:]:
        os.sched_setaffinity(pid, os.sched_getaffinity(0))
        host.scheduler.house(kernel, pid, [kernel])
    assert [os.sched_getaffinity(pid) for pid in pids] == [{host.cpu}] * 3 and kernel.home == host.cpu
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert [os.getpriority(os.PRIO_PROCESS, pid) - own for pid in pids] == [scheduler.KERNEL_NICE, 0, 0]


def test_domains_with_programs_have_cpus_of_their_own_while_there_are(host: Host) -> None:
    host.scheduler.cpus = cpus = frozenset(os.sched_getaffinity(0))
    domains = [host.domain(SLEEP) for _ in range(2 * len(cpus))]
    for domain in domains:
        assert domain.process is not None
        os.sched_setaffinity(domain.process.pid, cpus)
    for domain in domains:
        assert domain.process is not None
        host.scheduler.house(domain, domain.process.pid, domains)
    assert sorted(domain.home for domain in domains) == sorted([*cpus] * 2)


def test_whoever_is_exempt_is_never_stopped_unless_capped(host: Host) -> None:
    driver = host.domain(flags=CreateFlags.DRIVER)
    for _ in range(2):
        host.domain()
    assert host.state(driver) == "-"
    driver.share.set(cap=5)
    host.scheduler.changed(driver)
    host.until(lambda: host.state(driver) == "off" and stopped(driver))
    driver.share.set(cap=0)
    host.scheduler.changed(driver)
    host.until(lambda: not stopped(driver))
    assert host.state(driver) == "-"


def test_virtual_time_stands_still_while_it_is_stopped_and_the_four_add_up(host: Host) -> None:
    domain, other = host.domain(weight=32), host.domain(weight=1024)
    host.until(lambda: host.state(domain) == "off" and stopped(domain))
    before = virtual_ns(domain)
    there = virtual_ns(other)
    while virtual_ns(other) - there < 50_000_000:
        assert virtual_ns(domain) == before
    info = run_state(domain)
    assert info.state == RunState.RUNNABLE and info.runnable >= 40_000_000
    now = time.monotonic_ns() - domain.launched_ns
    assert 0 <= now - (info.running + info.runnable + info.blocked + info.offline) < 50_000_000
    host.until(lambda: host.state(domain) == "on")
    assert run_state(domain).runnable >= info.runnable


def beside(host: Host, **params: int) -> tuple[Domain, Domain]:
    """A busy domain, and one that sleeps; a third keeps the scheduler at work."""
    busy, sleeper = host.domain(), host.domain(SLEEP, **params)
    third = host.domain()
    host.until(lambda: (host.state(sleeper), host.state(busy), host.state(third)) == ("idle", "on", "off"))
    for seat in host.scheduler._seats.values():  # nobody is ahead of anybody, and whoever runs wants a CPU to itself
        seat.share.virtual, seat.share.demand = 0, 1.0
        host.scheduler._begin(seat, time.monotonic_ns())
    return busy, sleeper


def test_an_event_for_a_warped_domain_stops_whoever_runs(host: Host) -> None:
    busy, sleeper = beside(host, warp_us=50_000)
    assert sleeper.on_wake is not None
    sleeper.on_wake()
    assert (host.state(sleeper), host.state(busy)) == ("on", "off")
    assert sleeper.on_wake is None, "it is awake"


def test_without_warp_it_waits_for_its_turn(host: Host) -> None:
    busy, sleeper = beside(host, warp_us=0)
    sleeper.share.virtual = 20_000_000
    assert sleeper.on_wake is not None
    sleeper.on_wake()
    assert (host.state(sleeper), host.state(busy)) == ("off", "on")
    host.until(lambda: host.state(sleeper) != "off")


def test_who_is_stopped_can_be_ended_and_another_takes_the_cpu(host: Host) -> None:
    domains = [host.domain() for _ in range(2)]
    host.until(lambda: "off" in map(host.state, domains))
    off = next(domain for domain in domains if host.state(domain) == "off")
    other = next(domain for domain in domains if domain is not off)
    assert off.process is not None
    host.scheduler.leave(off)
    off.process.signal(signal.SIGKILL)
    assert select.select([off.process.pidfd], [], [], TIMEOUT)[0]
    assert host.scheduler._timer is None and host.state(other) == "on" and not stopped(other)


def test_a_domain_that_leaves_is_not_pinned_and_its_stolen_time_is_kept(host: Host) -> None:
    domain = host.domain(weight=1)
    host.domain(weight=65_535)
    host.until(lambda: host.state(domain) == "off")
    host.scheduler.leave(domain)
    assert domain.stolen_ns > 0 and domain.stopped_ns == 0 and domain.on_wake is None
    host.scheduler.leave(domain)


def test_a_process_that_is_gone_harms_nobody(host: Host) -> None:
    domains = [host.domain() for _ in range(3)]
    host.until(lambda: host.scheduler.arbitrating)
    os.kill(host.children[0].pid, signal.SIGKILL)
    host.run(SECOND // 5)
    assert {host.state(domain) for domain in domains[1:]} <= {"on", "off"}


DEFECTS = {
    "nobody is stopped": (Scheduler, "_stop", lambda self, seat, now: setattr(seat, "state", State.OFF)),
    "nobody is charged": (bvt.Share, "charge", lambda self, ran, now: None),
    "the monitor's word for the domain's": (scheduler.Seat, "spent", lambda self: 0),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_is_found(host: Host, monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    monkeypatch.setattr(*DEFECTS[defect])
    monkeypatch.setattr(sys.modules[__name__], "TIMEOUT", 2)
    with pytest.raises(AssertionError):
        test_weights_are_shares(host)


# ---- the hypercall


@pytest.fixture
def hv() -> Iterator[StandIn]:
    made = StandIn(nr_domains=2)
    yield made
    made.close()


def op(hv: StandIn, cmd: SchedulerCommand, domid: int = 1, **params: int) -> SchedulerParams:
    wanted = SchedulerParams(256, 0, 0, 0, 0)._replace(**params)
    return SchedulerParams(*hv.done(hv.domains[0], SchedulerOp(domid, int(cmd), *wanted)))


def test_parameters_are_what_dom0_sets(hv: StandIn) -> None:
    assert op(hv, SchedulerCommand.GETINFO) == (256, 0, Params().warp_us, 0, 0)
    wanted = SchedulerParams(MAX_WEIGHT, MAX_CAP, MAX_WARP_US, 1, 2)
    assert op(hv, SchedulerCommand.PUTINFO, **wanted._asdict()) == wanted
    assert op(hv, SchedulerCommand.GETINFO, weight=0, cap=999) == wanted, "the others are not looked at"
    assert hv.domains[1].share.params == Params(*wanted)


@pytest.mark.parametrize(
    "bad", [{"weight": 0}, {"weight": MAX_WEIGHT + 1}, {"cap": MAX_CAP + 1}, {"warp_us": MAX_WARP_US + 1},
            {"warp_limit_us": MAX_WARP_US + 1}, {"unwarp_us": (1 << 32) - 1}],
)  # fmt: skip
def test_what_cannot_be_changes_nothing(hv: StandIn, bad: dict[str, int]) -> None:
    before = hv.domains[1].share.params
    with pytest.raises(Invalid):
        op(hv, SchedulerCommand.PUTINFO, **bad)
    assert hv.domains[1].share.params is before


def test_nobody_and_no_such_command(hv: StandIn) -> None:
    with pytest.raises(NoSuchDomain):
        op(hv, SchedulerCommand.GETINFO, domid=77)
    with pytest.raises(Invalid):
        hv.done(hv.domains[0], SchedulerOp(1, 2, 256, 0, 0, 0, 0))


def test_it_imports_nothing_of_processes() -> None:
    """What decides can be driven a million times without one."""
    source = Path(bvt.__file__).read_text()
    assert "import os" not in source and "import time" not in source and "signal" not in source
