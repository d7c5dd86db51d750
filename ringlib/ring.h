/* Xen's shared ring (xen/include/public/io/ring.h), byte for byte, in C11 atomics.
 *
 *      0 req_prod   [FRONT]        requests published
 *      4 req_event  [BACK]         "tell me when req_prod reaches this"
 *      8 rsp_prod   [BACK]         responses published
 *     12 rsp_event  [FRONT]        "tell me when rsp_prod reaches this"
 *     16 pad to 64
 *     64 slots: union of request and response, a power of two of them
 *
 * Indexes run free in 32 bits and are masked only at the slot. Consumers and sizes are private to each side. Nothing here
 * trusts the peer: an index that cannot be poisons the ring, and a slot is copied out once before anybody looks at it.
 * Header-only, so that a mover in C and Python use the same lines. */
#ifndef RINGLIB_RING_H
#define RINGLIB_RING_H

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct ring_shared {
    _Atomic uint32_t req_prod, req_event;
    _Atomic uint32_t rsp_prod, rsp_event;
    uint8_t pad[48];
};
_Static_assert(sizeof(struct ring_shared) == 64, "the header of io/ring.h");
_Static_assert(offsetof(struct ring_shared, rsp_prod) == 8, "the header of io/ring.h");
_Static_assert(offsetof(struct ring_shared, rsp_event) == 12, "the header of io/ring.h");

/* What the two ends of ring1's hypercall ring say to each other in the header's pad: where they last ran, plus 1. A hint, and
 * on no other ring. */
struct ring_cpus {
    _Atomic uint32_t front, back;
};
static inline struct ring_cpus *ring_cpus(struct ring_shared *sh) { return (struct ring_cpus *)(void *)sh->pad; }

struct ring_front {
    struct ring_shared *sh;
    uint32_t nr_ents, slot_size, req_size, rsp_size;
    uint32_t req_prod_pvt, rsp_cons, rsp_seen, broken;
};
struct ring_back {
    struct ring_shared *sh;
    uint32_t nr_ents, slot_size, req_size, rsp_size;
    uint32_t rsp_prod_pvt, req_cons, req_seen, broken;
};

static inline uint32_t ring_entries(uint64_t bytes, uint32_t slot_size)
{
    uint64_t n = bytes > 64 && slot_size ? (bytes - 64) / slot_size : 0;

    if (n > 1u << 20)
        n = 1u << 20;
    while (n & (n - 1))
        n &= n - 1;
    return (uint32_t)n;
}

static inline char *ring_slot(struct ring_shared *sh, uint32_t index, uint32_t nr_ents, uint32_t slot_size)
{
    return (char *)sh + 64 + (uint64_t)(index & (nr_ents - 1)) * slot_size;
}

/* Of n slots from `index` on, as many as one copy can serve: where records fill their slots, all up to the wrap. */
static inline uint32_t ring_run(uint32_t index, uint32_t nr_ents, uint32_t n, int filled)
{
    uint32_t to_wrap = nr_ents - (index & (nr_ents - 1));

    return !filled ? 1 : n < to_wrap ? n : to_wrap;
}

/* Copy n packed records of `size` bytes into the slots from `index` on. */
static inline void ring_copy_in(struct ring_shared *sh, uint32_t index, uint32_t nr_ents, uint32_t slot_size,
                                const void *records, uint32_t size, uint32_t n)
{
    for (uint32_t i = 0, k; i < n && size; i += k) {
        k = ring_run(index + i, nr_ents, n - i, size == slot_size);
        memcpy(ring_slot(sh, index + i, nr_ents, slot_size), (const char *)records + (uint64_t)i * size, (uint64_t)k * size);
    }
}

/* The other way; each byte of a slot is read once. */
static inline void ring_copy_out(struct ring_shared *sh, uint32_t index, uint32_t nr_ents, uint32_t slot_size,
                                 void *records, uint32_t size, uint32_t n)
{
    for (uint32_t i = 0, k; i < n && size; i += k) {
        k = ring_run(index + i, nr_ents, n - i, size == slot_size);
        memcpy((char *)records + (uint64_t)i * size, ring_slot(sh, index + i, nr_ents, slot_size), (uint64_t)k * size);
    }
}

/* Only the frontend initialises the header. */
static inline int ring_front_init(struct ring_front *f, void *page, uint64_t bytes, uint32_t req_size, uint32_t rsp_size)
{
    uint32_t slot = req_size > rsp_size ? req_size : rsp_size;
    uint32_t n = ring_entries(bytes, slot);

    if (!n)
        return -EINVAL;
    *f = (struct ring_front){page, n, slot, req_size, rsp_size, 0, 0, 0, 0};
    memset(page, 0, 64);
    atomic_store(&f->sh->req_event, 1);
    atomic_store(&f->sh->rsp_event, 1);
    return 0;
}

/* A backend begins where the responses stand: what is unanswered is taken again. But one that died while it wrote answers
 * has written them over requests: after a death the frontend asks again, from its own copies, or somebody kept the slots. */
