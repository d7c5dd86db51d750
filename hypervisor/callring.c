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

/* Take a batch where none is under way; run event sends from where it stands. Returns how many entries are left, the
 * first of which (`next`) is Python's; 0: the batch is done; -EPROTO: the ring is broken. */
int32_t callring_run(struct callring *c, struct evt_end **ends, uint16_t domid)
{
    if (c->next == c->taken) {
        int32_t n = ring_back_take(ring_of(c), c->entries, CALLRING_BATCH);

        if (n < 0)
            return n;
        c->taken = (uint32_t)n;
        c->next = c->answered = c->nr_signals = 0;
    }
    while (c->next < c->taken) {
        const struct entry *e = (const struct entry *)c->entries + c->next;
        uint16_t signal;
        int32_t r;

        if (e->op != OP_EVENT_CHANNEL || e->words[0] != EVTCHN_SEND || e->words[1] > UINT32_MAX || e->words[2] | e->words[3] |
            e->words[4] | e->words[5])
            break;
        r = evtchn_send(ends, domid, (uint32_t)e->words[1], &signal);
        if (signal != NO_DOMAIN)
            c->signals[c->nr_signals++] = signal;
        callring_answer(c, r);
    }
    return (int32_t)(c->taken - c->next);
}

/* 1: the guest asked to be told; 0; -EPROTO. */
int32_t callring_publish(struct callring *c)
{
    uint32_t n = c->answered;

    c->answered = 0;
    return n ? ring_back_publish(ring_of(c), c->answers, n) : 0;
}

int32_t callring_recheck(struct callring *c) { return ring_back_recheck(ring_of(c)); }

/* Look at the producers of `count` rings, `spins` times round; the first that has work, or -1. */
int32_t callring_spin(struct callring **rings, uint32_t count, uint32_t spins)
{
    for (uint32_t s = 0; s < spins; s++) {
        for (uint32_t i = 0; i < count; i++) {
            struct ring_back *b = ring_of(rings[i]);

            if (atomic_load_explicit(&b->sh->req_prod, memory_order_acquire) != b->req_cons)
                return (int32_t)i;
        }
        __builtin_ia32_pause();
    }
    return -1;
}
