"""All system calls: importing this module fills the table."""

from domain.posix import (
    sys_descriptor,
    sys_directory,
    sys_epoll,
    sys_event,
    sys_file,
    sys_futex,
    sys_memory,
    sys_message,
    sys_misc,
    sys_poll,
    sys_process,
    sys_sched,
    sys_signal,
    sys_socket,
    sys_stat,
    sys_time,
    sys_transfer,
)
from domain.posix.table import TABLE, documentation

__all__ = ["TABLE"]
MODULES = (
    sys_descriptor, sys_directory, sys_epoll, sys_event, sys_file, sys_futex, sys_memory, sys_message, sys_misc, sys_poll,
    sys_process, sys_sched, sys_signal, sys_socket, sys_stat, sys_time, sys_transfer,
)  # fmt: skip

if __name__ == "__main__":
    print(documentation(), end="")
