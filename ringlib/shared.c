/* The C behind SharedRing: a ring, its control page and a wake-up, between two processes that both hold the object.
 *
 * The event index of io/ring.h is all that says whether the peer sleeps: whoever is going to sleep asks (final check), and
 * whoever publishes past an index that was asked for rings the bell, a futex. While one spins it has not asked, and the
 * peer makes no system call.
 *
 * An end in an event loop cannot sleep on a futex. It waits for a socket instead, and says so in its line before it asks:
 * whoever rings knocks there with an empty datagram. Its address is one that the kernel chose (unix(7), autobind) and
 * forgets when its owner ends, however that ends; and 20 bits say it.
 *
 * A peer may also shrink the object, after which the host answers a touch with SIGBUS; guard.h turns it into -EFAULT. */
#define _GNU_SOURCE
#include "guard.h"
#include "shared.h"

#include <linux/futex.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* ---- under the guard */

struct call {
    const void *in;
    void *out;
    uint64_t n;
    int64_t ns;
};

static int32_t guarded(struct shared *s, int32_t (*act)(struct shared *, const struct call *), const struct call *call)
{
    struct guard guard;
    int32_t r;

    if (!s->control)
        return -EBADF;
    if (s->gone)
        return -EFAULT;
    guard.from = (uintptr_t)s->control;
    guard.to = guard.from + s->bytes;
    if (sigsetjmp(guard.out, 0)) {
        armed = NULL;
        s->gone = 1;
        return -EFAULT;
    }
    armed = &guard;
    atomic_signal_fence(memory_order_seq_cst);
    r = act(s, call);
    atomic_signal_fence(memory_order_seq_cst);
    armed = NULL;
    return r;
}

/* ---- waiting */

static struct end *peer_of(struct shared *s) { return &s->control->end[1 - s->side]; }
static int closed(struct shared *s) { return (int)atomic_load(&peer_of(s)->closed); }

static void tell_cpu(struct shared *s)
{
    uint32_t cpu = spin_cpu();

    if (cpu != s->cpu)
        atomic_store_explicit(&s->control->end[s->side].cpu, s->cpu = cpu, memory_order_relaxed);
}

/* What comes of it is the peer's affair: it looks again by itself where nobody reaches it (another network namespace). */
static void knock(struct shared *s, uint32_t door)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};

    if (s->knocker < 0)
        s->knocker = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    snprintf(to.sun_path + 1, 6, "%05x", (door - 1) & 0xfffff);
    sendto(s->knocker, NULL, 0, MSG_NOSIGNAL, (struct sockaddr *)&to, offsetof(struct sockaddr_un, sun_path) + 6);
}

static void ring_the_bell(struct shared *s)
{
    struct end *peer = peer_of(s);
    uint32_t door;

    s->counts.notifications++;
    tell_cpu(s);
    atomic_fetch_add(&peer->bell, 1);
    atomic_thread_fence(memory_order_acquire); /* who saw what it asked for sees its door (do_ask) */
    if ((door = atomic_load(&peer->door)))
        knock(s, door);
    else
        syscall(SYS_futex, &peer->bell, FUTEX_WAKE, 0x7fffffff, NULL, NULL, 0);
}

/* What this side waits for: the producer index of the other, and how far it has taken. */
static _Atomic uint32_t *producer(struct shared *s)
{
    return s->side == FRONT ? &s->front.sh->rsp_prod : &s->back.sh->req_prod;
}
static uint32_t consumer(struct shared *s) { return s->side == FRONT ? s->front.rsp_cons : s->back.req_cons; }

struct look {
    struct shared *s;
    uint32_t want;
};

/* Also a peer that closed is worth a look. */
static int worth_a_look(const void *of)
{
    const struct look *l = of;

    return atomic_load_explicit(producer(l->s), memory_order_relaxed) - consumer(l->s) >= l->want || closed(l->s);
}

/* Look for `want` entries before sleeping, as spin.h has it; not for a peer that never waited, so that nobody knows where
 * it runs. */
static int spin_for(struct shared *s, uint32_t want, int64_t ns)
{
    uint32_t peer;

    if (ns <= 0)
        return 0;
    tell_cpu(s);
    peer = atomic_load_explicit(&peer_of(s)->cpu, memory_order_relaxed);
    return peer && spin(&s->spin, peer, ns, worth_a_look, &(struct look){s, want});
}

/* ---- answers, two ways: one lies where its request lay
 *
 * A back that dies while it writes answers has spoilt requests that the next one is to take again. So they are put aside
 * first, at the end of the object, and put back where their answers were not published. It costs a copy of each. */

static void keep(struct shared *s, uint32_t n)
{
    struct ring_back *b = &s->back;

    if (!s->kept || n > back_unanswered(b))
        return;
    ring_copy_out(b->sh, b->rsp_prod_pvt, b->nr_ents, b->slot_size, s->kept, b->req_size, n);
    atomic_store_explicit(&s->control->end[BACK].kept, b->rsp_prod_pvt + n, memory_order_release);
    atomic_thread_fence(memory_order_release); /* and only then an answer */
}

