/* The rings behind cffi, and byte rings. */
#include "ringlib.h"

_Static_assert(sizeof(struct ring_front) <= 64 && sizeof(struct ring_back) <= 64, "Python allots 64 bytes");

/* `start`: the index at which counting begins; 0 but in tests of the wrap. */
int32_t front_init(void *front, void *page, uint64_t bytes, uint32_t req_size, uint32_t rsp_size, uint32_t start)
{
    struct ring_front *f = front;
    int r = ring_front_init(f, page, bytes, req_size, rsp_size);

    if (!r && start) {
        f->req_prod_pvt = f->rsp_cons = f->rsp_seen = start;
        atomic_store(&f->sh->req_prod, start);
        atomic_store(&f->sh->rsp_prod, start);
        atomic_store(&f->sh->req_event, start + 1);
        atomic_store(&f->sh->rsp_event, start + 1);
    }
    return r;
}

int32_t back_attach(void *back, void *page, uint64_t bytes, uint32_t req_size, uint32_t rsp_size)
{
    return ring_back_attach(back, page, bytes, req_size, rsp_size);
}

uint32_t front_free(void *front) { return ring_front_free(front); }
uint32_t front_entries(void *front) { return ((struct ring_front *)front)->nr_ents; }

uint32_t front_outstanding(void *front)
{
    struct ring_front *f = front;

    return f->req_prod_pvt - f->rsp_cons;
}

int32_t front_publish(void *front, const void *requests, uint32_t n) { return ring_front_publish(front, requests, n); }
int32_t front_take(void *front, void *out, uint32_t max) { return ring_front_take(front, out, max); }
int32_t front_recheck(void *front) { return ring_front_recheck(front); }
uint32_t back_entries(void *back) { return ((struct ring_back *)back)->nr_ents; }

uint32_t back_unanswered(void *back)
{
    struct ring_back *b = back;

    return b->req_cons - b->rsp_prod_pvt;
}

int32_t back_take(void *back, void *out, uint32_t max) { return ring_back_take(back, out, max); }
int32_t back_publish(void *back, const void *responses, uint32_t n) { return ring_back_publish(back, responses, n); }
int32_t back_recheck(void *back) { return ring_back_recheck(back); }

/* ---- byte rings (xencons_interface, xenstore_domain_interface): `size` is a power of two, one writer each side */

/* Returns how many of n bytes went in, or -EPROTO when the reader's index cannot be. */
int32_t bytes_write(void *buffer, void *cons, void *prod, uint32_t size, const void *data, uint32_t n)
{
    uint32_t c = atomic_load_explicit((_Atomic uint32_t *)cons, memory_order_acquire);
    uint32_t p = atomic_load_explicit((_Atomic uint32_t *)prod, memory_order_relaxed), part;

    if (p - c > size)
        return -EPROTO;
    if (n > size - (p - c))
        n = size - (p - c);
    part = size - (p & (size - 1));
    if (part > n)
        part = n;
    memcpy((char *)buffer + (p & (size - 1)), data, part);
    memcpy(buffer, (const char *)data + part, n - part);
    atomic_store((_Atomic uint32_t *)prod, p + n);
    return (int32_t)n;
}

uint32_t bytes_used(void *cons, void *prod)
{
    return atomic_load((_Atomic uint32_t *)prod) - atomic_load((_Atomic uint32_t *)cons);
}

int32_t bytes_read(void *buffer, void *cons, void *prod, uint32_t size, void *out, uint32_t n)
{
    uint32_t p = atomic_load_explicit((_Atomic uint32_t *)prod, memory_order_acquire);
    uint32_t c = atomic_load_explicit((_Atomic uint32_t *)cons, memory_order_relaxed), part;

    if (p - c > size)
        return -EPROTO;
    if (n > p - c)
        n = p - c;
    part = size - (c & (size - 1));
    if (part > n)
        part = n;
    memcpy(out, (char *)buffer + (c & (size - 1)), part);
    memcpy((char *)out + part, buffer, n - part);
    atomic_store((_Atomic uint32_t *)cons, c + n);
    return (int32_t)n;
}
