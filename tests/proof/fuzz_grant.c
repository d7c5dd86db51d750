/* Grants against hostile domains: claims and acceptances by what the table said, copies within frames that were granted and
 * bytes that were asked for, never into a page table, and not a bit of an entry, a count of a frame or a byte of memory
 * changed besides. */
#include "fuzz.h"

#include "guest.h"
#include "hv.h"

enum { DOMAINS = 3, FRAMES = 16, MFNS = 50, PAGE = 4096, REFS = GRANT_TABLE_FRAMES * 512, SELF = 0x7FF0, NONE = -1 };
enum { PERMIT = 1, ACCEPT = 2, READONLY = 4, READING = 8, WRITING = 16, COMMITTED = 4, COMPLETED = 8 };
enum { OKAY = 0, BAD_DOMAIN = -2, BAD_GNTREF = -3, DENIED = -8, BAD_COPY_ARG = -10 };

struct side {
    uint64_t frame;
    uint16_t domid, offset;
    uint32_t pad;
};
struct copy {
    struct side source, dest;
    uint16_t len, flags;
    int16_t status;
    uint16_t pad;
};

static _Alignas(4096) char machine[MFNS * PAGE], at_rest[MFNS * PAGE]; /* each copy that was made is taken back */
static _Alignas(64) uint64_t tables[DOMAINS][REFS]; /* as the guests see them */
static struct frame frames[MFNS], frames_at_rest[MFNS];
static struct mmu mmu = {.frames = frames, .machine = machine, .nr_frames = MFNS};
static struct gnt_domain made[DOMAINS], *domains[SELF];

/* The entries that plays use: eight, and the last; and references to none. */
static const uint32_t refs[9] = {8, 9, 10, 11, 12, 13, 14, 15, REFS - 1};

static uint32_t some_ref(struct input *in)
{
    uint32_t n = (uint32_t)number(in, 1);

    return n < 250 ? refs[n % 9] : n < 253 ? REFS : REFS + (uint32_t)number(in, 4) % (UINT32_MAX - REFS);
}

static uint32_t first_of(uint32_t domid) { return 1 + domid % DOMAINS * FRAMES; }

/* Frames: of a domain, of another or nobody, beyond. */
static uint32_t some_frame(struct input *in, uint32_t domid)
{
    uint32_t n = (uint32_t)number(in, 1);

    return n < 200 ? first_of(domid) + n % FRAMES : n < 250 ? n % (MFNS + 1) : (uint32_t)number(in, 4);
}

/* It is a page table, or becomes one or ceases to be one just now. */
static int is_table(uint32_t mfn) { return frames[mfn].type == FRAME_L1 && (frames[mfn].count || frames[mfn].done); }

static uint64_t *entry(uint32_t domid, uint32_t ref) { return &tables[domid][ref % REFS]; }

static int granted(uint64_t e, uint16_t to, int writable)
{
    return (e & 3) == PERMIT && (uint16_t)(e >> 16) == to && !(writable && e & READONLY);
}

/* ---- single grants */

static void set_entry(struct input *in)
{
    uint32_t domid = below(in, DOMAINS), ref = refs[below(in, 9)], n = (uint32_t)number(in, 1);
    uint64_t flags = n < 160 ? PERMIT | (n & 4) : n < 200 ? ACCEPT : n;

    *entry(domid, ref) = (uint64_t)some_frame(in, domid) << 32 | (uint64_t)(number(in, 1) % (DOMAINS + 1)) << 16 | flags;
}

static void claim(struct input *in)
{
    uint32_t domid = below(in, DOMAINS), ref = some_ref(in), frame = 0xdead;
    uint16_t to = (uint16_t)below(in, DOMAINS);
    int writable = (int)below(in, 2);
    uint64_t was = *entry(domid, ref);
    int32_t r = grant_claim(&made[domid], ref, to, writable, &frame);

    if (ref >= REFS)
        must(r == -ENOENT);
    else if (!granted(was, to, writable))
        must(r == -EPERM && *entry(domid, ref) == was && frame == 0xdead);
    else {
        must(r == 0 && frame == was >> 32);
        must(*entry(domid, ref) == (was | READING | (writable ? WRITING : 0)));
        if (rarely(in, 2)) {
            grant_release(&made[domid], ref, writable, 1);
            must(*entry(domid, ref) == (was & ~(uint64_t)(READING | (writable ? WRITING : 0))));
        }
    }
}