static void put_back(struct shared *s)
{
    struct ring_back *b = &s->back;
    uint32_t n = atomic_load_explicit(&s->control->end[BACK].kept, memory_order_acquire) - b->rsp_prod_pvt;

    if (s->kept && n <= b->nr_ents)
        ring_copy_in(b->sh, b->rsp_prod_pvt, b->nr_ents, b->slot_size, s->kept, b->req_size, n);
}

/* ---- what Python calls: counts, or -EBADF closed by us, -EPIPE closed by the peer, -EPROTO poisoned, -EFAULT shrunk */

static int32_t do_open(struct shared *s, const struct call *c)
{
    void *page = (char *)s->control + CONTROL_BYTES;
    int32_t r;

    tell_cpu(s);
    if (s->side == FRONT) {
        r = ring_front_init(&s->front, page, c->n, s->out_size, s->in_size);
        s->nr_ents = s->front.nr_ents;
    } else {
        atomic_store(&s->control->end[BACK].closed, 0);
        atomic_store(&s->control->end[BACK].door, 0); /* the last one's */
        r = ring_back_attach(&s->back, page, c->n, s->in_size, s->out_size);
        s->nr_ents = s->back.nr_ents;
        if (!r)
            put_back(s);
    }
    return r;
}

/* base: `bytes` of control page, `ring` bytes of ring, payload, and two ways as many again to keep requests in. The front,
 * which made the object, initialises the ring. Returns its entries; -EINVAL: not one record fits. */
int32_t shared_open(void *state, void *base, uint64_t bytes, uint64_t ring, uint32_t side, uint32_t request_size,
                    uint32_t response_size)
{
    struct shared *s = state;
    int32_t r;

    guard_install();
    *s = (struct shared){.control = base, .bytes = bytes, .side = side, .knocker = -1};
    s->in_size = side == FRONT ? response_size : request_size;
    s->out_size = side == FRONT ? request_size : response_size;
    s->kept = request_size && response_size ? (char *)base + bytes - ring : NULL;
    r = guarded(s, do_open, &(struct call){.n = ring});
    return r ? r : (int32_t)s->nr_ents;
}

static int32_t one_way(struct shared *s) { return !s->in_size || !s->out_size; }

static int32_t do_close(struct shared *s, const struct call *c)
{
    (void)c;
    if (s->side == BACK && one_way(s))
        ring_back_publish(&s->back, NULL, back_unanswered(&s->back)); /* the next back begins after them */
    atomic_store(&s->control->end[s->side].closed, 1);
    ring_the_bell(s);
    return 0;
}

/* `tell` the peer, and touch the memory no more. */
void shared_close(void *state, int32_t tell)
{
    struct shared *s = state;

    if (tell)
        guarded(s, do_close, NULL);
    if (s->control && s->knocker >= 0)
        close(s->knocker);
    s->control = NULL;
}

/* The front of a one-way ring takes the empty answers itself, when it needs their room. */
static int32_t make_room(struct shared *s, uint32_t n, int64_t ns)
{
    uint32_t room = ring_front_free(&s->front);

    if (room >= n || !one_way(s))
        return 0;
    if (ns)
        spin_for(s, n - room, ns);
    return ring_front_take(&s->front, NULL, s->nr_ents);
}

static void high_water(struct shared *s, uint32_t waiting)
{
    if (waiting > s->counts.high_water)
        s->counts.high_water = waiting;
}

static int32_t do_publish(struct shared *s, const struct call *c)
{
    uint32_t n = (uint32_t)c->n;
    int32_t r;

    if (closed(s))
        return -EPIPE;
    if (s->side == FRONT) {
        r = make_room(s, n, c->ns);
        r = r < 0 ? r : ring_front_publish(&s->front, c->in, n);
    } else {
        keep(s, n);
        r = ring_back_publish(&s->back, c->in, n);
    }
    if (r < 0)
        return r;
    if (r == 1)
        ring_the_bell(s);
    s->counts.records_sent += n;
    s->counts.batches_sent += n > 0;
    if (s->side == FRONT)
        high_water(s, front_outstanding(&s->front));
    return 0;
}

/* 0, or -EAGAIN: no room (yet); -EINVAL: not whole records, or more than the ring has entries. */
int32_t shared_publish(void *state, const void *records, uint64_t bytes, int64_t spin_ns)
{
    struct shared *s = state;
    uint64_t n = s->out_size ? bytes / s->out_size : 0;

    if (!s->out_size || bytes % s->out_size || n > s->nr_ents)
        return s->control ? -EINVAL : -EBADF;
    return guarded(s, do_publish, &(struct call){.in = records, .n = n, .ns = spin_ns});
}

/* The back of a one-way ring answers with nothing, and not each time: once `least` records are taken. An answer for each
 * would have the header's one line go to and fro between the CPUs with each. */
