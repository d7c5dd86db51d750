/* What is done to whole frames, and where we run. */
#define _GNU_SOURCE
#include "hv.h"

#include <linux/futex.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

void scrub(void *at, uint64_t bytes) { memset(at, 0, bytes); }

void copy_page(void *to, const void *from) { memmove(to, from, 4096); }

int32_t current_cpu(void) { return sched_getcpu(); }

/* Tell a guest kernel that waits for a program that there is none any more: the cell's turn is TURN_DEAD, and who sleeps on it
 * wakes. A word in its own memory; it is not read. */
void cell_dead(void *cell)
{
    __atomic_store_n((uint32_t *)cell, 2, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, cell, FUTEX_WAKE, INT32_MAX, 0, 0, 0);
}
