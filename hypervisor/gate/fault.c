/* The hypervisor's entry code for page faults and exceptions: the handler of SIGSEGV, SIGBUS, SIGFPE, SIGILL and SIGTRAP of every
 * domain's process.
 *
 * An access that the host kernel refuses in the windows is told to the hypervisor over a socket, with what the hardware says
 * of it (in 2003: the hypervisor read CR2). It maps what the guest's tables allow, and the access runs again; or it says
 * where the guest's own handler is, which is then entered as by the hardware: its frame below the red zone of the interrupted
 * stack, to be left by iretq; or it has done what a store to a page table asked for (vm_assist), and the access is
 * skipped. rt_sigreturn restores the signal mask on every way out, so a fault in the guest's handler is an
 * ordinary one.
 *
 * Every other exception is the guest's own affair: its handler is entered at once, and nobody is told. Which one that is stands
 * in a page of the top 64 MB that the hypervisor alone can write, so the table that was validated is the one that is used. The
 * hypervisor hears only of one that has no handler, or of a frame that cannot be pushed: either ends the domain.
 *
 * It runs in the guest's process, on memory that the guest may write: what a guest spoils here spoils that guest. It makes two
 * system calls and calls nothing, so that errno and the C library's state are what they were.
 *
 * A page that cannot be had (SIGBUS) is no page fault of the guest's. Machine memory is reserved whole, so it is a broken page
 * of the host's: run again, it would fault for ever. It kills, as ever. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <ucontext.h>

#include "gate.h"

enum { RETRY = 0, BOUNCE = 1, SKIP = 2, RED_ZONE = 128 }; /* hypervisor/public/traps.py */
enum { PF_WRITE = 2 };
#define STORE (1ull << 32) /* of a message's error code: `value` is what the instruction would store */
#define DELIVERY (1ull << 33) /* while the frame of an exception was pushed */
#define UNHANDLED (1ull << 34) /* an exception that nobody handles */
#define VECTOR(n) ((uint64_t)(n) << 40)
#define TRAP_ADDRESS ((1ull << 48) - 1) /* of an entry of the table: where the handler is, 0: there is none */
#define TRAP_MASKS (1ull << 48)
#define TRAP_DPL(entry) ((entry) >> 49 & 3)
enum { GENERAL_PROTECTION = 13, PAGE_FAULT = 14, NR_VECTORS = 256 };
#define HAS_ERROR 0x60227d00u /* vectors 8, 10 to 14, 17, 21, 29, 30 */
enum { TRAP_FLAG = 0x100, DIRECTION_FLAG = 0x400, NESTED_TASK_FLAG = 0x4000, RESUME_FLAG = 0x10000 };
enum { STACK_BYTES = 64 << 10 }; /* the signal frame holds the vector registers too: up to 11 KiB of them with AMX */

struct fault {
    uint64_t address, error, rip, rsp, value;
};
struct verdict {
    uint32_t what, error; /* the error code for the guest: as its own tables have it, not the host's */
    uint64_t handler;
};
struct frame {
    uint64_t error, rip, cs, rflags, rsp, ss;
};
_Static_assert(sizeof(struct fault) == 40, "traps.FAULT");
_Static_assert(sizeof(struct verdict) == 16, "traps.VERDICT");
_Static_assert(sizeof(struct frame) == 48, "traps.FRAME_BYTES, and what iretq takes after the error code");

static char stack[STACK_BYTES] __attribute__((aligned(64)));
static struct {
    uint64_t begin, bytes;
    long sock;
} windows;

/* How many of us run. All host mappings of the windows may be thrown out at any time, also under this code: what it reads at
 * rip and writes to the guest's stack is filled by a second one, which does nothing else. */
static volatile int depth;

/* By vector; where the guest takes upcalls or not. Addresses, and not words that a guest could change. */
#define TRAP_TABLE ((const volatile uint64_t *)(KERNEL_WINDOW + 0x7ffc004000))
#define UPCALL_MASK ((volatile uint8_t *)(KERNEL_WINDOW + 0x7ffffff001))
#define KERNEL_WINDOW 0x200000000000 /* layout.py */
static int have_traps; /* set before the lock; whoever clears it has his own exceptions kill him */
static volatile int delivering; /* vector + 1, while its frame is pushed */

/* SIGSEGV while SIGSEGV is blocked: the host kernel kills with it, as if there were no handler. The filter leaves us no way
 * to take the handler back. */
static _Noreturn void die(void)
{
    uint64_t set = 1ull << (SIGSEGV - 1);

    raw6(SYS_rt_sigprocmask, SIG_BLOCK, (long)&set, 0, sizeof set, 0, 0);
    for (;;)
        __asm__ volatile("hlt");
}

