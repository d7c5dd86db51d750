/* The C behind SharedRing: a ring, its control page and a wake-up, between two processes that both hold the object.
 *
 * The event index of io/ring.h is all that says whether the peer sleeps: whoever is going to sleep asks (final check), and
 * whoever publishes past an index that was asked for rings the bell, a futex. While one spins it has not asked, and the
 * peer makes no system call.
 *
 * A peer may also shrink the object, after which the host answers a touch with SIGBUS. Every access here runs under a guard
 * that turns it into -EFAULT; the jump crosses these functions only, never a frame of Python's. */
#define _GNU_SOURCE
#include "ringlib.h"

#include <linux/futex.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { FRONT = 0, BACK = 1 };

/* A side's line of the control page. Python writes pid and born (when that process started), by pwrite. */
struct end {
    _Atomic uint32_t bell;   /* counted up by the other side; what this side sleeps on */
    _Atomic uint32_t closed;
    _Atomic uint32_t cpu;    /* where this side last waited, plus 1 */
    uint32_t pid;
    uint64_t born;
    uint8_t pad[40];
};
struct control {
    uint32_t magic, request_size, response_size, ring_pages, payload_pages, pad[11];
    struct end end[2];
};
_Static_assert(sizeof(struct end) == 64 && offsetof(struct end, pid) == 12 && offsetof(struct end, born) == 16, "shared.py");
_Static_assert(offsetof(struct control, end) == 64, "shared.py");
enum { CONTROL_BYTES = 4096 };

struct shared {
    struct control *control; /* NULL: closed by us */
    uint64_t bytes;
    uint32_t side, in_size, out_size, nr_ents, cpu, gone, notifications;
    union {
        struct ring_front front;
        struct ring_back back;
    };
};
_Static_assert(sizeof(struct shared) <= SHARED_STATE, "the room that Python makes");

/* ---- the guard */

struct guard {
    sigjmp_buf out;
    uintptr_t from, to;
};
/* Of this thread, while it touches a ring. Found by a fixed offset: a signal handler may not ask the linker for it. */
static __thread __attribute__((tls_model("initial-exec"))) struct guard *volatile armed;
static struct sigaction before;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr;

    if (armed && info->si_code > 0 && at >= armed->from && at < armed->to)
        siglongjmp(armed->out, 1);
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
        before.sa_handler(number);
    else if (!sigaction(SIGBUS, &before, NULL))
        raise(number);
}

/* Once a process, before its first ring; what handled SIGBUS before still gets what is not ours. */
static void guard_install(void)
{
    struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK}, now;

    if (!sigaction(SIGBUS, NULL, &now) && now.sa_sigaction != on_sigbus) {
        before = now;
        sigaction(SIGBUS, &ours, NULL);
    }
}

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

static int64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void tell_cpu(struct shared *s)
{
    uint32_t cpu = (uint32_t)sched_getcpu() + 1;

    if (cpu != s->cpu)
        atomic_store_explicit(&s->control->end[s->side].cpu, s->cpu = cpu, memory_order_relaxed);
}

static void ring_the_bell(struct shared *s)
{
    struct end *peer = peer_of(s);

    s->notifications++;
    tell_cpu(s);
    atomic_fetch_add(&peer->bell, 1);
    syscall(SYS_futex, &peer->bell, FUTEX_WAKE, 0x7fffffff, NULL, NULL, 0);
}

/* What this side waits for: the producer index of the other, and how far it has taken. */
static _Atomic uint32_t *producer(struct shared *s)
{
    return s->side == FRONT ? &s->front.sh->rsp_prod : &s->back.sh->req_prod;
}
static uint32_t consumer(struct shared *s) { return s->side == FRONT ? s->front.rsp_cons : s->back.req_cons; }

/* Until `want` entries are there, at most `ns`; not at all where the peer runs, or last ran, on this CPU: it would wait
 * for us to stop. Never yields: that costs a whole slice when a third process wants the CPU. */
static void spin(struct shared *s, uint32_t want, int64_t ns)
{
    _Atomic uint32_t *prod = producer(s);
    uint32_t cons = consumer(s), cpu;
    int64_t end;

    if (ns <= 0)
        return;
    tell_cpu(s);
    cpu = atomic_load_explicit(&peer_of(s)->cpu, memory_order_relaxed);
    if (!cpu || cpu == s->cpu)
        return;
    end = now_ns() + ns;
    do
        for (int i = 0; i < 50; i++) {
            if (atomic_load_explicit(prod, memory_order_relaxed) - cons >= want)
                return;
            __builtin_ia32_pause();
        }
    while (now_ns() < end && !closed(s));
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
        r = ring_back_attach(&s->back, page, c->n, s->in_size, s->out_size);
        s->nr_ents = s->back.nr_ents;
    }
    return r;
}

/* base: `bytes` of control page, `ring` bytes of ring, payload. The front, which made the object, initialises the ring.
 * Returns its entries; -EINVAL: not one record fits. */
int32_t shared_open(void *state, void *base, uint64_t bytes, uint64_t ring, uint32_t side, uint32_t request_size,
                    uint32_t response_size)
{
    struct shared *s = state;
    int32_t r;

    guard_install();
    *s = (struct shared){.control = base, .bytes = bytes, .side = side};
    s->in_size = side == FRONT ? response_size : request_size;
    s->out_size = side == FRONT ? request_size : response_size;
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
    s->control = NULL;
}

/* The front of a one-way ring takes the empty answers itself, when it needs their room. */
static int32_t make_room(struct shared *s, uint32_t n, int64_t ns)
{
    uint32_t room = ring_front_free(&s->front);

    if (room >= n || !one_way(s))
        return 0;
    if (ns)
        spin(s, n - room, ns);
    return ring_front_take(&s->front, NULL, s->nr_ents);
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
        r = ring_back_publish(&s->back, c->in, n);
    }
    if (r == 1)
        ring_the_bell(s);
    return r < 0 ? r : 0;
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
        spin(s, 1, c->ns);
        was_closed = closed(s);
        n = take(s, c);
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

static int32_t do_sleep(struct shared *s, const struct call *c)
{
    struct timespec ts = {c->ns / 1000000000, c->ns % 1000000000};
    _Atomic uint32_t *event = s->side == FRONT ? &s->front.sh->rsp_event : &s->back.sh->req_event;
    struct end *me = &s->control->end[s->side];
    uint32_t seen = atomic_load(&me->bell), want = (uint32_t)c->n;

    if (ring_final_check(producer(s), event, consumer(s), want) || closed(s))
        return 1;
    if (c->ns <= 0)
        return 0;
    if (syscall(SYS_futex, &me->bell, FUTEX_WAIT, seen, &ts, NULL, 0) && errno == EFAULT)
        s->gone = 1;
    return s->gone ? -EFAULT : atomic_load(&me->bell) != seen;
}

/* Ask for the `want`th entry from here, look again, sleep. 1: look, something happened; 0: the time is over, or a signal. */
int32_t shared_sleep(void *state, uint32_t want, int64_t ns)
{
    return guarded(state, do_sleep, &(struct call){.n = want, .ns = ns});
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

uint32_t shared_notifications(void *state) { return ((struct shared *)state)->notifications; }
