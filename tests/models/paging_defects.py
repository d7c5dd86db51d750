"""Seeded defects of the paging core: one check, count, order or unmapping that is left out, C or Python.

Each is {file: [(old, new)]} for paging_core.load. What they have in common is that a single call looks right: it is the
counts afterwards, or a host mapping that outlives its reference, that give them away.
"""

from __future__ import annotations

from tests.models.mutant import Changes

FRAMES, TABLES, MMU = "hypervisor/frames.c", "hypervisor/tables.c", "hypervisor/mmu.c"
SPACE, CALLS = "hypervisor/space.py", "hypervisor/mmu.py"

DEFECTS: dict[str, Changes] = {
    # counts and types
    "a frame that is being validated may become writable": {FRAMES: [("(f->count || f->done))", "f->done)")]},
    "a writable use is not counted": {FRAMES: [("        f->count++;\n    }\n    f->total++", "    }\n    f->total++")]},
    "a table is made of a frame in use": {TABLES: [("if (!whole && (f->count || f->done))", "if (!whole && f->done)")]},
    "RW is ignored at L1": {
        TABLES: [
            ("return frame_get(m, (uint32_t)mfn, !!(entry & PTE_RW));", "return frame_get(m, (uint32_t)mfn, 0);"),
            ("frame_put(m, (uint32_t)PTE_MFN(entry), !!(entry & PTE_RW));", "frame_put(m, (uint32_t)PTE_MFN(entry), 0);"),
        ]
    },
    "anybody's frames in an L1": {
        TABLES: [
            ("|| m->frames[mfn].owner != domid)\n        return -EINVAL;\n    return", ")\n        return -EINVAL;\n    return")
        ]
    },
    "anybody's tables": {TABLES: [("    if (f->owner != domid)\n        return -EINVAL;\n", "")]},
    "reserved bits are let through": {TABLES: [("entry & ~PTE_L1_ALLOWED || ", "")]},
    "PS is let through above L1": {TABLES: [("value & ~PTE_UPPER_ALLOWED ||", "value & ~(PTE_UPPER_ALLOWED | 1u << 7) ||")]},
    # parents and the hypervisor's slots
    "a second parent": {TABLES: [("if (whole && f->parent != NO_MFN)", "if (0)")]},
    "a child keeps the parent that failed": {
        TABLES: [("    f->parent = NO_MFN; /* of one that failed on its way up */\n", "")]
    },
    "the hypervisor's slots may be hooked in": {TABLES: [("slot == TABLE_ENTRIES - 1 && !top_is_clear(m, mfn)", "0")]},
    "the hypervisor's slots may be set": {TABLES: [("f->slot == TABLE_ENTRIES - 1 && slot >= TOP_L2_SLOT", "0")]},
    "the half of grants may be set": {TABLES: [("f->window == 1 && slot >= GRANT_L3_SLOT", "0")]},
    # walks
    "done is one short on the way down": {
        TABLES: [
            (
                "        if (r) {\n            turn_back(w, r);",
                "        if (r) {\n            f->done -= !!f->done;\n            turn_back(w, r);",
            )
        ]
    },
    "done is one too many on the way down": {
        TABLES: [
            (
                "        if (r < 0)\n            turn_back(w, r);",
                "        if (r < 0) {\n            f->done++;\n            turn_back(w, r);\n        }",
            )
        ]
    },
    "a failed child is not told of": {TABLES: [("    return w->error;\n}", "    return 0;\n}")]},
    "a child's count is kept when its parent falls": {
        TABLES: [("    f->count--;\n    f->total--;\n}\n\n/* Take", "    f->count--;\n}\n\n/* Take")]
    },
    "unpinning unhooks": {TABLES: [("    if (!hooked) {", "    if (0) {")]},
    # updates
    "an old entry's reference is forgotten": {
        MMU: [
            (
                "        job->drops[job->nr_drops++] = old;\n    else\n        l1_put(m, old);",
                "        job->drops[job->nr_drops++] = old;",
            )
        ]
    },
    "references fall before the host mapping": {MMU: [("if ((old & PTE_P) && (mapped || job->unsettled))", "if (0)")]},
    "what is being thrown out does not count": {
        CALLS: [("domain.monitor is not None and domain.monitor.busy\n        status", "False\n        status")]
    },
    "an unmapped entry keeps its mapping": {
        MMU: [("if (p->at >= 0 && ((value & PTE_P) || mapped))", "if (p->at >= 0 && (value & PTE_P))")]
    },
    "A and D may be set": {MMU: [("value = (value & ~PTE_AD) | (old & PTE_AD);", "value |= old & PTE_AD;")]},
    "a store into a table": {
        MMU: [
            (
                "    if (r)\n        return r;\n    mmu_store(m, mfn, slot, value);\n    frame_put",
                "    mmu_store(m, mfn, slot, value);\n    if (r)\n        return r;\n    frame_put",
            )
        ]
    },
    "an entry's own rights": {MMU: [(".writable = !!(entry & above & PTE_RW)", ".writable = !!(entry & PTE_RW)")]},
    "a fault marks nothing": {
        MMU: [
            (
                "        n = add(out, n, change_of(base + ((uint64_t)slot << 12), entry, rights));\n"
                "        mark(m, l1, slot, 1);\n    }\n    return n;\n}\n\n/* Map",
                "        n = add(out, n, change_of(base + ((uint64_t)slot << 12), entry, rights));\n"
                "    }\n    return n;\n}\n\n/* Map",
            )
        ]
    },
    "neighbours of one list are merged that are not": {MMU: [("last->mfn + last->pages == c.mfn", "1")]},
    # orchestration
    "the job is committed before it is acknowledged": {
        CALLS: [
            (
                "    if job.nr_changes:\n        yield",
                "    changes = job.nr_changes\n    lib.mmu_commit(hv.frames.mmu, job)\n    if changes:\n        yield",
            ),
            ("job.changes, job.nr_changes)", "job.changes, changes)"),
        ]
    },
    "a table falls before what it shows": {
        CALLS: [
            (
                "        yield from space.zap_table(hv, domain, mfn_of(old), "
                "1 << (L2_SHIFT if level == PageType.L2 else L3_SHIFT))\n",
                "",
            )
        ]
    },
    "one table is put twice": {CALLS: [("        if not same:\n", "        if True:\n")]},
    "a pin that failed is kept": {
        CALLS: [
            (
                "    yield from space.get_table(hv, domain, mfn, level)\n\n    hv.frames.frame[mfn].pinned = 1",
                "    hv.frames.frame[mfn].pinned = 1\n    yield from space.get_table(hv, domain, mfn, level)",
            )
        ]
    },
    "a frame is pinned twice": {CALLS: [("    if hv.frames.frame[mfn].pinned:", "    if False:")]},
    "an upper table is half the size": {CALLS: [("L2_SHIFT if level == PageType.L2 else L3_SHIFT", "L2_SHIFT")]},
    "a flush looks at what entries name now": {
        SPACE: [
            (
                "        yield from _take_away(domain, window",
                "        if slot < ENTRIES:\n            yield from _take_away(domain, window",
            )
        ]
    },
    "a full host is ignored": {
        SPACE: [
            (
                "            raise MonitorGone from None\n        yield from flush(hv, domain)\n    else:",
                "            raise MonitorGone from None\n    else:",
            )
        ]
    },
}
