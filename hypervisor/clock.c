/* Time as guests read it: Xen's time record and wall clock in shared_info, written under a version that is odd meanwhile. */
#define _GNU_SOURCE
#include "hv.h"

#include <stdatomic.h>
#include <stddef.h>
#include <time.h>
#include <x86intrin.h>

#define TRIES 5
#define MORE_TRIES 50
#define NARROW 1000 /* cycles */

struct time_info { /* vcpu_time_info, at offset 32 of shared_info */
    _Atomic uint32_t version;
    uint32_t pad0;
    _Atomic uint64_t tsc_timestamp, system_time;
    _Atomic uint32_t mul;
    _Atomic int8_t shift;
    _Atomic uint8_t flags;
    uint8_t pad1[2];
};
struct wall_clock { /* at offset 3072 */
    _Atomic uint32_t version, sec, nsec, sec_hi;
};
_Static_assert(sizeof(struct time_info) == 32 && offsetof(struct time_info, mul) == 24, "vcpu_time_info");
_Static_assert(offsetof(struct time_info, flags) == 29 && sizeof(struct wall_clock) == 16, "flags, wall clock");

/* CLOCK_MONOTONIC and the cycle counter at one moment: the pair that was read fastest of a few, or of more where others ran
 * meanwhile. */
void clock_sample(struct clock_pair *out)
{
    uint64_t best = UINT64_MAX;

    for (int i = 0; i < TRIES || (best > NARROW && i < MORE_TRIES); i++) {
        struct timespec t;
        uint64_t before = __rdtsc(), after;

        clock_gettime(CLOCK_MONOTONIC, &t);
        after = __rdtsc();
        if (after - before < best) {
            best = after - before;
            out->tsc = before + best / 2;
            out->ns = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
        }
    }
}

/* System time at a moment. */
uint64_t clock_at(const struct clock_line *line, uint64_t tsc)
{
    uint64_t cycles = tsc - line->tsc;

    cycles = line->shift < 0 ? cycles >> -line->shift : cycles << line->shift;
    return line->ns + (uint64_t)((unsigned __int128)cycles * line->mul >> 32);
}

/* One writer, many readers that may be reading now. `mul`: from this moment on the line goes on at another rate; 0: it is told as
 * it is. The moment lies between the two versions: whoever still read the old record read the counter before it, so that no
 * reader's time falls, whatever the rates are. */
void clock_tell(void *shared_info, struct clock_line *line, uint32_t mul, int8_t shift)
{
    struct time_info *t = (struct time_info *)(void *)((char *)shared_info + 32);
    uint32_t version = atomic_load_explicit(&t->version, memory_order_relaxed) | 1;

    atomic_store_explicit(&t->version, version, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    if (mul) {
        _mm_lfence();
        uint64_t tsc = __rdtsc();
        line->ns = clock_at(line, tsc);
        line->tsc = tsc;
        line->mul = mul;
        line->shift = shift;
    }
    atomic_store_explicit(&t->tsc_timestamp, line->tsc, memory_order_relaxed);
    atomic_store_explicit(&t->system_time, line->ns, memory_order_relaxed);
    atomic_store_explicit(&t->mul, line->mul, memory_order_relaxed);
    atomic_store_explicit(&t->shift, line->shift, memory_order_relaxed);
    atomic_store_explicit(&t->flags, line->stable, memory_order_relaxed);
    atomic_store_explicit(&t->version, version + 1, memory_order_release);
}

/* Unix time of system time 0. */
void clock_tell_wall(void *shared_info, uint64_t sec, uint32_t nsec)
{
    struct wall_clock *w = (struct wall_clock *)(void *)((char *)shared_info + 3072);
    uint32_t version = atomic_load_explicit(&w->version, memory_order_relaxed) | 1;

    atomic_store_explicit(&w->version, version, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    atomic_store_explicit(&w->sec, (uint32_t)sec, memory_order_relaxed);
    atomic_store_explicit(&w->nsec, nsec, memory_order_relaxed);
    atomic_store_explicit(&w->sec_hi, (uint32_t)(sec >> 32), memory_order_relaxed);
    atomic_store_explicit(&w->version, version + 1, memory_order_release);
}
