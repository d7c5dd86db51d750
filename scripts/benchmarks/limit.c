/* What the machine can do: the tightest loops in C between the same two processes, which every figure is measured against.
 *
 * The ring here has the two indexes on lines of their own, cached by the other side, no event indexes, no bounds to check
 * and no way to sleep: it spins, and yields only after some 20 us, so that a third process does not make it look worse
 * than it is. */
#define _GNU_SOURCE
#include "ringlib.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* cdef begin */
#define TIGHT_HEADER 192

uint64_t tight_send(void *ring, uint32_t slots, uint32_t size, uint32_t batch, const void *records, double seconds);
uint64_t tight_receive(void *ring, uint32_t slots, uint32_t size, uint32_t batch, void *out);
int32_t tight_push(void *ring, uint32_t slots, uint32_t size, const void *record);
int32_t tight_pop(void *ring, uint32_t slots, uint32_t size, void *record);
void tight_end(void *ring);
int32_t tight_ended(void *ring);

uint64_t place_send(void *ring, void *payload, uint32_t slots, uint32_t size, uint32_t batch, double seconds);
uint64_t place_receive(void *ring, void *payload, uint32_t slots, uint32_t size, uint32_t batch);
void place_write(void *payload, const void *descriptors, uint32_t n);
uint64_t place_read(void *payload, const void *descriptors, uint32_t n);

void tight_ping(void *there, void *back, uint32_t size, uint32_t n, uint32_t *ns);
void tight_pong(void *there, void *back, uint32_t size, uint32_t n);
void futex_ping(void *words, uint32_t n, uint32_t *ns);
void futex_pong(void *words, uint32_t n);
int32_t ring_ping(void *state, uint32_t size, uint32_t n, int64_t spin_ns, uint32_t *ns);
int32_t ring_pong(void *state, uint32_t size, uint32_t n, int64_t spin_ns);
/* cdef end */

struct tight {
    _Alignas(64) _Atomic uint64_t head;
    uint64_t tail_seen; /* by the sender */
    _Alignas(64) _Atomic uint64_t tail;
    uint64_t head_seen; /* by the receiver */
    _Alignas(64) _Atomic uint32_t ended;
    _Alignas(64) char slots[];
};
_Static_assert(sizeof(struct tight) == TIGHT_HEADER, "Python allots it");

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t load(_Atomic uint64_t *index) { return atomic_load_explicit(index, memory_order_acquire); }
static void publish(_Atomic uint64_t *index, uint64_t value) { atomic_store_explicit(index, value, memory_order_release); }

static void miss(uint32_t *misses)
{
    __builtin_ia32_pause();
    if (++*misses % 1000 == 0)
        sched_yield();
}

/* Room for at least one, spinning; how much. */
static uint64_t room(struct tight *r, uint64_t head, uint32_t slots)
{
    uint32_t misses = 0;

    while (head - r->tail_seen >= slots && head - (r->tail_seen = load(&r->tail)) >= slots)
        miss(&misses);
    return slots - (head - r->tail_seen);
}

/* Records for the taking; 0 once the sender has ended and there is none. */
static uint64_t there(struct tight *r, uint64_t tail)
{
    uint32_t ended, misses = 0;

    while (r->head_seen == tail) {
        ended = atomic_load(&r->ended);
        r->head_seen = load(&r->head);
        if (ended && r->head_seen == tail)
            return 0;
        if (r->head_seen == tail)
            miss(&misses);
    }
    return r->head_seen - tail;
}

static uint64_t least(uint64_t a, uint64_t b, uint64_t c) { return a < b ? (a < c ? a : c) : (b < c ? b : c); }

/* ---- copied in and out, `batch` at a time */

uint64_t tight_send(void *ring, uint32_t slots, uint32_t size, uint32_t batch, const void *records, double seconds)
{
    struct tight *r = ring;
    uint64_t head = load(&r->head), end = now() + (uint64_t)(seconds * 1e9), k, at;

    for (uint32_t i = 0; i % 64 || now() < end; i++) {
        at = head & (slots - 1);
        k = least(batch, room(r, head, slots), slots - at);
        memcpy(r->slots + at * size, records, k * size);
        publish(&r->head, head += k);
    }
    tight_end(ring);
    return head;
}

uint64_t tight_receive(void *ring, uint32_t slots, uint32_t size, uint32_t batch, void *out)
{
    struct tight *r = ring;
    uint64_t tail = load(&r->tail), k, at;

    while ((k = there(r, tail))) {
        at = tail & (slots - 1);
        k = least(batch, k, slots - at);
        memcpy(out, r->slots + at * size, k * size);
        publish(&r->tail, tail += k);
    }
    return tail;
}

int32_t tight_push(void *ring, uint32_t slots, uint32_t size, const void *record)
{
    struct tight *r = ring;
    uint64_t head = atomic_load_explicit(&r->head, memory_order_relaxed);

    if (head - r->tail_seen >= slots && head - (r->tail_seen = load(&r->tail)) >= slots)
        return 0;
    memcpy(r->slots + (head & (slots - 1)) * size, record, size);
    publish(&r->head, head + 1);
    return 1;
}

int32_t tight_pop(void *ring, uint32_t slots, uint32_t size, void *record)
{
    struct tight *r = ring;
    uint64_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);

    if (r->head_seen == tail && (r->head_seen = load(&r->head)) == tail)
        return 0;
    memcpy(record, r->slots + (tail & (slots - 1)) * size, size);
    publish(&r->tail, tail + 1);
    return 1;
}

