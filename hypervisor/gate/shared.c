/* What the hypervisor does to memory that a guest may be changing: event bitmaps and grant entries, in C11 atomics. */
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "gate.h"

/* struct shared_info of xen.h, x86-64, as far as the hypervisor touches it */
struct vcpu_info {
    _Atomic uint8_t upcall_pending;
    _Atomic uint8_t upcall_mask;
    uint8_t pad0[6];
    _Atomic uint64_t pending_sel;
    uint64_t arch[2];
    uint8_t time[32];
};
struct shared_info {
    struct vcpu_info vcpu[32];
    _Atomic uint64_t pending[64];
    _Atomic uint64_t mask[64];
};
_Static_assert(sizeof(struct vcpu_info) == 64, "vcpu_info");
_Static_assert(offsetof(struct shared_info, pending) == 2048, "evtchn_pending");
_Static_assert(offsetof(struct shared_info, mask) == 2560, "evtchn_mask");

/* 1 = send the signal: something unmasked is pending, the guest had not been told, and it takes upcalls.
 * The exchange pairs with the guest's clearing of upcall_pending before it takes the selector; the load of
 * upcall_mask after it pairs with the guest's look at upcall_pending after unmasking. */
static int32_t mark(struct shared_info *s, uint32_t port)
{
    struct vcpu_info *v = &s->vcpu[0];
    uint64_t bit = (uint64_t)1 << port / 64;

    if (atomic_fetch_or(&v->pending_sel, bit) & bit)
        return 0;
    if (atomic_exchange(&v->upcall_pending, 1))
        return 0;
    return atomic_load(&v->upcall_mask) == 0;
}

int32_t evtchn_set_pending(void *shared_info, uint32_t port)
{
    struct shared_info *s = shared_info;
    uint64_t bit = (uint64_t)1 << port % 64;

    if (atomic_fetch_or(&s->pending[port / 64], bit) & bit)
        return 0;
    if (atomic_load(&s->mask[port / 64]) & bit)
        return 0;
    return mark(s, port);
}

int32_t evtchn_unmask(void *shared_info, uint32_t port)
{
    struct shared_info *s = shared_info;
    uint64_t bit = (uint64_t)1 << port % 64;

    if (!(atomic_fetch_and(&s->mask[port / 64], ~bit) & bit))
        return 0;
    if (!(atomic_load(&s->pending[port / 64]) & bit))
        return 0;
    return mark(s, port);
}

void evtchn_clear(void *shared_info, uint32_t port)
{
    struct shared_info *s = shared_info;

    atomic_fetch_and(&s->pending[port / 64], ~((uint64_t)1 << port % 64));
}

int32_t upcall_is_pending(void *shared_info)
{
    return atomic_load(&((struct shared_info *)shared_info)->vcpu[0].upcall_pending) != 0;
}

void upcall_unblock(void *shared_info)
{
    atomic_store(&((struct shared_info *)shared_info)->vcpu[0].upcall_mask, 0);
}

/* ---- grants: entry v1 = {u16 flags, u16 domid, u32 frame}, one 64-bit word, so one compare-and-swap sees all of it */

#define GTF_PERMIT_ACCESS 1u
#define GTF_TYPE_MASK 3u
#define GTF_READONLY 4u
#define GTF_READING 8u
#define GTF_WRITING 16u

/* Mark the entry in use and copy its frame out. 0, or -EPERM (not granted to domid, or not for writing), -EAGAIN (it
 * kept changing under us). What is checked is what the successful exchange saw. */
int32_t grant_claim(void *table, uint32_t ref, uint16_t domid, int32_t writable, uint32_t *frame)
{
    _Atomic uint64_t *entry = (_Atomic uint64_t *)table + ref;
    uint64_t seen = atomic_load(entry);

    for (int tries = 0; tries < 16; tries++) {
        uint32_t flags = seen & 0xffff;

        if ((flags & GTF_TYPE_MASK) != GTF_PERMIT_ACCESS || (uint16_t)(seen >> 16) != domid)
            return -EPERM;
        if (writable && (flags & GTF_READONLY))
            return -EPERM;
        if (atomic_compare_exchange_strong(entry, &seen, seen | GTF_READING | (writable ? GTF_WRITING : 0))) {
            *frame = (uint32_t)(seen >> 32);
            return 0;
        }
    }
    return -EAGAIN;
}

void grant_release(void *table, uint32_t ref, int32_t clear_writing, int32_t clear_reading)
{
    uint64_t bits = (clear_writing ? GTF_WRITING : 0) | (clear_reading ? GTF_READING : 0);

    atomic_fetch_and((_Atomic uint64_t *)table + ref, ~bits);
}

void scrub(void *at, uint64_t bytes)
{
    memset(at, 0, bytes);
}