static void accept(struct input *in)
{
    uint32_t domid = below(in, DOMAINS), ref = some_ref(in);
    uint16_t from = (uint16_t)below(in, DOMAINS);
    uint64_t was = *entry(domid, ref);
    int32_t r = grant_accept(&made[domid], ref, from);

    if (ref >= REFS)
        must(r == -ENOENT);
    else if ((was & 0xffff) != ACCEPT || (uint16_t)(was >> 16) != from)
        must(r == -EPERM && *entry(domid, ref) == was);
    else {
        uint32_t mfn = some_frame(in, from);

        must(r == 0 && *entry(domid, ref) == (was | COMMITTED));
        *entry(domid, ref) ^= number(in, 1); /* what the taker writes meanwhile is lost */
        grant_accepted(&made[domid], ref, from, mfn);
        must(*entry(domid, ref) == ((uint64_t)mfn << 32 | (uint32_t)was | COMMITTED | COMPLETED));
    }
}

/* The owner's own calls (guest.c): an entry that is in use is neither taken back nor written over. */
static void owner(struct input *in)
{
    uint32_t domid = below(in, DOMAINS), ref = refs[below(in, 9)];
    uint64_t was = *entry(domid, ref);

    if (below(in, 2)) {
        must(grant_end(tables[domid], ref) == (was & (READING | WRITING) ? -EBUSY : 0));
        must(*entry(domid, ref) == (was & (READING | WRITING) ? was : 0));
    } else {
        int32_t r = grant_set(tables[domid], ref, PERMIT, 2, 15);

        must(r == (was & 0xffff ? -EBUSY : 0));
        must(*entry(domid, ref) == (r ? was : 15ull << 32 | 2 << 16 | PERMIT));
    }
}

/* ---- copies */

/* Where one side of a copy is in machine memory, or NONE and the status. */
static int64_t place(const struct side *s, uint16_t caller, int is_ref, int writable, int16_t *status)
{
    uint32_t domid = s->domid == SELF ? caller : s->domid;
    uint64_t mfn = s->frame;

    *status = BAD_DOMAIN;
    if (domid >= DOMAINS || !made[domid].alive)
        return NONE;
    *status = is_ref ? BAD_GNTREF : DENIED;
    if (is_ref ? s->frame >= REFS : domid != caller)
        return NONE;
    *status = DENIED;
    if (is_ref && !granted(*entry(domid, (uint32_t)mfn), caller, writable))
        return NONE;
    mfn = is_ref ? *entry(domid, (uint32_t)mfn) >> 32 : mfn;
    *status = is_ref ? BAD_GNTREF : BAD_COPY_ARG;
    if (mfn >= MFNS || frames[mfn].owner != domid)
        return NONE;
    *status = DENIED;
    if (writable && is_table((uint32_t)mfn))
        return NONE;
    *status = OKAY;
    return (int64_t)mfn * PAGE + s->offset;
}

static int16_t model_copy(const struct copy *op, uint16_t caller, int64_t *from, int64_t *to)
{
    int16_t status = BAD_COPY_ARG;

    if (op->flags > 3 || op->source.offset >= PAGE || op->dest.offset >= PAGE || op->source.offset + op->len > PAGE ||
        op->dest.offset + op->len > PAGE)
        return status;
    *from = place(&op->source, caller, op->flags & 1, 0, &status);
    if (status == OKAY)
        *to = place(&op->dest, caller, op->flags & 2, 1, &status);
    return status;
}

static void some_side(struct input *in, struct side *s, uint16_t caller, int is_ref)
{
    s->domid = is_ref || rarely(in, 4) ? (uint16_t)below(in, DOMAINS + 1) : SELF;
    s->frame = is_ref ? some_ref(in) : some_frame(in, caller);
    s->offset = (uint16_t)(number(in, 1) * 16);
}

