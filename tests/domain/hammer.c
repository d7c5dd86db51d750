/* Two processes hammer one shared_info: a sender with the hypervisor's functions and a guest with its own.
 *
 *     hammer ROUNDS PATIENCE_MS signal|descriptor      0: every event arrived; 1: one was lost; 2: something else
 *
 * The sender counts each event before it sets it pending, and signals where it is told to. The guest sleeps in its idle
 * loop, for the signal or for descriptors (an eventfd stands for the signal's); when it is handed a port it notes the count.
 * After every burst the sender waits until all that was counted was noted: an event that is pending while the guest sleeps
 * and nobody will signal is lost, and is never noted. */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"
#include "hv.h"

#define PORTS 96   /* in two words of the bitmap */
#define AT_ONCE 3  /* ports a drain hands out: a full one happens often */
#define BURST 24

static struct shared {
    _Alignas(4096) char page[4096];
    _Atomic uint64_t sent[PORTS], seen[PORTS];
    _Atomic uint32_t wants_unmask[PORTS];
    _Atomic int over;
} *sh;
static struct evt_end to; /* the guest, as the hypervisor has it */
static int doorbell, by_signal;
static pid_t child;
static uint32_t seed;

static uint32_t rnd(uint32_t n)
{
    seed = seed * 1664525u + 1013904223u;
    return (seed >> 8) % n;
}

static int64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void ring(void)
{
    uint64_t one = 1;

    if (by_signal)
        kill(child, SIGUSR2);
    else if (write(doorbell, &one, sizeof one) != sizeof one)
        _exit(2);
}

/* ---- the guest */

static void note(const uint32_t *ports, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        sh->seen[ports[i]] = sh->sent[ports[i]];
}

static void guest(void)
{
    int never[2];
    struct wanted fds[2] = {{doorbell, POLLIN, 0}};
    struct idle state = {.shared_info = sh->page, .fds = fds, .nr_fds = by_signal ? 1 : 2};

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (pipe(never))
        _exit(3);
    fds[1] = (struct wanted){never[0], POLLIN, 0};
    upcall_mask(sh->page);
    while (!sh->over) {
        idle(&state, 1);
        note(state.ports, state.nr_ports);
        if (rnd(4) == 0) { /* awake for a while, and looking by itself */
            uint32_t port[AT_ONCE];

            for (uint32_t i = rnd(300); i; i--)
                __builtin_ia32_pause();
            note(port, (uint32_t)upcall_drain(sh->page, port, AT_ONCE));
        }
        if (rnd(4) == 0) {
            uint32_t port = rnd(PORTS);

            event_mask(sh->page, port);
            sh->wants_unmask[port] = 1;
        }
    }
    _exit(0);
}

/* ---- the sender */

static void unmask_what_is_asked(void)
{
    for (uint32_t port = 0; port < PORTS; port++)
        if (sh->wants_unmask[port] && atomic_exchange(&sh->wants_unmask[port], 0) && evtchn_unmask(&to, port))
            ring();
}

static int all_seen(void)
{
    for (uint32_t port = 0; port < PORTS; port++)
        if (sh->seen[port] != sh->sent[port])
            return 0;
    return 1;
}

int main(int argc, char **argv)
{
    long rounds = argc > 1 ? atol(argv[1]) : 1000, patience = argc > 2 ? atol(argv[2]) : 1000, round;
    int status, lost = 0;
    sigset_t upcall;

    by_signal = argc > 3 && !strcmp(argv[3], "signal");
    sigemptyset(&upcall);
    sigaddset(&upcall, SIGUSR2);
    sigprocmask(SIG_BLOCK, &upcall, NULL);
    sh = mmap(NULL, sizeof *sh, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    to.shared_info = sh;
    doorbell = eventfd(0, EFD_NONBLOCK);
    child = sh == MAP_FAILED || doorbell < 0 ? -1 : fork();
    if (child < 0)
        return 2;
    seed = child ? 1 : 2;
    if (!child)
        guest();
    for (round = 0; round < rounds && !lost; round++) {
        int64_t deadline = now_ms() + patience;

        for (uint32_t i = 1 + rnd(BURST); i; i--) {
            uint32_t port = rnd(2) ? rnd(PORTS) : rnd(4);

            sh->sent[port]++;
            if (evtchn_notify(&to, port))
                ring();
        }
        for (uint32_t turn = 0; !all_seen() && !lost; turn++) {
            unmask_what_is_asked();
            lost = turn % 256 == 255 && now_ms() > deadline;
        }
    }
    sh->over = 1;
    ring();
    if (waitpid(child, &status, 0) != child || status)
        return 2;
    printf("%ld rounds%s\n", round, lost ? ", an event was lost" : "");
    return lost;
}
