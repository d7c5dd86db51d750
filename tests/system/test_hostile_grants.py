"""Hostile guests and grants: nobody maps, reads or writes a frame that was not granted to him, or no longer is."""

from __future__ import annotations

import pytest

from tests.system.machine import PAGE_FAULT, Guest, Machine, machine

pytestmark = pytest.mark.usefixtures("undisturbed")

EPERM = 1


def grant_map(guest: Guest, domid: int, ref: int, va: str, flags: int = 2) -> int:
    """The status of one gnttab_map_grant_ref."""
    status: int = guest.do(f"""
        global scratch
        try: scratch
        except NameError: scratch = kernel.memory.alloc(1)
        memory.write(scratch.address, grant.MAP_REF.pack({va}, {flags}, {ref}, {domid}, 0, 0, 0))
        kernel.call(grant.GrantMap(scratch.va, 1))
        return grant.MAP_REF.unpack(memory.read(scratch.address, grant.MAP_REF.size))[4]
    """)
    return status


def test_frames_that_nobody_granted_to_her(host: Machine, eve: Guest, bob: Guest) -> None:
    free = "layout.GRANT_BASE"
    to_dom0 = bob.do("return kernel.grants.give(0, kernel.memory.alloc(1).pfn)")
    for domid, ref, found in (
        (bob.domid, 0, "PERMISSION_DENIED"), (bob.domid, 1, "PERMISSION_DENIED"), (bob.domid, to_dom0, "PERMISSION_DENIED"),
        (bob.domid, 4095, "PERMISSION_DENIED"), (bob.domid, 4096, "BAD_GNTREF"), (bob.domid, (1 << 32) - 1, "BAD_GNTREF"),
        (0, 8, "PERMISSION_DENIED"), (1, 8, "PERMISSION_DENIED"), (2, 8, "PERMISSION_DENIED"), (77, 8, "BAD_DOMAIN"),
        (0xffff, 8, "BAD_DOMAIN"),
    ):  # fmt: skip
        for flags in (2, 6):
            assert eve.do(f"return grant.GrantStatus({grant_map(eve, domid, ref, free, flags)}).name") == found, (domid, ref)
    assert eve.do("return status(kernel.call, grant.GrantMap(scratch.va, 513))") == "TooBig"
    assert eve.do("return status(kernel.call, grant.GrantMap(layout.GRANT_BASE, 1))") == "BadAddress"
    assert eve.do("return status(kernel.call, grant.GrantQuerySize(0))") == "NotPermitted"
    bob.do(f"kernel.grants.end({to_dom0})")


def test_a_hypervisor_that_lets_anybody_map_is_found_out() -> None:
    """Seed: to whom a frame was granted is not asked. Eve has bob's console."""
    with machine(seed="anybody_may_map") as host:
        eve, bob = host.guest("eve"), host.guest("bob")
        assert grant_map(eve, bob.domid, 0, "layout.GRANT_BASE") == 0


def test_places_that_are_not_for_grants(eve: Guest, bob: Guest) -> None:
    ref = bob.do(f"global page; page = kernel.memory.alloc(1); return kernel.grants.give({eve.domid}, page.pfn)")
    for va in (
        "0", "layout.VIRT_BASE", "scratch.va", "layout.MONITOR_CODE", "layout.COMMANDS", "layout.SHARED_INFO",
        "layout.GRANT_BASE + 1", "layout.GRANT_BASE - 4096", "layout.SPACE_BYTES", "(1 << 64) - 4096",
    ):  # fmt: skip
        assert grant_map(eve, bob.domid, ref, "0") == grant_map(eve, bob.domid, ref, va) == -5, va
    assert grant_map(eve, bob.domid, ref, "layout.GRANT_BASE", flags=0) == -1
    assert grant_map(eve, bob.domid, ref, "layout.GRANT_BASE", flags=0xFF) == -1
    assert grant_map(eve, bob.domid, ref, "layout.GRANT_BASE") == 0
    assert grant_map(eve, bob.domid, ref, "layout.GRANT_BASE") == -5, "there is one already"
    assert bob.do(f"return status(kernel.grants.end, {ref})") == "Busy"
    eve.destroy()
    bob.do(f"kernel.grants.end({ref}); kernel.memory.free(page)")


def test_frames_she_has_not(host: Machine, eve: Guest, bob: Guest) -> None:
    """What she grants is hers to name: no frame that there is not, none of bob's, none of anybody's."""
    his = bob.do("return kernel.memory.p2m[kernel.start.nr_pages - 1]")
    mine = set(eve.do("return list(kernel.memory.p2m)")) | set(bob.do("return list(kernel.memory.p2m)"))
    others = next(mfn for mfn in range(1, 1 << 16) if mfn not in mine)
    for mfn in (1 << 24, (1 << 32) - 1, his, others):
        ref = eve.do(f"kernel.memory.p2m[0] = {mfn}; return kernel.grants.give({bob.domid}, 0)")
        assert grant_map(bob, eve.domid, ref, "layout.GRANT_BASE") == -3, mfn
    eve.destroy()


