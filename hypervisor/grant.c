/* Grant entries, version 1: {u16 flags, u16 domid, u32 frame}, one 64-bit word, so that one compare-and-swap sees all of
 * it; and GNTTABOP_copy over a batch of private copies. */
#include "hv.h"

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#define GTF_PERMIT_ACCESS 1u
#define GTF_ACCEPT_TRANSFER 2u
#define GTF_TRANSFER_COMMITTED 4u
#define GTF_TRANSFER_COMPLETED 8u
#define GTF_TYPE_MASK 3u
#define GTF_READONLY 4u
#define GTF_READING 8u
#define GTF_WRITING 16u
#define PAGE 4096u
#define PER_FRAME (PAGE / 8)
#define DOMID_SELF 0x7FF0u

static _Atomic uint64_t *entry_of(struct gnt_domain *d, uint32_t ref)
{
    return (_Atomic uint64_t *)(void *)d->table[ref / PER_FRAME] + ref % PER_FRAME;
}

/* Mark the entry in use and copy its frame out; *seen: the word before. What is checked is what the successful exchange
 * saw. -EPERM: not granted to domid, or not for writing; -EAGAIN: it kept changing under us; -ENOENT: no such entry. */
static int32_t claim(struct gnt_domain *d, uint32_t ref, uint16_t domid, int32_t writable, uint32_t *frame, uint64_t *before)
{
    _Atomic uint64_t *entry;
    uint64_t seen;

    if (ref >= GRANT_TABLE_FRAMES * PER_FRAME)
        return -ENOENT;
    entry = entry_of(d, ref);
    seen = atomic_load(entry);
    for (int tries = 0; tries < 16; tries++) {
        uint32_t flags = seen & 0xffff;

        if ((flags & GTF_TYPE_MASK) != GTF_PERMIT_ACCESS || (uint16_t)(seen >> 16) != domid)
            return -EPERM;
        if (writable && (flags & GTF_READONLY))
            return -EPERM;
        if (atomic_compare_exchange_strong(entry, &seen, seen | GTF_READING | (writable ? GTF_WRITING : 0))) {
            *frame = (uint32_t)(seen >> 32);
            *before = seen;
            return 0;
        }
    }
    return -EAGAIN;
}

int32_t grant_claim(struct gnt_domain *granter, uint32_t ref, uint16_t domid, int32_t writable, uint32_t *frame)
{
    uint64_t before;

    return claim(granter, ref, domid, writable, frame, &before);
}

void grant_release(struct gnt_domain *granter, uint32_t ref, int32_t clear_writing, int32_t clear_reading)
{
    uint64_t bits = (clear_writing ? GTF_WRITING : 0) | (clear_reading ? GTF_READING : 0);

    atomic_fetch_and(entry_of(granter, ref), ~bits);
}

/* The entry waits for a frame from `domid`: commit it. -EPERM: it does not. */
int32_t grant_accept(struct gnt_domain *taker, uint32_t ref, uint16_t domid)
{
    _Atomic uint64_t *entry;
    uint64_t seen;

    if (ref >= GRANT_TABLE_FRAMES * PER_FRAME)
        return -ENOENT;
    entry = entry_of(taker, ref);
    seen = atomic_load(entry);
    if ((seen & 0xffff) != GTF_ACCEPT_TRANSFER || (uint16_t)(seen >> 16) != domid)
        return -EPERM;
    if (!atomic_compare_exchange_strong(entry, &seen, seen | GTF_TRANSFER_COMMITTED))
        return -EPERM;
    return 0;
}

/* The end of it: frame `mfn` is there, which the entry says before it says that it is completed. What grant_accept saw in the
 * rest of it is known: nothing is read again. */
void grant_accepted(struct gnt_domain *taker, uint32_t ref, uint16_t domid, uint32_t mfn)
{
    uint64_t body = (uint64_t)mfn << 32 | (uint64_t)domid << 16 | GTF_ACCEPT_TRANSFER | GTF_TRANSFER_COMMITTED;

    atomic_store(entry_of(taker, ref), body);
    atomic_store(entry_of(taker, ref), body | GTF_TRANSFER_COMPLETED);
}

/* ---- GNTTABOP_copy */

