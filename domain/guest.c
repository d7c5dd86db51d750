/* What a guest kernel does below Python. Every access to memory that the hypervisor or a peer may be changing is here. */
#define _GNU_SOURCE
#include "guest.h"
#include "clock.h"

#include <errno.h>
#include <mqueue.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ring.h"

struct vcpu_info {
    _Atomic uint8_t upcall_pending;
    _Atomic uint8_t upcall_mask;
    uint8_t pad0[2];
    _Atomic uint32_t cpu; /* the hypervisor's, plus 1 */
    _Atomic uint64_t pending_sel;
    uint64_t rest[6];
};
struct shared_info {
    struct vcpu_info vcpu[32];
    _Atomic uint64_t pending[64];
    _Atomic uint64_t mask[64];
};
_Static_assert(sizeof(struct vcpu_info) == 64, "vcpu_info");
_Static_assert(offsetof(struct shared_info, pending) == 2048, "evtchn_pending");
_Static_assert(offsetof(struct shared_info, mask) == 2560, "evtchn_mask");

/* 0 or -errno. */
int32_t hypercall_post(int32_t request, const void *message, uint64_t size)
{
    while (mq_send(request, message, size, 0))
        if (errno != EINTR)
            return -errno;
    return 0;
}

/* The reply's size or -errno. */
int64_t hypercall_answer(int32_t reply, void *answer, uint64_t room)
{
    ssize_t got;

    while ((got = mq_receive(reply, answer, room, NULL)) < 0)
        if (errno != EINTR)
            return -errno;
    return got;
}

/* The trap: one message out, its reply in. */
int64_t hypercall_trap(int32_t request, int32_t reply, const void *message, uint64_t size, void *answer, uint64_t room)
{
    int32_t error = hypercall_post(request, message, size);

    return error ? error : hypercall_answer(reply, answer, room);
}

/* The upcall of xen.h: clear the flag first, take the selector, for each word take what is pending and not masked.
 * Clearing before taking pairs with the hypervisor's exchange after its selector bit: an event that comes in between
 * sets the flag again. At most `max` ports a call; what does not fit stays pending and keeps its selector bit. */
int32_t upcall_drain(void *shared_info, uint32_t *ports, uint32_t max)
{
    struct shared_info *s = shared_info;
    uint32_t n = 0;
    uint64_t sel;

    atomic_store(&s->vcpu[0].upcall_pending, 0);
    sel = atomic_exchange(&s->vcpu[0].pending_sel, 0);
    while (sel) {
        uint32_t word = (uint32_t)__builtin_ctzll(sel);
        uint64_t bits = atomic_load(&s->pending[word]) & ~atomic_load(&s->mask[word]);

        while (bits && n < max) {
            uint32_t bit = (uint32_t)__builtin_ctzll(bits);

            atomic_fetch_and(&s->pending[word], ~((uint64_t)1 << bit));
            bits &= bits - 1;
            ports[n++] = word * 64 + bit;
        }
        if (bits) {
            atomic_fetch_or(&s->vcpu[0].pending_sel, sel);
            atomic_store(&s->vcpu[0].upcall_pending, 1);
            break;
        }
        sel &= sel - 1;
    }
    return (int32_t)n;
}

void upcall_mask(void *shared_info)
{
    atomic_store(&((struct shared_info *)shared_info)->vcpu[0].upcall_mask, 1);
}

/* 1: something came while upcalls were masked, and no signal will say so. */
int32_t upcall_unmask(void *shared_info)
{
    struct vcpu_info *v = &((struct shared_info *)shared_info)->vcpu[0];

    atomic_store(&v->upcall_mask, 0);
    return atomic_load(&v->upcall_pending) != 0;
}

_Static_assert(sizeof(struct wanted) == sizeof(struct pollfd), "struct pollfd");
_Static_assert(offsetof(struct wanted, events) == offsetof(struct pollfd, events), "struct pollfd");
_Static_assert(offsetof(struct wanted, revents) == offsetof(struct pollfd, revents), "struct pollfd");

static int upcall_there(const void *shared_info)
{
    return atomic_load_explicit(&((const struct shared_info *)shared_info)->vcpu[0].upcall_pending, memory_order_relaxed);
}

/* Of the descriptors, and of the upcall's own; one read of that is enough: a standard signal is pending once, and the next
 * one makes it readable again. ns: NULL: until something comes. */
static void look_at_descriptors(struct idle *i, const struct timespec *ns)
{
    char info[128];
    int n = ppoll((struct pollfd *)i->fds, i->nr_fds, ns, NULL);

    i->nr_ready = n > 0 ? (uint32_t)n : 0;
    if (i->nr_ready && i->fds[0].revents) {
        i->nr_ready--;
        if (read(i->fds[0].fd, info, sizeof info) < 0)
            return;
    }
}

/* The idle loop, of a kernel that has upcalls masked: hand out what is pending and, where that is nothing, `sleep` until
 * something is, and hand that out. One call, since each between Python and C, and each of the host's, is a part of every
 * wake-up: rt_sigtimedwait takes the signal in the call that waits for it, so the descriptor is only for a kernel that has
 * others to wait for. What wakes without a reason (a signal that came late, SIGCONT) has handed out nothing.
 *
 * Descriptors are looked at also after events: whoever can send one whenever we look would keep us from them. */
