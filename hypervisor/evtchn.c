/* Delivery of events: bits in the receiver's shared_info, and whether a signal must follow. */
#include "hv.h"

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

#include "pace.h"

/* struct shared_info of xen.h, x86-64, as far as the hypervisor touches it */
struct vcpu_info {
    _Atomic uint8_t upcall_pending;
    _Atomic uint8_t upcall_mask;
    uint8_t pad0[2];
    _Atomic uint32_t cpu; /* ours, plus 1: who sleeps there need not spin for us */
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
    atomic_store_explicit(&v->cpu, spin_cpu(), memory_order_relaxed);
    if (atomic_exchange(&v->upcall_pending, 1))
        return 0;
    return atomic_load(&v->upcall_mask) == 0;
}

/* 1: it was not, and is not masked. */
static int32_t set_pending(struct shared_info *s, uint32_t port)
{
    uint64_t bit = (uint64_t)1 << port % 64;

    if (atomic_load(&s->pending[port / 64]) & bit) /* a shared line stays shared: a storm of sends costs a load each */
        return 0;
    if (atomic_fetch_or(&s->pending[port / 64], bit) & bit)
        return 0;
    return !(atomic_load(&s->mask[port / 64]) & bit);
}

/* Set a port pending; 1: signal the domain. While a signal is held back, the domain has not been told of the edge that it
 * was for: the next event that may be told now is told. */
static int32_t wants_signal(struct evt_end *to, uint32_t port)
{
    struct shared_info *s = to->shared_info;
    int32_t is_new, edge;

    if (!s)
        return 0;
    is_new = set_pending(s, port);
    edge = is_new && mark(s, port);
    return edge || to->polling || (is_new && to->late && atomic_load(&s->vcpu[0].upcall_mask) == 0);
}

/* For the hypervisor's own events. Counts both ways. */
int32_t evtchn_notify(struct evt_end *to, uint32_t port)
{
    int32_t r = wants_signal(to, port);

    to->delivered += (uint64_t)r;
    to->elided += (uint64_t)!r;
    return r;
}

int64_t evtchn_pace(struct evt_port *port, int64_t pace_ns, int64_t now) { return pace(port, pace_ns, now); }

/* The signal that was held back is due. 1: send it, the domain has still not looked. */
int32_t evtchn_release(struct evt_end *end)
{
    struct vcpu_info *v = &((struct shared_info *)end->shared_info)->vcpu[0];
    int32_t r = end->polling || (atomic_load(&v->upcall_pending) && atomic_load(&v->upcall_mask) == 0);

    end->late = 0;
    end->delivered += (uint64_t)r;
    return r;
}

/* EVTCHNOP_send of `domid`. 0, *signal = who is to be signalled, with EVT_LATE at `late`, or NO_DOMAIN; -EINVAL: the port
 * cannot send.
 *
 * What an event may cost its receiver is a signal and a wake-up, so that is what is bounded, for each channel, and not the
 * sends, most of which cost it nothing. An event back pays for one that came: whoever answers wants to be asked. */
int32_t evtchn_send(struct evt_end **ends, uint16_t domid, uint32_t port, uint16_t *signal)
{
    struct evt_end *from = ends[domid], *to = from;
    struct evt_port *p;
    uint32_t target = port;
    int64_t late = 0;

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
    if (!to)
        return 0;
    if (to != from)
        to->ports[target].due -= to->pace_ns;
    if (!wants_signal(to, target)) {
        to->elided++;
        return 0;
    }
    if (from->pace_ns && to != from)
        late = evtchn_pace(p, from->pace_ns, spin_now());
    if (!late) {
        to->delivered++;
        *signal = domid;
    } else if (!to->late) {
        to->late = late;
        p->due += from->pace_ns;
        *signal = domid | EVT_LATE;
    } /* else it goes with the one that is held back already */
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