static inline int ring_back_attach(struct ring_back *b, void *page, uint64_t bytes, uint32_t req_size, uint32_t rsp_size)
{
    uint32_t slot = req_size > rsp_size ? req_size : rsp_size;
    uint32_t n = ring_entries(bytes, slot), prod;

    if (!n)
        return -EINVAL;
    *b = (struct ring_back){page, n, slot, req_size, rsp_size, 0, 0, 0, 0};
    prod = atomic_load(&b->sh->rsp_prod);
    b->rsp_prod_pvt = b->req_cons = b->req_seen = prod;
    return 0;
}

static inline uint32_t ring_front_free(const struct ring_front *f)
{
    return f->nr_ents - (f->req_prod_pvt - f->rsp_cons);
}

/* RING_PUSH_*_AND_CHECK_NOTIFY: publish, then ask whether the peer's event index lies in (old, new]. The full barrier
 * between them pairs with the one in ring_final_check: either we see the peer's event index, or it sees our entries. */
static inline int32_t ring_push(_Atomic uint32_t *prod, _Atomic uint32_t *event, uint32_t old, uint32_t new)
{
    atomic_store_explicit(prod, new, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    return (uint32_t)(new - atomic_load_explicit(event, memory_order_relaxed)) < (uint32_t)(new - old);
}

/* 1: notify the peer; 0: it is awake; -EAGAIN: they do not all fit, nothing was published; -EPROTO: poisoned. */
static inline int32_t ring_front_publish(struct ring_front *f, const void *requests, uint32_t n)
{
    uint32_t old = f->req_prod_pvt;

    if (f->broken)
        return -EPROTO;
    if (n > ring_front_free(f))
        return -EAGAIN;
    ring_copy_in(f->sh, old, f->nr_ents, f->slot_size, requests, f->req_size, n);
    f->req_prod_pvt = old + n;
    return ring_push(&f->sh->req_prod, &f->sh->req_event, old, old + n);
}

/* Copies at most `max` responses out; -EPROTO when the backend claims more than was asked. The producer's index, whose line
 * the peer keeps writing, is read only where what was seen of it last does not do. */
static inline int32_t ring_front_take(struct ring_front *f, void *out, uint32_t max)
{
    uint32_t n = f->rsp_seen - f->rsp_cons;

    if (n < max) {
        f->rsp_seen = atomic_load_explicit(&f->sh->rsp_prod, memory_order_acquire);
        n = f->rsp_seen - f->rsp_cons;
    }
    if (f->broken || n > f->req_prod_pvt - f->rsp_cons) {
        f->broken = 1;
        return -EPROTO;
    }
    if (n > max)
        n = max;
    ring_copy_out(f->sh, f->rsp_cons, f->nr_ents, f->slot_size, out, f->rsp_size, n);
    f->rsp_cons += n;
    return (int32_t)n;
}

/* RING_FINAL_CHECK: ask to be told of the `want`th from here (1: the next), then look once more: without the second look
 * an entry published between our last look and the asking would wait for ever. 1: that many are there; 0: sleep. */
static inline int32_t ring_final_check(_Atomic uint32_t *prod, _Atomic uint32_t *event, uint32_t cons, uint32_t want)
{
    if ((uint32_t)(atomic_load_explicit(prod, memory_order_acquire) - cons) >= want)
        return 1;
    atomic_store_explicit(event, cons + want, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return (uint32_t)(atomic_load_explicit(prod, memory_order_acquire) - cons) >= want;
}

static inline int32_t ring_front_recheck(struct ring_front *f)
{
    return f->broken ? 1 : ring_final_check(&f->sh->rsp_prod, &f->sh->rsp_event, f->rsp_cons, 1);
}

/* Copies at most `max` requests out; -EPROTO when the frontend claims more than the slots that are not waiting for an
 * answer. A producer that went backwards claims that too: it is 2^32 less a few ahead. */
static inline int32_t ring_back_take(struct ring_back *b, void *out, uint32_t max)
{
    uint32_t n = b->req_seen - b->req_cons;

    if (n < max) {
        b->req_seen = atomic_load_explicit(&b->sh->req_prod, memory_order_acquire);
        n = b->req_seen - b->req_cons;
    }
#ifndef RING_DEFECT_NO_BOUNDS
    if (b->broken || n > b->nr_ents - (b->req_cons - b->rsp_prod_pvt)) {
        b->broken = 1;
        return -EPROTO;
    }
#endif
    if (n > max)
        n = max;
    ring_copy_out(b->sh, b->req_cons, b->nr_ents, b->slot_size, out, b->req_size, n);
    b->req_cons += n;
    return (int32_t)n;
}

/* As ring_front_publish; -EAGAIN for more responses than requests were taken. */
static inline int32_t ring_back_publish(struct ring_back *b, const void *responses, uint32_t n)
{
    uint32_t old = b->rsp_prod_pvt;

    if (b->broken)
        return -EPROTO;
    if (n > b->req_cons - old)
        return -EAGAIN;
    ring_copy_in(b->sh, old, b->nr_ents, b->slot_size, responses, b->rsp_size, n);
    b->rsp_prod_pvt = old + n;
    return ring_push(&b->sh->rsp_prod, &b->sh->rsp_event, old, old + n);
}

static inline int32_t ring_back_recheck(struct ring_back *b)
{
    return b->broken ? 1 : ring_final_check(&b->sh->req_prod, &b->sh->req_event, b->req_cons, 1);
}

#endif
