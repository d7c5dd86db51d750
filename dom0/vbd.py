"""What a virtual block device is: extents of an image, an owner's handle, a mode. The check of every request is in blk.c."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dom0._blk import ffi, lib

EXTENT = re.compile(r"([0-9]{1,18}):([0-9]{1,18})\Z")


@dataclass(frozen=True)
class Extent:
    """`count` sectors of the image from sector `first`."""

    first: int
    count: int


def parse_extents(text: str, image_sectors: int) -> tuple[Extent, ...]:
    """ "first:count;first:count", in the VBD's order; "" is the whole image. Raises ValueError, naming the extent.

    No sector stands in two of them: it would be one disk's twice, and a write to it would change another.
    """
    if not text:
        return (Extent(0, image_sectors),)
    out: list[Extent] = []
    for part in text.split(";"):
        match = EXTENT.match(part)
        if not match:
            raise ValueError(f"extent {part!r} is not first:count")
        extent = Extent(int(match[1]), int(match[2]))
        if not extent.count or extent.first + extent.count > image_sectors:
            raise ValueError(f"extent {part} lies outside the image's {image_sectors} sectors")
        if any(extent.first < e.first + e.count and e.first < extent.first + extent.count for e in out):
            raise ValueError(f"extent {part} overlaps another of the same disk")
        out.append(extent)
    if len(out) > lib.BLK_EXTENTS:
        raise ValueError(f"{len(out)} extents, at most {lib.BLK_EXTENTS}")
    return tuple(out)


def translate(extents: tuple[Extent, ...], sector: int, count: int) -> list[tuple[int, int]]:
    """(first sector of the image, count) pieces of a request, as blk.c cuts it. Raises ValueError outside the VBD."""
    vbd = ffi.new("struct blk_vbd *")
    fill(vbd, extents)
    where, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    out = []
    while True:
        if lib.blk_translate(vbd, sector, count, where, length):
            raise ValueError(f"sectors {sector}+{count} are not the VBD's")
        out.append((where[0], length[0]))
        sector, count = sector + length[0], count - length[0]
        if not count:
            return out


def fill(vbd: object, extents: tuple[Extent, ...]) -> None:
    """Write the translation table into a struct blk_vbd."""
    table = vbd
    for i, extent in enumerate(extents):
        table.extents[i].first, table.extents[i].count = extent.first, extent.count  # type: ignore[attr-defined]
    table.nr_extents = len(extents)  # type: ignore[attr-defined]
    table.sectors = sum(extent.count for extent in extents)  # type: ignore[attr-defined]
