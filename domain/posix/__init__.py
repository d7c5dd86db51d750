"""The POSIX kernel: runs unmodified static x86-64 Linux programs above this domain's own memory, events and devices."""
