/* A producer that publishes and a consumer that is about to sleep, at the same instant, many times, on two CPUs.
 *
 * Lost: the producer was told that nobody need be notified, and the consumer that it may sleep. */
#define _GNU_SOURCE
#include "ring.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

static _Alignas(64) char page[4096];
static struct ring_front front;
static struct ring_back back;
static _Alignas(64) _Atomic uint32_t go, done;
static uint32_t sleeps, stop;

static void pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set); /* of this thread */
}

static void delay(uint32_t *random)
{
    *random = *random * 1664525 + 1013904223;
    for (uint32_t i = *random >> 27; i; i--)
        __builtin_ia32_pause();
}

static void *consume(void *cpu)
{
    uint32_t random = 1;
    char out[16];

    pin((int)(intptr_t)cpu);
    for (uint32_t round = 1;; round++) {
        while (atomic_load(&go) != round)
            ;
        if (stop)
            return NULL;
        delay(&random);
        sleeps = !ring_back_recheck(&back);
        atomic_store(&done, round);
        round++;
        while (atomic_load(&go) != round)
            ;
        if (ring_back_take(&back, out, 1) != 1 || ring_back_publish(&back, out, 1) < 0)
            sleeps = 2;
        atomic_store(&done, round);
    }
}

/* At most `rounds` of them and `seconds`, up to the first loss. Returns losses; *quiet, *asleep: how often the producer
 * need not notify, and how often the consumer might sleep. */
int32_t litmus(uint32_t rounds, double seconds, int32_t cpu0, int32_t cpu1, uint32_t *quiet, uint32_t *asleep)
{
    uint32_t random = 2, at = 0, lost = 0;
    struct timespec t;
    cpu_set_t before;
    pthread_t thread;
    char record[16] = {0};
    double end;

    sched_getaffinity(0, sizeof before, &before);
    pin(cpu0);
    stop = *quiet = *asleep = 0;
    atomic_store(&go, 0);
    atomic_store(&done, 0);
    ring_front_init(&front, page, sizeof page, 16, 16);
    ring_back_attach(&back, page, sizeof page, 16, 16);
    clock_gettime(CLOCK_MONOTONIC, &t);
    end = (double)t.tv_sec + (double)t.tv_nsec / 1e9 + seconds;
    if (pthread_create(&thread, NULL, consume, (void *)(intptr_t)cpu1))
        return -1;
    for (uint32_t i = 0; i < rounds && !lost; i++) {
        int32_t notify;

        atomic_store(&go, ++at);
        delay(&random);
        notify = ring_front_publish(&front, record, 1);
        while (atomic_load(&done) != at)
            ;
        lost += !notify && sleeps == 1;
        *quiet += !notify;
        *asleep += sleeps == 1;
        atomic_store(&go, ++at);
        while (atomic_load(&done) != at)
            ;
        lost += sleeps == 2 || ring_front_take(&front, record, 1) != 1;
        clock_gettime(CLOCK_MONOTONIC, &t);
        if ((double)t.tv_sec + (double)t.tv_nsec / 1e9 > end)
            break;
    }
    stop = 1;
    atomic_store(&go, ++at);
    pthread_join(thread, NULL);
    sched_setaffinity(0, sizeof before, &before);
    return (int32_t)lost;
}
