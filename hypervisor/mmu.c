/* Entries of page tables that are in force: updates of L1 tables, walks, and which host mappings follow.
 *
 * A table has one parent, so an entry has at most one host address, and what a process has mapped is one bit an entry:
 * `mapped` says that a mapping MAY be there, made of the entry as it stands. Who clears a bit, or changes an entry under one,
 * puts the change to the host mapping into its list, and no reference falls before the monitor has acknowledged it. */
#define _GNU_SOURCE
#include "tables.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define FILL_PAGES 16
_Static_assert(FILL_PAGES <= FILL_CHANGES, "the page itself is always among them");
#define PF_WRITE 2u /* of a page fault's error code */
#define PF_FETCH 16u
#define NOTHING (MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE)

uint32_t mmu_is_mapped(struct mmu *m, uint32_t l1, uint32_t slot)
{
    return m->mapped[l1][slot / 64] >> slot % 64 & 1;
}

static void mark(struct mmu *m, uint32_t l1, uint32_t slot, int on)
{
    uint64_t bit = (uint64_t)1 << slot % 64;

    m->mapped[l1][slot / 64] = on ? m->mapped[l1][slot / 64] | bit : m->mapped[l1][slot / 64] & ~bit;
}

/* Where the first address of a table is shown, as an offset from the first window; -1: in no window. */
int64_t mmu_offset(struct mmu *m, uint32_t table)
{
    struct frame *f = &m->frames[table];
    int64_t above;

    if (f->type == FRAME_L3)
        return f->window ? (int64_t)(f->window - 1u) << SPACE_SHIFT : -1;
    if (f->parent == NO_MFN)
        return -1;
    above = mmu_offset(m, f->parent);
    return above < 0 ? -1 : above + ((int64_t)f->slot << (f->type == FRAME_L2 ? 30 : 21));
}

uint64_t mmu_entry(struct mmu *m, uint32_t table, uint32_t slot)
{
    return __atomic_load_n(&table_of(m, table)[slot], __ATOMIC_RELAXED);
}

/* The first present entry from `slot` on, or TABLE_ENTRIES. */
uint32_t mmu_next(struct mmu *m, uint32_t table, uint32_t slot)
{
    while (slot < TABLE_ENTRIES && !(mmu_entry(m, table, slot) & PTE_P))
        slot++;
    return slot;
}

void mmu_store(struct mmu *m, uint32_t table, uint32_t slot, uint64_t value)
{
    __atomic_store_n(&table_of(m, table)[slot], value, __ATOMIC_RELEASE);
}

/* What the tables above an L1 allow: RW where both do, NX where one does. */
static uint64_t above(struct mmu *m, uint32_t l1)
{
    uint32_t l2 = m->frames[l1].parent, l3 = m->frames[l2].parent;
    uint64_t e2 = mmu_entry(m, l2, m->frames[l1].slot), e3 = mmu_entry(m, l3, m->frames[l2].slot);

    return (e2 & e3 & PTE_RW) | ((e2 | e3) & PTE_NX);
}

static struct host_change change_of(uint64_t at, uint64_t entry, uint64_t above)
{
    if (!(entry & PTE_P))
        return (struct host_change){.at = at, .pages = 1, .mfn = NO_MFN};
    return (struct host_change){.at = at, .pages = 1, .mfn = (uint32_t)PTE_MFN(entry), .writable = !!(entry & above & PTE_RW),
                                .executable = !((entry | above) & PTE_NX)};
}

/* To a list of `n`: neighbours that are neighbours in the machine too, or nothing, are one change. Returns the new length. */
static uint32_t add(struct host_change *list, uint32_t n, struct host_change c)
{
    struct host_change *last = n ? &list[n - 1] : 0;

    if (last && last->at + ((uint64_t)last->pages << 12) == c.at && last->writable == c.writable &&
        last->executable == c.executable && (c.mfn == NO_MFN ? last->mfn == NO_MFN : last->mfn + last->pages == c.mfn)) {
        last->pages++;
        return n;
    }
    list[n] = c;
    return n + 1;
}

static uint64_t process_of(const struct host_change *c)
{
    uint64_t window = c->at >> SPACE_SHIFT;

    return window < NR_WINDOWS ? 0 : window;
}