void tight_end(void *ring) { atomic_store(&((struct tight *)ring)->ended, 1); }
int32_t tight_ended(void *ring) { return (int32_t)atomic_load(&((struct tight *)ring)->ended); }

/* ---- in place: one word of each cache line written, and read */

static void fill(char *at, uint64_t size, uint64_t value)
{
    for (uint64_t i = 0; i < size; i += 64)
        *(volatile uint64_t *)(at + i) = value + i;
}

static uint64_t sum(const char *at, uint64_t size)
{
    uint64_t total = 0;

    for (uint64_t i = 0; i < size; i += 64)
        total += *(volatile const uint64_t *)(at + i);
    return total;
}

uint64_t place_send(void *ring, void *payload, uint32_t slots, uint32_t size, uint32_t batch, double seconds)
{
    struct tight *r = ring;
    uint64_t head = load(&r->head), end = now() + (uint64_t)(seconds * 1e9), k;

    while (now() < end) {
        k = least(batch, room(r, head, slots), slots);
        for (uint64_t i = 0; i < k; i++)
            fill((char *)payload + ((head + i) & (slots - 1)) * size, size, i);
        publish(&r->head, head += k);
    }
    tight_end(ring);
    return head;
}

uint64_t place_receive(void *ring, void *payload, uint32_t slots, uint32_t size, uint32_t batch)
{
    struct tight *r = ring;
    uint64_t tail = load(&r->tail), k;

    while ((k = there(r, tail))) {
        k = k < batch ? k : batch;
        for (uint64_t i = 0; i < k; i++)
            sum((char *)payload + ((tail + i) & (slots - 1)) * size, size);
        publish(&r->tail, tail += k);
    }
    return tail;
}

/* The same work for our ring, whose descriptors say where: {offset, size}, eight bytes each. */
void place_write(void *payload, const void *descriptors, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        fill((char *)payload + ((const uint64_t *)descriptors)[2 * i], ((const uint64_t *)descriptors)[2 * i + 1], i);
}

uint64_t place_read(void *payload, const void *descriptors, uint32_t n)
{
    uint64_t total = 0;

    for (uint32_t i = 0; i < n; i++)
        total += sum((char *)payload + ((const uint64_t *)descriptors)[2 * i], ((const uint64_t *)descriptors)[2 * i + 1]);
    return total;
}

/* ---- round trips; `ns` gets each one's time */

static void push(void *ring, uint32_t size, const void *record)
{
    for (uint32_t misses = 0; !tight_push(ring, 16, size, record);)
        miss(&misses);
}

static void pop(void *ring, uint32_t size, void *record)
{
    for (uint32_t misses = 0; !tight_pop(ring, 16, size, record);)
        miss(&misses);
}

void tight_ping(void *there, void *back, uint32_t size, uint32_t n, uint32_t *ns)
{
    char record[4096] = {0};

    for (uint32_t i = 0; i < n; i++) {
        uint64_t t = now();

        push(there, size, record);
        pop(back, size, record);
        ns[i] = (uint32_t)(now() - t);
    }
}

void tight_pong(void *there, void *back, uint32_t size, uint32_t n)
{
    char record[4096];

    for (uint32_t i = 0; i < n; i++) {
        pop(there, size, record);
        push(back, size, record);
    }
}

/* A futex a direction, and nothing else: what a wake-up of a sleeper costs. */
static void tell(void *word, uint32_t value)
{
    atomic_store((_Atomic uint32_t *)word, value);
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void hear(void *word, uint32_t value)
{
    uint32_t seen;

    while ((seen = atomic_load((_Atomic uint32_t *)word)) != value)
        syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0);
}

void futex_ping(void *words, uint32_t n, uint32_t *ns)
{
    for (uint32_t i = 1; i <= n; i++) {
        uint64_t t = now();

        tell(words, i);
        hear((char *)words + 64, i);
        ns[i - 1] = (uint32_t)(now() - t);
    }
}

void futex_pong(void *words, uint32_t n)
{
    for (uint32_t i = 1; i <= n; i++) {
        hear(words, i);
        tell((char *)words + 64, i);
    }
}

/* Our ring with both ends in C. `state` is a SharedRing's. */
static int32_t get(void *state, void *record, int64_t spin_ns)
{
    int32_t r;

    while (!(r = shared_take(state, record, 1, spin_ns)))
        if ((r = shared_sleep(state, 1, 1000000000)) < 0)
            break;
    return r;
}

int32_t ring_ping(void *state, uint32_t size, uint32_t n, int64_t spin_ns, uint32_t *ns)
{
    char record[4096] = {0};

    for (uint32_t i = 0; i < n; i++) {
        uint64_t t = now();

        if (shared_publish(state, record, size, spin_ns) < 0 || get(state, record, spin_ns) < 0)
            return -1;
        ns[i] = (uint32_t)(now() - t);
    }
    return 0;
}

int32_t ring_pong(void *state, uint32_t size, uint32_t n, int64_t spin_ns)
{
    char record[4096];

    for (uint32_t i = 0; i < n; i++)
        if (get(state, record, spin_ns) < 0 || shared_publish(state, record, size, spin_ns) < 0)
            return -1;
    return 0;
}
