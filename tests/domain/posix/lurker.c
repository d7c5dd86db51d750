/* A child that pretends to end and goes on: it writes an exit into its cell (ring1_user.h) by itself, and watches what its space is
 * given to next. Prints how often a later child's secret was seen by it. Its process is the next child's, if the kernel keeps it. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ring1_user.h"

struct shared {
    volatile uint32_t begun, seen;
};
static volatile uint32_t secret;
static struct shared *shared;

static void lurk(void)
{
    volatile struct ring1_cell *cell = (void *)RING1_USER_CONTROL;
    volatile uint64_t *context;

    getppid(); /* the cell is that of a system call now, and says where its registers are */
    context = (void *)cell->frame;
    context[13] = 0;    /* rdi, after five words of ucontext and eight registers */
    cell->number = 231; /* exit_group */
    shared->begun++;
    __atomic_store_n(&cell->turn, RING1_TURN_KERNEL, __ATOMIC_SEQ_CST);
    while (!secret)
        ;
    shared->seen++; /* we are the next child, for our kernel */
    _exit(0);
}

static void compute(void) /* some slices of the processor's: a kernel looks at a turn that nobody woke it for when one ends */
{
    for (volatile int i = 0; i < 60000000; i++)
        ;
}

int main(void)
{
    int status, ended = 0;

    shared = mmap(0, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared->begun = shared->seen = 0;
    for (int round = 0; round < 4; round++) {
        pid_t child;

        secret = 0;
        child = fork();
        if (!child)
            lurk();
        compute();
        ended += waitpid(child, &status, 0) == child && WIFEXITED(status);
        secret = 42;
        child = fork(); /* most likely into the space that the lurker has left */
        if (!child)
            _exit(0);
        waitpid(child, &status, 0);
        secret = 0;
    }
    printf("lurked %u, ended %d, seen %u\n", shared->begun, ended, shared->seen);
    return 0;
}