/* The flags are the interrupted code's. With AC set, an access of ours that is not aligned would kill: below the red zone. */
static inline void clear_ac(void)
{
    __asm__ volatile("lea -128(%%rsp),%%rsp\n pushfq\n andq $~0x40000,(%%rsp)\n popfq\n lea 128(%%rsp),%%rsp" : : : "memory", "cc");
}

/* An interrupted call is made again; the handler runs with every signal blocked, so that only a debugger interrupts it. */
static long talk(long nr, void *message, long size)
{
    long ret;

    do
        ret = raw6(nr, windows.sock, (long)message, size, MSG_NOSIGNAL, 0, 0);
    while (ret == -EINTR);
    return ret;
}

/* As an interrupt does it: the frame below the red zone, at an address that is a multiple of 16. A stack of the windows was
 * made ready by the hypervisor; on any other a page that is not there kills. */
static void enter(greg_t *reg, uint64_t handler, uint64_t error, int has_error)
{
    struct frame *frame = (struct frame *)(((uint64_t)reg[REG_RSP] - RED_ZONE) & ~(uint64_t)15) - 1;
    uint64_t selectors = (uint64_t)reg[REG_CSGSFS]; /* cs, gs, fs, ss: 16 bits each */

    if (has_error)
        frame->error = error;
    frame->rip = (uint64_t)reg[REG_RIP];
    frame->cs = selectors & 0xffff;
    frame->rflags = (uint64_t)reg[REG_EFL];
    frame->rsp = (uint64_t)reg[REG_RSP];
    frame->ss = selectors >> 48;
    reg[REG_RSP] = (greg_t)(uintptr_t)(has_error ? &frame->error : &frame->rip);
    reg[REG_RIP] = (greg_t)handler;
    reg[REG_EFL] &= ~(greg_t)(TRAP_FLAG | DIRECTION_FLAG | NESTED_TASK_FLAG | RESUME_FLAG);
}

/* Only what the host kernel's page-fault handler raised about the windows: not a privileged instruction (SI_KERNEL), not a
 * protection key, not a signal that somebody sent, whose si_addr is made of a pid and a uid. */
static int is_page_fault(const siginfo_t *info)
{
    return (info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR) &&
           (uint64_t)(uintptr_t)info->si_addr - windows.begin < windows.bytes;
}

/* Length of the instruction if it is `mov %reg,(mem)` of 64 bits (REX.W 89 /r) that stores at `address`, and its value; 0: it is
 * another. It has just been run, so its bytes are there or can be filled, and no further one is read. */
static int decode_store(const greg_t *reg, uint64_t address, uint64_t *value)
{
    static const uint8_t order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    const uint8_t *code = (const uint8_t *)reg[REG_RIP], *next = code + 3;
    uint64_t at = 0;
    int rex = code[0], mod, base, index = 4;

    if ((rex & 0xf8) != 0x48 || code[1] != 0x89 || code[2] >> 6 == 3)
        return 0;
    mod = code[2] >> 6;
    base = code[2] & 7;
    *value = (uint64_t)reg[order[(code[2] >> 3 & 7) | (rex & 4) << 1]];
    if (base == 4) { /* a byte for scale, index and base */
        base = *next & 7;
        index = (*next >> 3 & 7) | (rex & 2) << 2;
        if (index != 4)
            at += (uint64_t)reg[order[index]] << (*next >> 6);
        next++;
    } else if (mod == 0 && base == 5) { /* from the next instruction on */
        at += (uint64_t)(next + 4);
    }
    if (mod == 1)
        at += (uint64_t)(int64_t)(int8_t)*next++;
    else if (mod == 2 || base == 5) {
        at += (uint64_t)(int64_t)(int32_t)(next[0] | (uint32_t)next[1] << 8 | (uint32_t)next[2] << 16 | (uint32_t)next[3] << 24);
        next += 4;
    }
    if (mod != 0 || base != 5)
        at += (uint64_t)reg[order[base | (rex & 1) << 3]];
    return at == address ? (int)(next - code) : 0;
}

/* The domain ends by it: the hypervisor says why, and hangs up. */
static _Noreturn void end(const greg_t *reg, uint64_t address, uint64_t what, uint64_t vector)
{
    struct fault fault = {address, what | VECTOR(vector), (uint64_t)reg[REG_RIP], (uint64_t)reg[REG_RSP], 0};
    struct verdict none;

    if (talk(SYS_sendto, &fault, sizeof fault) == sizeof fault)
        talk(SYS_recvfrom, &none, sizeof none);
    die();
}

