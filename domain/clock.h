/* The time records of shared_info, as a kernel and its programs read them (ABI.md, section 8). Freestanding: no call, no memory
 * of its own, so that it can be mapped into programs as it is. */
#ifndef RING1_CLOCK_H
#define RING1_CLOCK_H

#include <stddef.h>
#include <stdint.h>

struct clock_record {
    uint32_t version, pad0;
    uint64_t tsc_timestamp, system_time;
    uint32_t mul;
    int8_t shift;
    uint8_t flags, pad1[2];
};
struct clock_wall {
    uint32_t version, sec, nsec, sec_hi;
};
#define CLOCK_RECORD 32 /* offsets in shared_info */
#define CLOCK_WALL 3072
#define CLOCK_STABLE 1
_Static_assert(sizeof(struct clock_record) == 32 && offsetof(struct clock_record, flags) == 29, "vcpu_time_info");

/* Whether what was read since `before` is of one record. It is even then; while it is odd, nothing is read twice in vain. */
#define CLOCK_CHANGED(record, before) \
    (__atomic_thread_fence(__ATOMIC_ACQUIRE), __atomic_load_n(&(record)->version, __ATOMIC_RELAXED) != (before))

/* System time in ns; 0: the record says that cycles are no clock on this host. The fence keeps the counter from being read
 * before the record: cycles would be negative where a new one came in between. */
static inline int clock_read(const void *shared_info, uint64_t *ns)
{
    const volatile struct clock_record *t = (const volatile void *)((const char *)shared_info + CLOCK_RECORD);
    uint64_t stamp, base, cycles;
    uint32_t before, mul;
    int8_t shift;
    uint8_t flags;

    do {
        before = __atomic_load_n(&t->version, __ATOMIC_ACQUIRE) & ~1u;
        stamp = t->tsc_timestamp;
        base = t->system_time;
        mul = t->mul;
        shift = t->shift;
        flags = t->flags;
        __asm__ volatile("lfence" : : : "memory");
        cycles = __builtin_ia32_rdtsc() - stamp;
    } while (CLOCK_CHANGED(t, before));
    cycles = shift < 0 ? cycles >> -shift : cycles << shift;
    *ns = base + (uint64_t)((unsigned __int128)cycles * mul >> 32);
    return flags & CLOCK_STABLE;
}

/* Unix time of system time 0, in ns. */
static inline uint64_t clock_wall(const void *shared_info)
{
    const volatile struct clock_wall *w = (const volatile void *)((const char *)shared_info + CLOCK_WALL);
    uint32_t before, sec, nsec, high;

    do {
        before = __atomic_load_n(&w->version, __ATOMIC_ACQUIRE) & ~1u;
        sec = w->sec;
        nsec = w->nsec;
        high = w->sec_hi;
    } while (CLOCK_CHANGED(w, before));
    return ((uint64_t)high << 32 | sec) * 1000000000u + nsec;
}

#endif