/* Without what is below USER_START, which the host maps nowhere; the bytes that are left. */
static uint64_t clip(struct host_change *c)
{
    uint64_t first = (c->at & (((uint64_t)1 << SPACE_SHIFT) - 1)) >> 12, low = first < 16 ? 16 - first : 0;

    if (low > c->pages)
        low = c->pages;
    c->at += low << 12;
    c->mfn += c->mfn == NO_MFN ? 0 : (uint32_t)low;
    return (uint64_t)(c->pages - low) << 12;
}

/* How many changes, from the first on, are of one process: a kernel's windows are, and each application's is one. */
uint32_t host_run(const struct host_change *changes, uint32_t n)
{
    uint32_t i = 1;

    while (i < n && process_of(&changes[i]) == process_of(&changes[0]))
        i++;
    return i;
}

/* As the monitor runs them (gate.c): mmap of shared frames, read-only ones through the read-only descriptor; or of nothing. */
void host_commands(const struct host_change *changes, uint32_t n, uint64_t base, int32_t rw, int32_t ro, void *out)
{
    uint64_t(*words)[7] = out;

    for (uint32_t i = 0; i < n; i++) {
        struct host_change clipped = changes[i], *c = &clipped;
        uint64_t user = process_of(c), size = user ? clip(c) : (uint64_t)c->pages << 12;

        if (user && (c->mfn == NO_MFN || !size))
            memcpy(words[i], (uint64_t[7]){size ? SYS_munmap : SYS_mprotect, base + c->at, size}, sizeof words[0]);
        else if (c->mfn == NO_MFN)
            memcpy(words[i], (uint64_t[7]){SYS_mmap, base + c->at, size, PROT_NONE, NOTHING, UINT64_MAX, 0}, sizeof words[0]);
        else
            memcpy(words[i],
                   (uint64_t[7]){SYS_mmap, base + c->at, size,
                                 (uint64_t)(PROT_READ | (c->writable ? PROT_WRITE : 0) | (c->executable ? PROT_EXEC : 0)),
                                 MAP_SHARED | MAP_FIXED | (user && c->writable ? MAP_POPULATE : 0), (uint64_t)(c->writable ? rw : ro), (uint64_t)c->mfn << 12},
                   sizeof words[0]);
    }
}

/* ---- updates */

/* The L1 of the last request, since the next one is mostly for the same: where a window shows it, and what is above it. */
struct place {
    uint32_t l1;
    int64_t at;
    uint64_t above;
};

static void find_place(struct mmu *m, struct place *p, uint32_t l1)
{
    if (p->l1 == l1)
        return;
    p->l1 = l1;
    p->at = mmu_offset(m, l1);
    p->above = p->at < 0 ? 0 : above(m, l1);
}

/* One entry of an L1: take the new references, store, remember the old ones until the host mapping has followed. */
static int32_t update_l1(struct mmu *m, struct mmu_job *job, const struct place *p, uint32_t slot, uint64_t value, int keep)
{
    uint64_t old = mmu_entry(m, p->l1, slot);
    uint32_t mapped = mmu_is_mapped(m, p->l1, slot);
    int32_t r;

    if (keep)
        value = (value & ~PTE_AD) | (old & PTE_AD);
    r = l1_get(m, job->domid, value);
    if (r)
        return r;
    mmu_store(m, p->l1, slot, value);
    if (p->at >= 0 && ((value & PTE_P) || mapped)) {
        struct host_change c = change_of((uint64_t)p->at + ((uint64_t)slot << 12), value, p->above);

        job->nr_changes = add(job->changes, job->nr_changes, c);
        mark(m, p->l1, slot, !!(value & PTE_P));
    }
    if ((old & PTE_P) && (mapped || job->unsettled))
        job->drops[job->nr_drops++] = old;
    else
        l1_put(m, old);
    return 0;
}

/* A frame that is no table: as if the guest had it mapped writable. */
static int32_t plain_store(struct mmu *m, uint32_t mfn, uint32_t slot, uint64_t value)
{
    int32_t r = frame_get(m, mfn, 1);

    if (r)
        return r;
    mmu_store(m, mfn, slot, value);
    frame_put(m, mfn, 1);
    return 0;
}

