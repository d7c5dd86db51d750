/* A frame becomes a page table, or ceases to be one: every entry is checked and takes its references, or gives them back.
 *
 * A walk goes through at most three levels with a stack of its own, a bounded number of tables a step, so that no guest can
 * hold the hypervisor with a deep tree. A table whose walk is under way has its type already (or still) and says in `done`
 * how many entries hold references: nobody can make anything else of it. References are taken before a child is entered
 * and undone in reverse. */
#include "tables.h"

#include <errno.h>

int l1_get(struct mmu *m, uint16_t domid, uint64_t entry)
{
    uint64_t mfn = PTE_MFN(entry);

    if (!(entry & PTE_P))
        return 0;
    if (entry & ~PTE_L1_ALLOWED || mfn >= m->nr_frames || m->frames[mfn].owner != domid)
        return -EINVAL;
    return frame_get(m, (uint32_t)mfn, !!(entry & PTE_RW));
}

void l1_put(struct mmu *m, uint64_t entry)
{
    if (entry & PTE_P)
        frame_put(m, (uint32_t)PTE_MFN(entry), !!(entry & PTE_RW));
}

/* A descriptor that a guest may have: none, or one of rings 1 to 3 that stays below the hypervisor's addresses. */
static int descriptor_get(uint64_t descriptor)
{
    return descriptor_is_safe(descriptor) ? 0 : -EINVAL;
}

/* ---- the hypervisor's own slots */

/* No entry of an L2 for the last GiB of a space reaches into the hypervisor's 64 MB. */
static int top_is_clear(struct mmu *m, uint32_t l2)
{
    for (uint32_t i = TOP_L2_SLOT; i < TABLE_ENTRIES; i++)
        if (table_of(m, l2)[i] & PTE_P)
            return 0;
    return 1;
}

/* What mmu_update asks before a walk begins. -EPERM: the slot is the hypervisor's. -EINVAL: the bits. */
int32_t mmu_upper_entry(struct mmu *m, uint32_t table, uint32_t slot, uint64_t value)
{
    struct frame *f = &m->frames[table];

    if (!(value & PTE_P))
        return 0;
    if (f->type == FRAME_L3 && f->window == 1 && slot >= GRANT_L3_SLOT)
        return -EPERM;
    if (f->type == FRAME_L2 && f->parent != NO_MFN && f->slot == TABLE_ENTRIES - 1 && slot >= TOP_L2_SLOT)
        return -EPERM;
    return value & ~PTE_UPPER_ALLOWED || PTE_MFN(value) >= m->nr_frames ? -EINVAL : 0;
}

/* ---- one reference to a table */

static void push(struct table_walk *w, uint32_t mfn)
{
    w->stack[w->depth++] = mfn;
}

/* Give one back; the last one is given back when the table has been walked through. */
static void drop(struct mmu *m, struct table_walk *w, uint32_t mfn)
{
    struct frame *f = &m->frames[mfn];

    f->parent = NO_MFN;
    f->slot = 0;
    if (f->count == 1) {
        push(w, mfn);
        return;
    }
    f->count--;
    f->total--;
}

/* Take a reference to `mfn` as a table of `type` for entry `slot` of `parent` (NO_MFN: for a pin or a window). 0: done.
 * 1: a walk has begun. Else an error, and nothing was taken. */
static int enter(struct mmu *m, struct table_walk *w, uint32_t mfn, uint32_t type, uint16_t domid, uint32_t parent,
                 uint32_t slot)
{
    struct frame *f = &m->frames[mfn];
    int whole = f->type == type && f->count && f->done == TABLE_ENTRIES;

    if (f->owner != domid)
        return -EINVAL;
    if (!whole && (f->count || f->done))
        return f->type == type ? -EBUSY : -EINVAL;
    if (parent != NO_MFN) {
        if (whole && f->parent != NO_MFN)
            return -EBUSY;
        if (type == FRAME_L2 && slot == TABLE_ENTRIES - 1 && !top_is_clear(m, mfn))
            return -EPERM;
        f->parent = parent;
        f->slot = (uint16_t)slot;
    }
    if (!whole) {
        f->type = (uint8_t)type;
        push(w, mfn);
    }
    f->count++;
    f->total++;
    return !whole;
}