struct copy_ptr {
    uint64_t frame; /* a reference, or a frame of the caller's own */
    uint16_t domid, offset;
    uint32_t pad;
};
struct copy_op {
    struct copy_ptr source, dest;
    uint16_t len, flags;
    int16_t status;
    uint16_t pad;
};
_Static_assert(sizeof(struct copy_op) == 40 && offsetof(struct copy_op, len) == 32, "gnttab_copy");

enum { OKAY = 0, GENERAL_ERROR = -1, BAD_DOMAIN = -2, BAD_GNTREF = -3, PERMISSION_DENIED = -8, BAD_COPY_ARG = -10 };
enum { SOURCE_GREF = 1, DEST_GREF = 2 };

/* One side of a copy while it lasts: where its bytes are, and what to undo. */
struct side {
    struct gnt_domain *granter; /* 0: the caller's own frame */
    uint32_t ref, mfn;          /* NO_MFN: no reference is held on the frame */
    uint64_t before;
    char *at;
};

static int16_t resolve(struct gnt_domain **domains, uint16_t caller, struct mmu *m, const struct copy_ptr *p, int is_ref,
                       int writable, struct side *s)
{
    uint16_t domid = p->domid == DOMID_SELF ? caller : p->domid;
    struct gnt_domain *d = domid < DOMID_SELF ? domains[domid] : 0;
    uint32_t mfn;

    s->granter = 0;
    s->mfn = NO_MFN;
    if (!d || !d->alive)
        return BAD_DOMAIN;
    if (is_ref) {
        int32_t r = p->frame > UINT32_MAX ? -ENOENT : claim(d, (uint32_t)p->frame, caller, writable, &mfn, &s->before);

        if (r)
            return r == -ENOENT ? BAD_GNTREF : PERMISSION_DENIED;
        s->granter = d;
        s->ref = (uint32_t)p->frame;
    } else {
        if (domid != caller)
            return PERMISSION_DENIED;
        if (p->frame > UINT32_MAX)
            return BAD_COPY_ARG;
        mfn = (uint32_t)p->frame;
    }
    if (mfn >= m->nr_frames || m->frames[mfn].owner != d->domid)
        return is_ref ? BAD_GNTREF : BAD_COPY_ARG;
    if (writable && frame_get(m, mfn, 1)) /* a table: nobody stores to it */
        return PERMISSION_DENIED;
    s->mfn = writable ? mfn : NO_MFN;
    s->at = m->machine + (uint64_t)mfn * PAGE + p->offset;
    return OKAY;
}

/* The bits that this copy set, and only those. */
static void undo(struct mmu *m, struct side *s)
{
    if (s->mfn != NO_MFN)
        frame_put(m, s->mfn, 1);
    if (s->granter)
        grant_release(s->granter, s->ref, !(s->before & GTF_WRITING), !(s->before & GTF_READING));
}

static int16_t copy_one(struct gnt_domain **domains, uint16_t caller, struct mmu *m, const struct copy_op *op)
{
    struct side source, dest;
    int16_t status;

    if (op->flags & ~(uint16_t)(SOURCE_GREF | DEST_GREF) || op->source.offset > PAGE - 1u || op->dest.offset > PAGE - 1u ||
        op->len > PAGE - op->source.offset || op->len > PAGE - op->dest.offset)
        return BAD_COPY_ARG;
    status = resolve(domains, caller, m, &op->source, op->flags & SOURCE_GREF, 0, &source);
    if (status == OKAY) {
        status = resolve(domains, caller, m, &op->dest, op->flags & DEST_GREF, 1, &dest);
        if (status == OKAY)
            memmove(dest.at, source.at, op->len);
        undo(m, &dest);
    }
    undo(m, &source);
    return status;
}

/* Run `count` private copies of gnttab_copy, each with a status of its own; how many were OKAY. The caller's own claims
 * are undone before the next one begins, so a failing entry leaves nothing behind. */
uint32_t grant_copy(struct gnt_domain **domains, uint16_t caller, struct mmu *m, char *ops, uint32_t count)
{
    uint32_t good = 0;

    for (uint32_t i = 0; i < count; i++) {
        struct copy_op *op = (struct copy_op *)(void *)ops + i;

        op->status = copy_one(domains, caller, m, op);
        good += op->status == OKAY;
    }
    return good;
}
