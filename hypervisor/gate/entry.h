/* What the two halves of the entry code have in common: traps.c, which handler is entered and how; fault.c, page faults. It runs
 * in the guest's process, on memory that the guest may write: what a guest spoils here spoils that guest. It makes two system
 * calls and calls nothing else, so that errno and the C library's state are what they were. */
#ifndef RING1_ENTRY_H
#define RING1_ENTRY_H

#include <signal.h>
#include <stdint.h>
#include <ucontext.h>

#include "gate.h"
#include "ring1_mmu.h"

struct fault { /* a message on RING1_FD_FAULT */
    uint64_t address, error, rip, rsp, value;
};
struct verdict {
    uint32_t what, error; /* the error code for the guest: as its own tables have it, not the host's */
    uint64_t word;        /* of its handler, as in struct ring1_traps */
};
_Static_assert(sizeof(struct fault) == 40, "traps.FAULT");
_Static_assert(sizeof(struct verdict) == 16, "traps.VERDICT");

/* How many of us run. All host mappings of the windows may be thrown out at any time, also under this code: what it reads at
 * rip and writes to the guest's stack is filled by a second one, which does nothing else. Volatile, as the frame is where it is
 * pushed: the second one must find both as they are written here, and the compiler does not know of it. */
extern __attribute__((visibility("hidden"))) volatile int entry_depth;

/* What the first one is at: a vector or RING1_EVENT, RING1_FAILSAFE, of the instruction at rip, on the stack at rsp. */
extern __attribute__((visibility("hidden"))) volatile struct entry {
    uint64_t value, rip, rsp;
} entry_at;

#pragma GCC visibility push(hidden)
int is_page_fault(const siginfo_t *info);
void page_fault(greg_t *reg, uint64_t address);
void tell_of_faults(uint64_t begin, uint64_t bytes, long sock);
_Noreturn void entry_ends(uint64_t address, uint64_t error);
void enter(greg_t *reg, uint64_t stack, uint64_t word, int has_error, uint64_t error);
#pragma GCC visibility pop

#endif
