/* Waiting: the one rule of all who may look for a while before they sleep. A SharedRing's ends, a guest's idle loop and both
 * ends of the hypercall ring wait like this:
 *
 *      look; spin, if that was worth it the last time; say that you sleep; look again; sleep
 *
 * To be woken across CPUs costs some 30 us, to see a line change 0.1 us: who is answered promptly should not sleep. But a
 * look that finds nothing has cost its whole time, so luck decides. Once a spin found what it waited for, the next wait
 * spins too; each time it did not, twice as many waits go by without (1, 3, 7 ... 255) before it is tried again. So one
 * that waits for long pays less than 0.1 us a wait, and two that begin to answer each other promptly find it out within
 * 256 waits.
 *
 * Nobody spins for a partner on its own CPU, who would wait for it to stop. And nobody yields instead: where a third process
 * wants the CPU that costs a whole slice. Whose partner has said that it is awake, and who could only ring at its door, asks
 * no luck (wait_out = 0): that costs more than the look. */
#ifndef RINGLIB_SPIN_H
#define RINGLIB_SPIN_H

#include <stdint.h>
#include <time.h>

/* cdef begin */
#define SPIN_NS 20000 /* less than a sleep and a wake-up across CPUs cost */
struct spin {
    uint32_t unlucky, wait_out; /* how many waits shall, and will still, do without */
    uint64_t spins, won;
};
/* cdef end */
enum { SPIN_MOST_UNLUCKY = 255 };

int sched_getcpu(void); /* of sched.h, which has it under _GNU_SOURCE only */

/* Where we run, plus 1: what each end leaves where its partner sees it. 0: it has not said. */
static inline uint32_t spin_cpu(void) { return (uint32_t)sched_getcpu() + 1; }

static inline int64_t spin_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

/* Whether this wait, for a partner on CPU `partner`, shall spin. To be asked once a wait: it counts. */
static inline int spin_worth(struct spin *s, uint32_t partner)
{
    if (partner == spin_cpu() || s->wait_out) {
        s->wait_out -= s->wait_out > 0;
        return 0;
    }
    return 1;
}

/* Until there(of) is not 0, at most `ns`. What there(of) said; 0: sleep. */
static inline int spin_until(struct spin *s, int64_t ns, int (*there)(const void *), const void *of)
{
    int64_t end = spin_now() + ns;
    int r;

    s->spins++;
    do
        for (int i = 0; i < 50; i++) {
            if ((r = there(of))) {
                s->won++;
                s->unlucky = 0;
                return r;
            }
            __builtin_ia32_pause();
        }
    while (spin_now() < end);
    s->unlucky = s->unlucky < SPIN_MOST_UNLUCKY ? 2 * s->unlucky + 1 : SPIN_MOST_UNLUCKY;
    s->wait_out = s->unlucky;
    return 0;
}

static inline int spin(struct spin *s, uint32_t partner, int64_t ns, int (*there)(const void *), const void *of)
{
    return ns > 0 && spin_worth(s, partner) ? spin_until(s, ns, there, of) : 0;
}

#endif
