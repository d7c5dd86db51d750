/* The library that programs have without asking (AT_SYSINFO_EHDR): clock_gettime and its kin, read from the domain's time record
 * without a system call. It lies in every program's space, behind the page of the record (vdso.lds); what it cannot answer it
 * asks its kernel, by the call that it stands for. No word of it is ever written: its frames are everybody's. */
#include "../clock.h"

#define EXPORT __attribute__((visibility("default")))
#define SECOND 1000000000u

enum { REALTIME, MONOTONIC, RAW = 4, REALTIME_COARSE, MONOTONIC_COARSE, BOOTTIME };
enum { SYS_gettimeofday = 96, SYS_time = 201, SYS_clock_gettime = 228, SYS_clock_getres = 229 };

struct timespec {
    int64_t sec, ns;
};
struct timeval {
    int64_t sec, us;
};

extern const char time_page[] __attribute__((visibility("hidden")));

static long ask(long number, long first, const void *second)
{
    long result;

    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(first), "S"(second) : "rcx", "r11", "memory");
    return result;
}

/* A clock's ns; 0: one that is not here, or a host whose cycles are no clock. */
static int read_clock(int clock, uint64_t *ns)
{
    switch (clock) {
    case REALTIME:
    case REALTIME_COARSE:
        if (!clock_read(time_page, ns))
            return 0;
        *ns += clock_wall(time_page);
        return 1;
    case MONOTONIC: /* nothing here stands still while a host sleeps, and nobody slews */
    case RAW:
    case MONOTONIC_COARSE:
    case BOOTTIME:
        return clock_read(time_page, ns);
    default:
        return 0;
    }
}

EXPORT int __vdso_clock_gettime(int clock, struct timespec *at)
{
    uint64_t ns;

    if (!read_clock(clock, &ns))
        return (int)ask(SYS_clock_gettime, clock, at);
    at->sec = (int64_t)(ns / SECOND);
    at->ns = (int64_t)(ns % SECOND);
    return 0;
}

EXPORT int __vdso_clock_getres(int clock, struct timespec *at)
{
    uint64_t ns;

    if (!read_clock(clock, &ns))
        return (int)ask(SYS_clock_getres, clock, at);
    if (at)
        *at = (struct timespec){0, 1};
    return 0;
}

EXPORT int __vdso_gettimeofday(struct timeval *at, uint64_t *zone)
{
    uint64_t ns;

    if (!read_clock(REALTIME, &ns))
        return (int)ask(SYS_gettimeofday, (long)at, zone);
    if (at)
        *at = (struct timeval){(int64_t)(ns / SECOND), (int64_t)(ns % SECOND / 1000)};
    if (zone)
        *zone = 0;
    return 0;
}

EXPORT int64_t __vdso_time(int64_t *at)
{
    uint64_t ns;

    if (!read_clock(REALTIME, &ns))
        return ask(SYS_time, (long)at, 0);
    if (at)
        *at = (int64_t)(ns / SECOND);
    return (int64_t)(ns / SECOND);
}

/* A domain is one virtual CPU. */
EXPORT int __vdso_getcpu(uint32_t *cpu, uint32_t *node)
{
    if (cpu)
        *cpu = 0;
    if (node)
        *node = 0;
    return 0;
}