static void note_entries(uint64_t out[DOMAINS][9])
{
    for (uint32_t i = 0; i < DOMAINS * 9; i++)
        out[i / 9][i % 9] = *entry(i / 9, refs[i % 9]);
}

/* No use of a frame is left; one that was written and is no table is of that type now, which is nothing without a use. */
static void check_frames(void)
{
    for (uint32_t i = 0; i < MFNS; i++)
        if (!frames[i].count && !frames[i].done)
            frames[i].type = frames_at_rest[i].type;
    must(!memcmp(frames, frames_at_rest, sizeof frames));
}

static void copy(struct input *in)
{
    struct copy op = {.flags = (uint16_t)below(in, 4)};
    uint16_t caller = (uint16_t)below(in, DOMAINS);
    uint64_t was[DOMAINS][9], is[DOMAINS][9];
    int64_t from = NONE, to = NONE;
    int16_t expected;

    some_side(in, &op.source, caller, op.flags & 1);
    some_side(in, &op.dest, caller, op.flags & 2);
    op.len = (uint16_t)(number(in, 1) * 8);
    while (rarely(in, 4))
        poke(in, &op, 36);
    expected = model_copy(&op, caller, &from, &to);
    note_entries(was);
    must(grant_copy(domains, caller, &mmu, (char *)&op, 1) == (expected == OKAY));
    note_entries(is);
    must(op.status == expected && !memcmp(was, is, sizeof was));
    check_frames();
    if (expected == OKAY) {
        must(!memcmp(machine + to, at_rest + from, op.len));
        memcpy(machine + to, at_rest + to, op.len);
    }
}

static void once(void)
{
    for (uint32_t i = 0; i < sizeof at_rest; i++)
        at_rest[i] = machine[i] = (char)(i * 2654435761u >> 24);
    for (uint32_t i = 0; i < DOMAINS; i++) {
        for (uint32_t k = 0; k < GRANT_TABLE_FRAMES; k++)
            made[i].table[k] = (char *)&tables[i][k * 512];
        for (uint32_t k = 0; k < FRAMES; k++)
            frames[first_of(i) + k] = (struct frame){.total = 2, .owner = (uint16_t)i, .parent = NO_MFN};
        frames[first_of(i) + 3] = (struct frame){2, 1, NO_MFN, .owner = (uint16_t)i, .done = 512, .type = FRAME_L1, .pinned = 1};
        frames[first_of(i) + 5] = (struct frame){2, 0, NO_MFN, .owner = (uint16_t)i, .done = 7, .type = FRAME_L1};
        frames[first_of(i) + 6].type = FRAME_L1; /* it was one */
        frames[first_of(i) + 7] = (struct frame){3, 2, NO_MFN, .owner = (uint16_t)i, .type = FRAME_WRITABLE};
        made[i].domid = (uint16_t)i;
        domains[i] = &made[i];
    }
    for (uint32_t i = 0; i < MFNS; i++)
        if (!frames[i].total)
            frames[i] = (struct frame){.parent = NO_MFN, .owner = NO_OWNER};
    memcpy(frames_at_rest, frames, sizeof frames);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint64_t nothing[DOMAINS][REFS];
    struct input in = {data, data + size};

    if (!domains[0])
        once();
    for (uint32_t i = 0; i < DOMAINS; i++)
        made[i].alive = 1;
    made[below(&in, DOMAINS)].alive = (uint32_t)!rarely(&in, 4);
    while (more(&in))
        switch (below(&in, 8)) {
        default:
            set_entry(&in);
            break;
        case 2:
            claim(&in);
            break;
        case 3:
            accept(&in);
            break;
        case 4:
            owner(&in);
            break;
        case 5:
        case 6:
        case 7:
            copy(&in);
        }
    for (uint32_t i = 0; i < DOMAINS * 9; i++)
        *entry(i / 9, refs[i % 9]) = 0;
    must(!memcmp(tables, nothing, sizeof tables) && !memcmp(machine, at_rest, sizeof machine));
    return 0;
}