def test_a_page_table_of_hers_is_granted_for_reading_alone(host: Machine, eve: Guest, bob: Guest) -> None:
    ref = eve.do(f"return kernel.grants.give({bob.domid}, (kernel.start.pt_base - layout.VIRT_BASE) // 4096)")
    assert grant_map(bob, eve.domid, ref, "layout.GRANT_BASE") == -8
    bob.do(f"global table; table = kernel.grants.map({eve.domid}, [{ref}], readonly=True)")
    entry = int.from_bytes(bytes.fromhex(bob.do("return memory.read(table.address, 8)")), "little")
    assert entry & 1 and entry == eve.do("return int(kernel.space.paging.table(kernel.space.root)[0])")
    eve.destroy()
    assert bytes.fromhex(bob.do("return memory.read(table.address, 8)")) == bytes(8)
    bob.do("kernel.grants.unmap(table)")


def test_a_store_to_a_frame_granted_for_reading(eve: Guest, bob: Guest) -> None:
    """It is mapped through a descriptor that cannot write: the store faults, an upgrade is refused by the kernel."""
    assert PAGE_FAULT.fullmatch(store_to_readonly(eve, bob))
    assert bob.do("return memory.read(page.address, 4)") == b"bob's"[:4].hex()
    bob.do("kernel.grants.end(ref); kernel.memory.free(page)")


def store_to_readonly(eve: Guest, bob: Guest) -> str:
    """How eve ended, or "" where she did not."""
    ref = bob.do(f"""
        global page, ref
        page = kernel.memory.alloc(1)
        memory.write(page.address, b"bob's")
        ref = kernel.grants.give({eve.domid}, page.pfn, readonly=True)
        return ref
    """)
    assert grant_map(eve, bob.domid, ref, "layout.GRANT_BASE", flags=2) == -8, "not for writing"
    assert grant_map(eve, bob.domid, ref, "layout.GRANT_BASE", flags=6) == 0
    assert bytes.fromhex(eve.do("return memory.read(WINDOW + layout.GRANT_BASE, 5)")) == b"bob's"
    assert eve.do("return raw(10, WINDOW + layout.GRANT_BASE, 4096, 3, 0, 0, 0)") == -EPERM
    eve.begin("memory.write(WINDOW + layout.GRANT_BASE, b'eve'); return 1")
    try:
        eve.answer()
    except AssertionError:
        return eve.wait().reason
    return ""


def test_a_hypervisor_that_maps_it_for_writing_is_found_out() -> None:
    """Seed: read-only grants are mapped read-write."""
    with machine(seed="grants_are_writable") as host:
        eve, bob = host.guest("eve"), host.guest("bob")
        assert store_to_readonly(eve, bob) == ""
        assert bytes.fromhex(bob.do("return memory.read(page.address, 5)")) == b"eve's"


def test_a_dead_domain_s_frame_is_nobody_else_s(host: Machine, eve: Guest) -> None:
    """Mapped by eve when its owner dies: a zero page is in its place, and the next owner never sees what she stores."""
    assert stale_sight(host, eve) == ("00" * 5, 0)


def stale_sight(host: Machine, eve: Guest) -> tuple[str, int]:
    """What eve reads after carol's death where she had carol's frame, and how often dave finds eve's mark in all of his."""
    carol = host.guest("carol")
    ref = carol.do(
        f"page = kernel.memory.alloc(1); memory.write(page.address, b'carol'); return kernel.grants.give({eve.domid}, page.pfn)"
    )
    assert grant_map(eve, carol.domid, ref, "layout.GRANT_BASE") == 0
    assert bytes.fromhex(eve.do("return memory.read(WINDOW + layout.GRANT_BASE, 5)")) == b"carol"
    carol.destroy()
    seen: str = eve.do("return memory.read(WINDOW + layout.GRANT_BASE, 5)")
    free = host.ask("ledger")["frames_free"] >> 8
    dave = host.guest("dave", memory=free)
    eve.do("memory.write(WINDOW + layout.GRANT_BASE, b'a mark of eve')")
    found: int = dave.do("""
        found = 0
        for pfn in range(kernel.start.nr_pages):
            found += memory.read(WINDOW + layout.virt(pfn), 4096).startswith(b"a mark of " + b"eve")
        return found
    """)
    dave.destroy()
    return seen, found


def test_a_hypervisor_that_leaves_it_mapped_is_found_out() -> None:
    """Seed: the zero page is not put there. Eve goes on reading the frame, and her mark is in its next owner's."""
    with machine(seed="no_zero_page") as host:
        _, found = stale_sight(host, host.guest("eve"))
        assert found == 1


def test_grants_run_out_for_her_alone(host: Machine, bob: Guest) -> None:
    """She maps 8192 times; the 8193rd is refused, and bob maps his own as before."""
    mallory = host.guest("mallory", memory=4)
    assert mallory.do("""
        page = kernel.memory.alloc(1)
        ref = kernel.grants.give(kernel.domid, page.pfn)
        scratch = kernel.memory.alloc(4)
        done = 0
        for batch in range(80):
            entries = b"".join(
                grant.MAP_REF.pack(layout.GRANT_BASE + (done + i) * 4096, 2, ref, kernel.domid, 0, 0, 0) for i in range(512)
            )
            memory.write(scratch.address, entries)
            good = kernel.call(grant.GrantMap(scratch.va, 512))
            done += good
            if good < 512:
                return done, grant.MAP_REF.unpack_from(memory.read(scratch.address, 16384), 511 * 32)[4]
    """) == [8192, -7]
    bob.do("""
        page = kernel.memory.alloc(1)
        ref = kernel.grants.give(kernel.domid, page.pfn)
        kernel.grants.unmap(kernel.grants.map(kernel.domid, [ref]))
        kernel.grants.end(ref)
        kernel.memory.free(page)
    """)
    mallory.destroy()