static int32_t update_one(struct mmu *m, struct mmu_job *job, struct place *p, uint64_t ptr, uint64_t value)
{
    uint64_t mfn = ptr >> 12;
    uint32_t slot = ptr >> 3 & (TABLE_ENTRIES - 1), command = ptr & 7;
    struct frame *f;

    if (command > 2)
        return -ENOSYS;
    if (mfn >= m->nr_frames || m->frames[mfn].owner != job->domid)
        return -EINVAL;
    f = &m->frames[mfn];
    if (command == 1) {
        __atomic_store_n(&m->m2p[mfn], value, __ATOMIC_RELAXED);
        return 0;
    }
    if (!f->count && !f->done)
        return plain_store(m, (uint32_t)mfn, slot, value);
    switch (f->type) {
    case FRAME_L1:
        if (f->done != TABLE_ENTRIES || !f->count)
            return -EBUSY;
        find_place(m, p, (uint32_t)mfn);
        return update_l1(m, job, p, slot, value, command == 2);
    case FRAME_L2:
    case FRAME_L3:
        return f->done == TABLE_ENTRIES && f->count ? JOB_UPPER : -EBUSY;
    default:
        return plain_store(m, (uint32_t)mfn, slot, value);
    }
}

/* Requests from `next` on. 0: all are done; JOB_FLUSH or JOB_UPPER: see there; else the error of request `next`. */
int32_t mmu_update(struct mmu *m, struct mmu_job *job)
{
    struct place place = {.l1 = NO_MFN};

    for (; job->next < job->count; job->next++) {
        int32_t r = job->nr_changes >= job->room || job->nr_drops == JOB_REQUESTS
                        ? JOB_FLUSH
                        : update_one(m, job, &place, job->requests[job->next][0], job->requests[job->next][1]);

        if (r)
            return r;
    }
    return 0;
}

/* The monitor has acknowledged the changes: the old entries' references fall. */
void mmu_commit(struct mmu *m, struct mmu_job *job)
{
    for (uint32_t i = 0; i < job->nr_drops; i++)
        l1_put(m, job->drops[i]);
    job->nr_drops = job->nr_changes = 0;
}

/* ---- walks */

/* The L1 for `va` below a validated root, or NO_MFN; *rights: what the levels above allow. */
static uint32_t find_l1(struct mmu *m, uint32_t root, uint64_t va, uint64_t *rights)
{
    uint64_t e3, e2;

    if (va >> SPACE_SHIFT)
        return NO_MFN;
    e3 = mmu_entry(m, root, (uint32_t)(va >> 30));
    if (!(e3 & PTE_P))
        return NO_MFN;
    e2 = mmu_entry(m, (uint32_t)PTE_MFN(e3), va >> 21 & (TABLE_ENTRIES - 1));
    *rights = (e2 & e3 & PTE_RW) | ((e2 | e3) & PTE_NX);
    return e2 & PTE_P ? (uint32_t)PTE_MFN(e2) : NO_MFN;
}

uint32_t mmu_l1(struct mmu *m, uint32_t root, uint64_t va)
{
    uint64_t rights;

    return find_l1(m, root, va, &rights);
}

static int allows(uint64_t entry, uint64_t rights, uint32_t access)
{
    return (entry & PTE_P) && (!(access & PF_WRITE) || (entry & rights & PTE_RW)) &&
           (!(access & PF_FETCH) || !((entry | rights) & PTE_NX));
}

/* Whether the tables allow an access, of the bits of a page fault's error code. */
uint32_t mmu_allows(struct mmu *m, uint32_t root, uint64_t va, uint32_t access)
{
    uint64_t rights = 0;
    uint32_t l1 = find_l1(m, root, va, &rights);

    return l1 != NO_MFN && allows(mmu_entry(m, l1, va >> 12 & (TABLE_ENTRIES - 1)), rights, access);
}

