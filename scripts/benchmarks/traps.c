/* What the host's own kernel does for a process that handles an exception of its own: the limit of row x1. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <time.h>

/* cdef begin */
double host_exception(int n); /* ns of a breakpoint, its SIGTRAP handler, and back */
/* cdef end */

static void handler(int sig, siginfo_t *info, void *context) { (void)sig, (void)info, (void)context; }

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

double host_exception(int n)
{
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO}, before;
    double begin;

    sigaction(SIGTRAP, &action, &before);
    begin = now();
    for (int i = 0; i < n; i++)
        __asm__ volatile("int3");
    begin = now() - begin;
    sigaction(SIGTRAP, &before, 0);
    return begin / n;
}
