"""Hosts born with a defect, for tests that must be able to fail.

A seed is a function that is run first in every process that the hypervisor execs (zygote, dom0, driver domains; guests
are forks of the zygote) and in the hypervisor itself, before anything of the host's runs there; it patches what it finds.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable
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


for name in ("prepare", "place_descriptors", "reserve_window", "spawn_monitor", "limits", "lock", "run"):
    SEEDS[f"die_in_{name}"] = die_in(name)


@seed
def zygote() -> None:
    """A zygote that dies before it is ready."""
    from hypervisor import zygote as module

    module.PRELOAD.append("this_module_does_not_exist")


@seed
def no_death_signal() -> None:
    """Nobody asks to die with the hypervisor."""
    from hypervisor.gate import boot

    whole = boot.prctl
    boot.prctl = lambda option, argument: None if option == 1 else whole(option, argument)
