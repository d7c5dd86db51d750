/* The hypercall ring: multicall entries taken in a batch, event sends run here, everything else handed to Python in turn.
 * Answers are in order and published once a batch. */
#include "hv.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "ring.h"

#define OP_EVENT_CHANNEL 32u
#define EVTCHN_SEND 4u

struct entry {
    uint64_t op;
    int64_t result;
    uint64_t words[6];
};
struct answer {
    uint64_t op;
    int64_t result;
};
_Static_assert(sizeof(struct entry) == 64 && offsetof(struct entry, words) == 16, "multicall_entry");
_Static_assert(sizeof(struct ring_cpus) <= sizeof((struct ring_shared *)0)->pad, "the header's pad");
_Static_assert(sizeof(struct ring_back) <= 64, "the room that callring has for it");

static struct ring_back *ring_of(struct callring *c) { return (struct ring_back *)c->ring; }

int32_t callring_attach(struct callring *c, void *page)
{
    return ring_back_attach(ring_of(c), page, 4096, sizeof(struct entry), sizeof(struct answer));
}

void callring_answer(struct callring *c, int64_t result)
{
    struct answer *a = (struct answer *)c->answers + c->answered++;

    *a = (struct answer){c->entries[c->next++][0], result};
}

/* Event sends from where the batch stands; stops at the first entry that is something else. */
static void run_sends(struct callring *c, struct evt_end **ends, uint16_t domid)
{
    while (c->next < c->taken) {
        const struct entry *e = (const struct entry *)c->entries + c->next;
        uint16_t signal;
        int32_t r;

        if (e->op != OP_EVENT_CHANNEL || e->words[0] != EVTCHN_SEND || e->words[1] > UINT32_MAX || e->words[2] | e->words[3] |
            e->words[4] | e->words[5])
            return;
        r = evtchn_send(ends, domid, (uint32_t)e->words[1], &signal);
        if (signal != NO_DOMAIN)
            c->signals[c->nr_signals++] = signal;
        callring_answer(c, r);
    }
}

static int pushed(const void *back)
{
    const struct ring_back *b = back;

    return atomic_load_explicit(&b->sh->req_prod, memory_order_relaxed) != b->req_cons;
}

static uint32_t cpu_of_guest(struct callring *c)
{
    return atomic_load_explicit(&ring_cpus(ring_of(c)->sh)->front, memory_order_relaxed);
}

static int32_t take(struct callring *c, int64_t spin_ns)
{
    struct ring_back *b = ring_of(c);
    int32_t n;

    if (spin_ns && !pushed(b))
        spin(&c->spin, cpu_of_guest(c), spin_ns, pushed, b);
    n = ring_back_take(b, c->entries, CALLRING_BATCH);
    c->taken = n > 0 ? (uint32_t)n : 0;
    c->next = c->answered = 0;
    return n;
}

/* Batches of event sends, as long as they keep coming within `spin_ns`, at most `max` of them. Returns how many
 * entries of a batch are left, the first of which (`next`) is Python's; 0: none is, `taken` says whether the last look
 * found any, `signals` who must be signalled now; -EPROTO: the ring is broken. */
int32_t callring_run(struct callring *c, struct evt_end **ends, uint16_t domid, int64_t spin_ns, uint32_t max)
{
    int32_t r;

    atomic_store_explicit(&ring_cpus(ring_of(c)->sh)->back, spin_cpu(), memory_order_relaxed);
    for (uint32_t i = 0; i < max; i++) {
        if (c->next == c->taken) {
            if (c->answered && (r = ring_back_publish(ring_of(c), c->answers, c->answered)) < 0)
                return r;
            c->answered = 0;
            if (c->nr_signals)
                return 0;
            if ((r = take(c, spin_ns)) <= 0)
                return r;
        }
        run_sends(c, ends, domid);
        if (c->next < c->taken)
            return (int32_t)(c->taken - c->next);
    }
    return 0;
}

int32_t callring_recheck(struct callring *c) { return ring_back_recheck(ring_of(c)); }

/* Whether to look at this ring for a while before we sleep, and not to be told of what its guest pushes. Once a wait. */
int32_t callring_worth(struct callring *c, struct spin *spin) { return spin_worth(spin, cpu_of_guest(c)); }

struct rings {
    struct callring **rings;
    uint32_t count;
};

static int any_pushed(const void *of)
{
    const struct rings *r = of;

    for (uint32_t i = 0; i < r->count; i++)
        if (pushed(ring_of(r->rings[i])))
            return (int)i + 1;
    return 0;
}

/* Look at the producers of `count` rings; the first that has work, or -1. */
int32_t callring_spin(struct callring **rings, uint32_t count, struct spin *spin)
{
    return spin_until(spin, SPIN_NS, any_pushed, &(struct rings){rings, count}) - 1;
}