/* What is entered with which vector: `int n` raises general protection on the host, with an error code that says n, and is n
 * where the guest's descriptor lets ring 1 through. It is then behind the instruction, as a trap is. */
static uint64_t vector_of(greg_t *reg)
{
    uint64_t vector = (uint64_t)reg[REG_TRAPNO], error = (uint64_t)reg[REG_ERR], entry;

    if (vector != GENERAL_PROTECTION || (error & 7) != 2)
        return vector;
    entry = TRAP_TABLE[error >> 3 & (NR_VECTORS - 1)];
    if (!(entry & TRAP_ADDRESS) || !TRAP_DPL(entry))
        return vector;
    reg[REG_RIP] += 2;
    return error >> 3 & (NR_VECTORS - 1);
}

/* An exception that is no page fault, to the handler that the guest registered. */
static void deliver(greg_t *reg)
{
    int soft = reg[REG_TRAPNO] == GENERAL_PROTECTION;
    uint64_t vector = vector_of(reg), entry = vector < NR_VECTORS ? TRAP_TABLE[vector] : 0;

    soft = soft && vector != GENERAL_PROTECTION;
    if (!(entry & TRAP_ADDRESS))
        end(reg, (uint64_t)reg[REG_RIP], UNHANDLED, vector);
    delivering = (int)vector + 1;
    enter(reg, entry & TRAP_ADDRESS, (uint64_t)reg[REG_ERR], !soft && vector < 32 && HAS_ERROR >> vector & 1);
    delivering = 0;
    if (entry & TRAP_MASKS)
        *UPCALL_MASK = 1;
}

static void on_trap(int sig, siginfo_t *info, void *context)
{
    ucontext_t *c = context;

    clear_ac();
    if (info->si_code <= 0) /* somebody sent it: no exception */
        return;
    if (c->uc_mcontext.gregs[REG_TRAPNO] == PAGE_FAULT) { /* a page that cannot be had: run again, it kills */
        *(uint64_t *)&c->uc_sigmask |= 1ull << (sig - 1);
        return;
    }
    if (depth++)
        die();
    deliver(c->uc_mcontext.gregs);
    depth--;
}

static void on_fault(int sig, siginfo_t *info, void *context)
{
    greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;
    struct verdict verdict;
    int length = 0;

    clear_ac();
    if (!is_page_fault(info)) {
        if (delivering)
            end(reg, (uint64_t)(uintptr_t)info->si_addr, DELIVERY, (uint64_t)delivering - 1);
        if (!have_traps || info->si_code <= 0 || reg[REG_TRAPNO] == PAGE_FAULT)
            die();
        on_trap(sig, info, context);
        return;
    }
    if (++depth > 2)
        die();
    struct fault fault = {(uint64_t)(uintptr_t)info->si_addr, (uint64_t)reg[REG_ERR], (uint64_t)reg[REG_RIP],
                          (uint64_t)reg[REG_RSP], 0};
    if (fault.error & PF_WRITE && depth == 1)
        length = decode_store(reg, fault.address, &fault.value);
    if (length)
        fault.error |= STORE;
    if (delivering)
        fault.error |= DELIVERY | VECTOR(delivering - 1);
    if (talk(SYS_sendto, &fault, sizeof fault) != sizeof fault)
        die();
    if (talk(SYS_recvfrom, &verdict, sizeof verdict) != sizeof verdict) /* 0: the hypervisor hung up */
        die();
    if (verdict.what == BOUNCE && depth == 1)
        enter(reg, verdict.handler, verdict.error, 1);
    else if (verdict.what == SKIP && length)
        reg[REG_RIP] += length;
    else if (verdict.what != RETRY)
        die();
    depth--;
}

/* Before the lock, which keeps the handler what it is. On a stack of its own, since the guest's may be what is missing. */
long fault_install(uint64_t begin, uint64_t bytes, long sock)
{
    stack_t own = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};

    windows.begin = begin, windows.bytes = bytes, windows.sock = sock;
    sigfillset(&action.sa_mask);
    sigdelset(&action.sa_mask, SIGSEGV);
    return sigaltstack(&own, 0) || sigaction(SIGSEGV, &action, 0) ? -errno : 0;
}

/* The other exceptions, from here on. */
long traps_install(void)
{
    static const int signals[] = {SIGFPE, SIGILL, SIGTRAP, SIGBUS};
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_ONSTACK};

    have_traps = 1;
    sigfillset(&action.sa_mask);
    sigdelset(&action.sa_mask, SIGSEGV);
    for (unsigned i = 0; i < sizeof signals / sizeof *signals; i++)
        if (sigaction(signals[i], &action, 0))
            return -errno;
    return 0;
}
