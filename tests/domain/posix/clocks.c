/* What a program sees of time. One program, the first argument says what. */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

static uint64_t now(clockid_t clock)
{
    struct timespec t;

    if (clock_gettime(clock, &t))
        abort();
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* `count` reads of each clock, none behind the one before; how many were ahead of what was asked after them. */
static int reads(long count)
{
    static const clockid_t clocks[] = {CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_REALTIME_COARSE,
                                       CLOCK_MONOTONIC_COARSE, CLOCK_BOOTTIME};
    for (size_t i = 0; i < sizeof clocks / sizeof *clocks; i++) {
        uint64_t last = 0, backwards = 0;
        for (long n = 0; n < count; n++) {
            uint64_t t = now(clocks[i]);
            backwards += t < last;
            last = t;
        }
        if (backwards)
            printf("clock %d went back %lu times\n", (int)clocks[i], backwards);
    }
    for (long n = 0; n < count; n++) {
        struct timeval v;
        struct timespec r;
        uint64_t before = now(CLOCK_REALTIME);
        time_t seconds = time(NULL);
        gettimeofday(&v, NULL);
        if ((uint64_t)seconds < before / 1000000000u || v.tv_sec < seconds || v.tv_usec >= 1000000 || sched_getcpu() != 0)
            printf("time %ld, gettimeofday %ld.%06ld, clock %lu\n", (long)seconds, (long)v.tv_sec, (long)v.tv_usec, before);
        clock_getres(CLOCK_MONOTONIC, &r);
        if (r.tv_sec || r.tv_nsec != 1)
            printf("resolution %ld\n", r.tv_nsec);
    }
    printf("done\n");
    return 0;
}

/* The time, between two readings of the cycle counter: `count` rows, each the best of as many ms. */
static int pairs(long count, uint64_t ms)
{
    uint64_t *rows = malloc((size_t)count * 3 * sizeof *rows), last = now(CLOCK_MONOTONIC);
    long backwards = 0;

    memset(rows, 0, (size_t)count * 3 * sizeof *rows);
    for (long i = 0; i < count; i++) {
        uint64_t best = UINT64_MAX, end = last + ms * 1000000;
        while (last < end) {
            uint64_t before = __rdtsc(), ns = now(CLOCK_MONOTONIC), after;
            _mm_lfence();
            after = __rdtsc();
            backwards += ns < last;
            last = ns;
            if (after - before < best) {
                best = after - before;
                rows[3 * i] = before;
                rows[3 * i + 1] = ns;
                rows[3 * i + 2] = after;
            }
        }
    }
    for (long i = 0; i < count; i++)
        printf("%lu %lu %lu\n", rows[3 * i], rows[3 * i + 1], rows[3 * i + 2]);
    printf("backwards %ld\n", backwards);
    return 0;
}

/* The wall clock, until it has jumped to beyond `until` seconds. */
static int jump(long until)
{
    uint64_t before = now(CLOCK_MONOTONIC);

    printf("waiting\n");
    fflush(stdout);
    while (time(NULL) < until)
        ;
    printf("real %lu after %lu\n", now(CLOCK_REALTIME), now(CLOCK_MONOTONIC) - before);
    return 0;
}

static int status_of(void (*child)(char *), char *page)
{
    int status;

    if (!fork()) {
        child(page);
        _exit(0);
    }
    wait(&status);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

static void store(char *page)
{
    *(volatile char *)page = 1;
}

static void execute(char *page)
{
    ((void (*)(void))page)();
}

static void own(char *page) /* a copy of its own, which stands still */
{
    if (mprotect(page, 4096, PROT_READ | PROT_WRITE))
        _exit(1);
    memset(page, 0xff, 4096);
    _exit((unsigned char)page[32] == 0xff ? 0 : 2);
}

static void unmap(char *page)
{
    if (munmap(page, 4096))
        _exit(1);
    now(CLOCK_MONOTONIC);
}

/* What a hostile one can do to the two pages; then they are as they were. */
static int attack(void)
{
    char *code = (char *)getauxval(AT_SYSINFO_EHDR), *record = code - 4096;
    uint64_t before = now(CLOCK_MONOTONIC), after;
    int status = status_of(store, record);

    printf("store to the record %d\n", status);
    if (!status)
        return 1; /* the next one would stop time for all */
    printf("store to the code %d\n", status_of(store, code));
    printf("run the record %d\n", status_of(execute, record));
    printf("a copy of the record %d\n", status_of(own, record));
    printf("without the record %d\n", status_of(unmap, record));
    after = now(CLOCK_MONOTONIC);
    printf("time goes on %d\n", after > before && after - before < 60000000000u && memcmp(code, "\177ELF", 4) == 0);
    return 0;
}

/* Clocks that only the kernel has. */
static int others(void)
{
    struct timespec t;
    uint64_t begin = now(CLOCK_PROCESS_CPUTIME_ID);

    while (now(CLOCK_PROCESS_CPUTIME_ID) < begin + 5000000)
        ;
    printf("%d %d %d\n", clock_gettime(12345, &t), clock_getres(-77, &t), clock_getres(CLOCK_MONOTONIC, NULL));
    return 0;
}

/* ns a read, the loop among them. */
static int cost(long count)
{
    uint64_t begin = now(CLOCK_MONOTONIC), end = begin;

    for (long i = 0; i < count; i++)
        end = now(CLOCK_MONOTONIC);
    printf("{\"ns\": %.2f}\n", (double)(end - begin) / (double)count);
    return 0;
}

int main(int argc, char **argv)
{
    long count = argc > 2 ? atol(argv[2]) : 0;

    if (argc < 2)
        return 1;
    if (!strcmp(argv[1], "reads"))
        return reads(count);
    if (!strcmp(argv[1], "pairs"))
        return pairs(count, argc > 3 ? (uint64_t)atol(argv[3]) : 1);
    if (!strcmp(argv[1], "jump"))
        return jump(count);
    if (!strcmp(argv[1], "attack"))
        return attack();
    if (!strcmp(argv[1], "cost"))
        return cost(count);
    if (!strcmp(argv[1], "others"))
        return others();
    return 1;
}