/* The frame at `va` if they allow reading, or writing, there; else NO_MFN. */
uint32_t mmu_walk(struct mmu *m, uint32_t root, uint64_t va, uint32_t write)
{
    uint64_t rights = 0, entry;
    uint32_t l1 = find_l1(m, root, va, &rights);

    if (l1 == NO_MFN)
        return NO_MFN;
    entry = mmu_entry(m, l1, va >> 12 & (TABLE_ENTRIES - 1));
    return allows(entry, rights, write ? PF_WRITE : 0) ? (uint32_t)PTE_MFN(entry) : NO_MFN;
}

/* What is present and not mapped of the slots [from, to) of an L1, at `base`, until `out` has `room` changes; and `wanted` again. */
static uint32_t fill_slots(struct mmu *m, uint32_t l1, uint32_t from, uint32_t to, uint32_t wanted, uint64_t base, uint64_t rights,
                           struct host_change *out, uint32_t n, uint32_t room)
{
    for (uint32_t slot = from; slot < to && n < room; slot++) {
        uint64_t entry = mmu_entry(m, l1, slot);

        if (slot != wanted && (!(entry & PTE_P) || mmu_is_mapped(m, l1, slot)))
            continue;
        n = add(out, n, change_of(base + ((uint64_t)slot << 12), entry, rights));
        mark(m, l1, slot, 1);
    }
    return n;
}

/* What is to be mapped after a fault at `va` of a root that a window shows: the page, if the tables allow the access, and the
 * present ones of the FILL_PAGES it is among. Returns the number of changes, 0: they do not. A program has the rest of its table as
 * well, as far as FILL_CHANGES go: one that was just given a space has all of it still to come. */
uint32_t mmu_fill(struct mmu *m, uint32_t root, uint64_t va, uint32_t access, struct host_change *out)
{
    uint64_t rights = 0, entry;
    uint32_t l1 = find_l1(m, root, va, &rights), n, wanted = va >> 12 & (TABLE_ENTRIES - 1);
    uint32_t first = wanted & ~(FILL_PAGES - 1u), last = first + FILL_PAGES;
    uint64_t base = ((uint64_t)(m->frames[root].window - 1u) << SPACE_SHIFT) + (va & ~((1ull << 21) - 1));

    if (l1 == NO_MFN)
        return 0;
    entry = mmu_entry(m, l1, wanted);
    if (!allows(entry, rights, access))
        return 0;
    n = fill_slots(m, l1, first, last, wanted, base, rights, out, 0, FILL_CHANGES);
    if (m->frames[root].window > NR_WINDOWS) {
        n = fill_slots(m, l1, last, TABLE_ENTRIES, wanted, base, rights, out, n, FILL_CHANGES);
        n = fill_slots(m, l1, 0, first, wanted, base, rights, out, n, FILL_CHANGES);
    }
    return n;
}

/* Map what is present of a live L1 and not mapped, from *slot on; as many changes as there is room for. */
uint32_t mmu_show(struct mmu *m, uint32_t l1, uint32_t *slot, struct host_change *out, uint32_t room)
{
    uint64_t base = (uint64_t)mmu_offset(m, l1), rights = above(m, l1);
    uint32_t n = 0;

    for (; *slot < TABLE_ENTRIES && n < room; ++*slot) {
        uint64_t entry = mmu_entry(m, l1, *slot);

        if (!(entry & PTE_P) || mmu_is_mapped(m, l1, *slot))
            continue;
        n = add(out, n, change_of(base + ((uint64_t)*slot << 12), entry, rights));
        mark(m, l1, *slot, 1);
    }
    return n;
}

void mmu_unmark_one(struct mmu *m, uint32_t l1, uint32_t slot) { mark(m, l1, slot, 0); }

/* Nothing below this table is mapped any more, or will be when the monitor has done what it was told. */
void mmu_unmark(struct mmu *m, uint32_t table)
{
    uint32_t level = m->frames[table].type;

    if (level == FRAME_L1) {
        memset(m->mapped[table], 0, sizeof m->mapped[0]);
        return;
    }
    for (uint32_t i = 0; i < TABLE_ENTRIES; i++) {
        uint64_t entry = mmu_entry(m, table, i);

        if (entry & PTE_P)
            mmu_unmark(m, (uint32_t)PTE_MFN(entry));
    }
}
