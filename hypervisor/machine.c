/* What is done to whole frames, and where we run. */
#define _GNU_SOURCE
#include "hv.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

void scrub(void *at, uint64_t bytes) { memset(at, 0, bytes); }

void copy_page(void *to, const void *from) { memmove(to, from, 4096); }

int32_t current_cpu(void) { return sched_getcpu(); }

struct attributes { /* the host's sched_attr, version 0 */
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};
enum { RESET_ON_FORK = 1 };
_Static_assert(sizeof(struct attributes) == 48, "SCHED_ATTR_SIZE_VER0");

/* Ask the host for slices of `ns`: who wants little at a time is let in sooner when it wakes beside somebody busy. It gets no more
 * for it. Children begin without. 0 or -errno; a host before Linux 6.12 takes no notice. */
int32_t short_slices(int64_t ns)
{
    struct attributes a = {.size = sizeof a, .flags = RESET_ON_FORK, .runtime = (uint64_t)ns};

    a.nice = getpriority(PRIO_PROCESS, 0);
    return syscall(SYS_sched_setattr, 0, &a, 0) ? -errno : 0;
}

/* Tell a guest kernel that waits for a program that there is none any more: the cell's turn is TURN_DEAD, and who sleeps on it
 * wakes. A word in its own memory; it is not read. */
void cell_dead(void *cell)
{
    __atomic_store_n((uint32_t *)cell, 2, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, cell, FUTEX_WAKE, INT32_MAX, 0, 0, 0);
}