void idle(struct idle *i, int32_t sleep)
{
    struct shared_info *s = i->shared_info;
    struct timespec at_once = {0, 0};
    sigset_t upcall;

    i->nr_ready = 0;
    i->nr_ports = (uint32_t)upcall_drain(s, i->ports, IDLE_PORTS);
    if (i->nr_ports || !sleep) {
        if (i->nr_fds > 1)
            look_at_descriptors(i, &at_once);
        return;
    }
    if (!spin(&i->spin, atomic_load_explicit(&s->vcpu[0].cpu, memory_order_relaxed), SPIN_NS, upcall_there, s)) {
        sigemptyset(&upcall);
        sigaddset(&upcall, SIGUSR2);
        if (upcall_unmask(s))
            ;
        else if (i->nr_fds > 1)
            look_at_descriptors(i, NULL);
        else
            sigtimedwait(&upcall, NULL, NULL);
        upcall_mask(s);
    }
    i->nr_ports = (uint32_t)upcall_drain(s, i->ports, IDLE_PORTS);
}

void event_mask(void *shared_info, uint32_t port)
{
    atomic_fetch_or(&((struct shared_info *)shared_info)->mask[port / 64], (uint64_t)1 << port % 64);
}

/* System time, ns, without a call; the host's clock where the record says that cycles are no clock here. Never less than *last,
 * which it becomes: the two may differ, and before the first second is over the record does not hold. */
uint64_t system_time(void *shared_info, uint64_t boot_ns, uint64_t *last)
{
    uint64_t ns;

    if (!clock_read(shared_info, &ns)) {
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec - boot_ns;
    }
    if (ns > *last)
        *last = ns;
    return *last;
}

/* Unix time of system time 0, in ns, likewise. */
uint64_t wall_base(void *shared_info)
{
    return clock_wall(shared_info);
}

void memory_copy(void *to, const void *from, uint64_t size)
{
    memcpy(to, from, size);
}

void memory_zero(void *at, uint64_t size)
{
    memset(at, 0, size);
}

/* Introduce a grant: domid and frame first, the flags that make it valid last. -EBUSY if the entry is in use. */
int32_t grant_set(void *table, uint32_t ref, uint16_t flags, uint16_t domid, uint32_t frame)
{
    _Atomic uint64_t *entry = (_Atomic uint64_t *)table + ref;
    uint64_t body = (uint64_t)frame << 32 | (uint64_t)domid << 16;

    if (atomic_load(entry) & 0xffff)
        return -EBUSY;
    atomic_store(entry, body);
    atomic_store(entry, body | flags);
    return 0;
}

/* Revoke: only while nobody maps it (GTF_reading 8, GTF_writing 16); the exchange decides against a map under way. */
int32_t grant_end(void *table, uint32_t ref)
{
    _Atomic uint64_t *entry = (_Atomic uint64_t *)table + ref;
    uint64_t seen = atomic_load(entry);

    do {
        if (seen & (8 | 16))
            return -EBUSY;
    } while (!atomic_compare_exchange_strong(entry, &seen, 0));
    return 0;
}

static int answer_there(const void *front)
{
    const struct ring_front *f = front;

    return atomic_load_explicit(&f->sh->rsp_prod, memory_order_relaxed) != f->rsp_cons;
}

/* Push what fits of `count` entries, take what was answered, until all is answered (0), the doorbell must be rung (1: it was
 * asked for, or no answer came while we spun), or the ring is broken (-EPROTO). *pushed and *answered go on from call to
 * call; spin_state: NULL: never. */
int32_t callring_round(void *front, const void *entries, uint32_t count, uint32_t *pushed, void *answers, uint32_t *answered,
                       struct spin *spin_state)
{
    struct ring_front *f = front;
    struct ring_cpus *cpus = ring_cpus(f->sh);

    atomic_store_explicit(&cpus->front, spin_cpu(), memory_order_relaxed);
    while (*answered < count) {
        uint32_t room = ring_front_free(f), n = count - *pushed < room ? count - *pushed : room;
        int32_t r;

        if (n) {
            r = ring_front_publish(f, (const char *)entries + (uint64_t)*pushed * 64, n);
            if (r < 0)
                return r;
            *pushed += n;
            if (r == 1)
                return 1;
        }
        r = ring_front_take(f, (char *)answers + (uint64_t)*answered * 16, count - *answered);
        if (r < 0)
            return r;
        *answered += (uint32_t)r;
        if (r)
            continue;
        if (!spin_state)
            return 1;
        spin_state->wait_out = 0; /* it did not ask to be told, so it is awake: a doorbell would cost more than this look */
        if (!spin(spin_state, atomic_load_explicit(&cpus->back, memory_order_relaxed), SPIN_NS, answer_there, f))
            return 1;
    }
    return 0;
}

int64_t raw6(int64_t nr, int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f)
{
    register int64_t r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    int64_t ret;

    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return ret;
}