/* The last table of the stack is whole, or empty again. */
static void leave(struct mmu *m, struct table_walk *w)
{
    struct frame *f = &m->frames[w->stack[--w->depth]];

    if (!w->down) {
        if (w->depth)
            m->frames[w->stack[w->depth - 1]].done++;
        return;
    }
    f->count--;
    f->total--;
    f->parent = NO_MFN; /* of one that failed on its way up */
    f->slot = 0;
}

static void turn_back(struct table_walk *w, int error)
{
    w->down = 1;
    w->error = error;
}

/* ---- steps */

static void leaf_up(struct mmu *m, struct table_walk *w, uint32_t mfn)
{
    struct frame *f = &m->frames[mfn];
    const uint64_t *table = table_of(m, mfn);

    for (; f->done < TABLE_ENTRIES; f->done++) {
        int r = f->type == FRAME_L1 ? l1_get(m, f->owner, table[f->done]) : descriptor_get(table[f->done]);

        if (r) {
            turn_back(w, r);
            return;
        }
    }
    leave(m, w);
}

static void upper_up(struct mmu *m, struct table_walk *w, uint32_t mfn)
{
    struct frame *f = &m->frames[mfn];
    const uint64_t *table = table_of(m, mfn);

    for (; f->done < TABLE_ENTRIES; f->done++) {
        uint64_t entry = table[f->done];
        int r;

        if (!(entry & PTE_P))
            continue;
        r = mmu_upper_entry(m, mfn, f->done, entry);
        if (!r)
            r = enter(m, w, (uint32_t)PTE_MFN(entry), f->type - 1u, f->owner, mfn, f->done);
        if (r < 0)
            turn_back(w, r);
        if (r)
            return;
    }
    leave(m, w);
}

static void leaf_down(struct mmu *m, struct table_walk *w, uint32_t mfn)
{
    struct frame *f = &m->frames[mfn];
    const uint64_t *table = table_of(m, mfn);

    while (f->done) {
        f->done--;
        if (f->type == FRAME_L1)
            l1_put(m, table[f->done]);
    }
    leave(m, w);
}

static void upper_down(struct mmu *m, struct table_walk *w, uint32_t mfn)
{
    struct frame *f = &m->frames[mfn];
    const uint64_t *table = table_of(m, mfn);

    while (f->done) {
        uint64_t entry = table[--f->done];

        if (entry & PTE_P) {
            uint32_t depth = w->depth;

            drop(m, w, (uint32_t)PTE_MFN(entry));
            if (w->depth != depth)
                return;
        }
    }
    leave(m, w);
}

/* Go on with the walk, at most `tables` tables. 0: it is over; -EAGAIN: it is not; else why it failed, all undone. */
int32_t table_step(struct mmu *m, struct table_walk *w, uint32_t tables)
{
    while (w->depth) {
        uint32_t mfn = w->stack[w->depth - 1];
        int upper = m->frames[mfn].type == FRAME_L2 || m->frames[mfn].type == FRAME_L3;

        if (!tables--)
            return -EAGAIN;
        if (w->down)
            (upper ? upper_down : leaf_down)(m, w, mfn);
        else
            (upper ? upper_up : leaf_up)(m, w, mfn);
    }
    return w->error;
}

/* A reference to `mfn` as a table, as table_step has it; the frame number is bounded already. */
int32_t table_get(struct mmu *m, struct table_walk *w, uint32_t mfn, uint32_t type, uint16_t domid, uint32_t parent,
                  uint32_t slot)
{
    int r;

    w->depth = w->down = 0;
    w->error = 0;
    r = enter(m, w, mfn, type, domid, parent, slot);
    return r <= 0 ? r : -EAGAIN;
}

/* Give one back that a parent's entry held (`hooked`), or a pin or a window; the last one begins a walk: table_step ends it. */
void table_put(struct mmu *m, struct table_walk *w, uint32_t mfn, uint32_t hooked)
{
    struct frame *f = &m->frames[mfn];
    uint32_t parent = f->parent;
    uint16_t slot = f->slot;

    w->depth = 0;
    w->error = 0;
    w->down = 1;
    drop(m, w, mfn);
    if (!hooked) {
        f->parent = parent;
        f->slot = slot;
    }
}
