"""A domain's configuration: TOML, checked here, with the line and the key in every message.

    name = "alice"                  # [A-Za-z0-9][A-Za-z0-9_.-]*, at most 32 bytes
    kernel = "alice.py"             # Python source with `async def main(kernel)`, or a freestanding ELF file
    memory = 16                     # MiB that it starts with
    maxmem = 64                     # MiB that it can be given while it runs (`ring1 mem-set`); default: as memory
    cmdline = ""                    # handed to the kernel
    weight = 256                    # of the CPU, beside the weights of the others that want it (1 to 65535)
    cap = 0                         # percent of one CPU that it gets at most; 0: no cap
    fast_syscalls = false           # of a ramdisk: true patches programs' system calls in memory (DESIGN.md, section 5)
    debug = false                   # true: inspectable, shown as "not isolated"

    [[disk]]
    name = "xvda"                   # xvda to xvdz
    image = "disk.img"              # a raw file or a block device
    mode = "r"                      # "r" or "w"
    extents = "0:2048;8192:2048"    # first:count in sectors of 512 bytes; default: all of the image

    [[vif]]                         # eth0, eth1, ... in this order
    ip = "10.0.0.1"                 # frames from another address are dropped; "" for any
    mac = "00:16:3e:00:00:01"       # default: made from the domain's number

Relative paths are relative to the file.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from hypervisor.public.io.blkif import vdev
from hypervisor.public.scheduler import MAX_CAP, MAX_WEIGHT
from hypervisor.public.start_info import CMDLINE_BYTES
from hypervisor.public.types import NAME_BYTES

NAME = rf"^[A-Za-z0-9][A-Za-z0-9_.-]{{0,{NAME_BYTES - 1}}}$"
MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}\Z")


class ConfigError(ValueError):
    """One sentence: file, line, key, what is wrong."""


class Disk(msgspec.Struct, forbid_unknown_fields=True):
    """One VBD."""

    name: str
    image: str
    mode: Literal["r", "w"] = "r"
    extents: str = ""

    def __post_init__(self) -> None:
        vdev(self.name)


class Vif(msgspec.Struct, forbid_unknown_fields=True):
    """One VIF."""

    ip: str = ""
    mac: str = ""

    def __post_init__(self) -> None:
        if self.ip:
            ipaddress.IPv4Address(self.ip)
        if self.mac and not MAC.match(self.mac):
            raise ValueError(f"{self.mac!r} is not six hexadecimal bytes with colons")
        if self.mac and int(self.mac[1], 16) & 1:
            raise ValueError(f"{self.mac!r} is a multicast address")


class DomainConfig(msgspec.Struct, forbid_unknown_fields=True):
    """What `create` needs to know."""

    name: Annotated[str, msgspec.Meta(pattern=NAME)]
    kernel: str
    memory: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 16
    maxmem: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0  # 0: as memory
    cmdline: Annotated[str, msgspec.Meta(max_length=CMDLINE_BYTES - 1)] = ""
    weight: Annotated[int, msgspec.Meta(ge=1, le=MAX_WEIGHT)] = 256
    cap: Annotated[int, msgspec.Meta(ge=0, le=MAX_CAP)] = 0
    debug: bool = False
    disk: list[Disk] = []
    vif: Annotated[list[Vif], msgspec.Meta(max_length=8)] = []
    fast_syscalls: bool = False

    def __post_init__(self) -> None:
        if 0 < self.maxmem < self.memory:
            raise ValueError(f"maxmem: {self.maxmem} MiB, and it starts with memory = {self.memory}")
        names = [disk.name for disk in self.disk]
        if len(set(names)) < len(names):
            raise ValueError("two disks have one name")

    def resolved(self, base: Path) -> DomainConfig:
        """With absolute paths."""
        disks = [msgspec.structs.replace(d, image=str((base / d.image).absolute())) for d in self.disk]
        return msgspec.structs.replace(self, kernel=str((base / self.kernel).absolute()), disk=disks)


def load(path: Path) -> DomainConfig:
    """Raises ConfigError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return parse(text, str(path)).resolved(path.parent)


def parse(text: str, where: str = "configuration") -> DomainConfig:
    """Raises ConfigError; `where` names the text in it."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: {error}") from None
    return _convert(tree, lambda key: f"{where}: line {line_of(text, key)}: {_plain(key)}")


def from_tree(tree: Any) -> DomainConfig:
    """From plain dicts and lists, as the control socket carries them. Raises ConfigError."""
    return _convert(tree, lambda key: f"configuration: {_plain(key)}")


def to_tree(config: DomainConfig) -> Any:
    return msgspec.to_builtins(config)


def _convert(tree: Any, place: Any) -> DomainConfig:
    try:
        return msgspec.convert(tree, DomainConfig)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        key = path.rstrip("`").lstrip(".")
        if unknown := re.search(r"unknown field `(.*)`", what):
            key = f"{key}.{unknown[1]}".lstrip(".")
            what = "no such key"
        elif missing := re.search(r"missing required field `(.*)`", what):
            key = f"{key}.{missing[1]}".lstrip(".")
            what = "this key is missing"
        elif not key and (named := re.match(r"(\w+): (?=.)", what)):  # of the whole, and says of which key
            key, what = named[1], what[named.end() :]
        raise ConfigError(f"{place(key)}: {what[0].lower() + what[1:]}") from None


def _plain(key: str) -> str:
    return key or "the whole of it"


def line_of(text: str, key: str) -> int:
    """The line of a key such as "memory" or "disk[1].mode"; of its table where the key itself is not there."""
    match = re.fullmatch(r"(?:(\w+)\[(\d+|\.\.\.)\])?\.?(\w*)", key)
    table, index, name = match.groups() if match else (None, None, "")
    seen, inside, at = -1, table is None, 1
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*(\w+)", line):
            seen += header[1] == table
            inside = header[1] == table and str(seen) == index
            if inside:
                at = number
        if inside and name and re.match(rf"\s*[\"']?{re.escape(name)}[\"']?\s*=", line):
            return number
    return at