static int32_t acknowledge(struct shared *s, uint32_t least)
{
    uint32_t taken = back_unanswered(&s->back);
    int32_t r = 0;

    if (taken >= least)
        r = ring_back_publish(&s->back, NULL, taken);
    if (r == 1)
        ring_the_bell(s);
    return r < 0 ? r : 0;
}

static int32_t take(struct shared *s, const struct call *c)
{
    return s->side == FRONT ? ring_front_take(&s->front, c->out, (uint32_t)c->n)
                            : ring_back_take(&s->back, c->out, (uint32_t)c->n);
}

/* At most `max`, at least 1. -EPIPE only once nothing is left: what the peer published before it closed is seen by whoever
 * sees that it closed. */
static int32_t do_take(struct shared *s, const struct call *c)
{
    int32_t n = take(s, c), was_closed = 0, r = 0;

    if (!n) {
        spin_for(s, 1, c->ns);
        was_closed = closed(s);
        n = take(s, c);
    }
    if (n > 0) {
        s->counts.records_taken += (uint32_t)n;
        s->counts.batches_taken++;
        if (s->side == BACK)
            high_water(s, s->back.req_seen - s->back.req_cons + (uint32_t)n);
    }
    if (n >= 0 && s->side == BACK && one_way(s))
        r = acknowledge(s, n ? (s->nr_ents + 3) / 4 : 1);
    return r < 0 ? r : !n && was_closed ? -EPIPE : n;
}

int32_t shared_take(void *state, void *out, uint32_t max, int64_t spin_ns)
{
    struct shared *s = state;

    if (!s->in_size || !max)
        return s->control ? -EINVAL : -EBADF;
    return guarded(s, do_take, &(struct call){.out = out, .n = max, .ns = spin_ns});
}

/* To be told of the `want`th entry from here. 1: look, something is there; 0: sleep. */
static int32_t ask(struct shared *s, uint32_t want)
{
    _Atomic uint32_t *event = s->side == FRONT ? &s->front.sh->rsp_event : &s->back.sh->req_event;

    return ring_final_check(producer(s), event, consumer(s), want) || closed(s);
}

static int32_t do_sleep(struct shared *s, const struct call *c)
{
    struct timespec ts = {c->ns / 1000000000, c->ns % 1000000000};
    struct end *me = &s->control->end[s->side];
    uint32_t seen;

    if (atomic_load_explicit(&me->door, memory_order_relaxed))
        atomic_store(&me->door, 0); /* before `seen`: who still knocks has rung before */
    seen = atomic_load(&me->bell);
    if (ask(s, (uint32_t)c->n))
        return 1;
    if (c->ns <= 0)
        return 0;
    s->counts.sleeps++;
    if (syscall(SYS_futex, &me->bell, FUTEX_WAIT, seen, &ts, NULL, 0) && errno == EFAULT)
        s->gone = 1;
    return s->gone ? -EFAULT : atomic_load(&me->bell) != seen;
}

/* Ask for the `want`th entry from here, look again, sleep. 1: look, something happened; 0: the time is over, or a signal. */
int32_t shared_sleep(void *state, uint32_t want, int64_t ns)
{
    return guarded(state, do_sleep, &(struct call){.n = want, .ns = ns});
}

static int32_t do_ask(struct shared *s, const struct call *c)
{
    uint32_t want = (uint32_t)c->n, door = (uint32_t)(c->n >> 32);
    int32_t r;

    if (door && spin_for(s, want, c->ns))
        return 1;
    atomic_store(&s->control->end[s->side].door, door);
    atomic_thread_fence(memory_order_release);
    r = door && ask(s, want);
    s->counts.sleeps += door && !r;
    return r;
}

/* As shared_sleep, without sleeping: the peer will knock at `door`. door 0: not any more. */
int32_t shared_ask(void *state, uint32_t want, uint32_t door, int64_t spin_ns)
{
    return guarded(state, do_ask, &(struct call){.n = (uint64_t)door << 32 | want, .ns = spin_ns});
}

static int32_t do_pending(struct shared *s, const struct call *c)
{
    int32_t r, was_closed = closed(s);

    (void)c;
    if (s->side == BACK)
        return (int32_t)back_unanswered(&s->back);
    if (!one_way(s))
        return (int32_t)front_outstanding(&s->front);
    r = ring_front_take(&s->front, NULL, s->nr_ents);
    if (r >= 0)
        r = (int32_t)front_outstanding(&s->front);
    return r > 0 && was_closed ? -EPIPE : r;
}

/* Front: published and not answered; back: taken and not answered. -EPIPE: one way, and what is left will never be taken. */
int32_t shared_pending(void *state) { return guarded(state, do_pending, NULL); }

void shared_statistics(void *state, uint64_t *out)
{
    struct shared *s = state;

    s->counts.spins = s->spin.spins;
    s->counts.spins_won = s->spin.won;
    memcpy(out, &s->counts, sizeof s->counts);
}
