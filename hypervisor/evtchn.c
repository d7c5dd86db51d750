/* Delivery of events: bits in the receiver's shared_info, and whether a signal must follow. */
#include "hv.h"

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

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
_Static_assert(EVT_PORTS <= 64 * 64, "the 2-level ABI");

enum { CLOSED = 0, UNBOUND = 1, INTERDOMAIN = 2, VIRQ = 4, IPI = 5 };

/* 1 = send the signal: something unmasked is pending, the guest had not been told, and it takes upcalls. A guest that is
 * awake keeps them masked and looks by itself: no signal is spent on it.
 * The exchange pairs with the guest's clearing of upcall_pending before it takes the selector; the load of upcall_mask
 * after it pairs with the guest's look at upcall_pending after unmasking. */
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

static int32_t set_pending(struct shared_info *s, uint32_t port)
{
    uint64_t bit = (uint64_t)1 << port % 64;

    if (atomic_load(&s->pending[port / 64]) & bit) /* a shared line stays shared: a storm of sends costs a load each */
        return 0;
    if (atomic_fetch_or(&s->pending[port / 64], bit) & bit)
        return 0;
    if (atomic_load(&s->mask[port / 64]) & bit)
        return 0;
    return mark(s, port);
}

/* Set a port pending; 1: signal the domain. Counts both ways. */
int32_t evtchn_notify(struct evt_end *to, uint32_t port)
{
    if (!to->shared_info)
        return 0;
    if (set_pending(to->shared_info, port) || to->polling) {
        to->delivered++;
        return 1;
    }
    to->elided++;
    return 0;
}

/* EVTCHNOP_send of `domid`. 0, *signal = who is to be signalled or NO_DOMAIN; -EINVAL: the port cannot send. */
int32_t evtchn_send(struct evt_end **ends, uint16_t domid, uint32_t port, uint16_t *signal)
{
    struct evt_end *from = ends[domid], *to = from;
    struct evt_port *p;
    uint32_t target = port;

    *signal = NO_DOMAIN;
    if (port == 0 || port >= EVT_PORTS)
        return -EINVAL;
    p = &from->ports[port];
    if (p->state == UNBOUND) {
        from->sent++;
        return 0; /* nobody there yet: dropped, as Xen does */
    }
    if (p->state == INTERDOMAIN) {
        to = ends[p->remote_domid];
        target = p->remote_port;
        domid = p->remote_domid;
    } else if (p->state != IPI) {
        return -EINVAL;
    }
    from->sent++;
    if (to && evtchn_notify(to, target))
        *signal = domid;
    return 0;
}

/* 1: the port was masked and pending: signal. */
int32_t evtchn_unmask(struct evt_end *end, uint32_t port)
{
    struct shared_info *s = end->shared_info;
    uint64_t bit = (uint64_t)1 << port % 64;

    if (!(atomic_fetch_and(&s->mask[port / 64], ~bit) & bit))
        return 0;
    if (!(atomic_load(&s->pending[port / 64]) & bit))
        return 0;
    return mark(s, port);
}

void evtchn_clear(struct evt_end *end, uint32_t port)
{
    struct shared_info *s = end->shared_info;

    atomic_fetch_and(&s->pending[port / 64], ~((uint64_t)1 << port % 64));
}

int32_t evtchn_is_pending(struct evt_end *end, uint32_t port)
{
    struct shared_info *s = end->shared_info;

    return (int32_t)(atomic_load(&s->pending[port / 64]) >> port % 64 & 1);
}

int32_t upcall_is_pending(struct evt_end *end)
{
    return atomic_load(&((struct shared_info *)end->shared_info)->vcpu[0].upcall_pending) != 0;
}

void upcall_unblock(struct evt_end *end)
{
    atomic_store(&((struct shared_info *)end->shared_info)->vcpu[0].upcall_mask, 0);
}
