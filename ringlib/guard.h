/* A touch of memory that a peer has taken away is SIGBUS; under this guard it is an error of the call that touched.
 *
 * The jump crosses the functions of shared.c only, never a frame of Python's; and nothing that a jump could leave half done
 * (a lock, an allocation) happens while a thread is armed. */
#ifndef RINGLIB_GUARD_H
#define RINGLIB_GUARD_H

#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>

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

#endif
