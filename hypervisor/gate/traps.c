/* The hypervisor's entry code: the handler of every signal that the host kernel makes of an exception, in a domain's process, and
 * of the upcall signal.
 *
 * A page fault goes to the hypervisor (fault.c). Every other exception goes straight to the guest's own handler, with what the
 * hardware would push: no message, no other process. Which handler says struct ring1_traps, a page of the top 64 MB that the
 * hypervisor alone can write, and only what it found good stands there; one word says all of one handler, so that a table that is
 * changed meanwhile gives the old one or the new one. What cannot be delivered ends the domain, with a reason.
 *
 * The registers of the interrupted code, vector and error code are the host kernel's, in the signal frame; rt_sigreturn
 * continues in the guest's handler, and the guest's iretq ends that. */
#define _GNU_SOURCE
#include <errno.h>

#include "entry.h"

enum { TRAP_FLAG = 0x100, DIRECTION_FLAG = 0x400, NESTED_FLAG = 0x4000, RESUME_FLAG = 0x10000, ALIGN_FLAG = 0x40000 };
enum { OVERFLOW = RING1_VECTOR_OVERFLOW, PROTECTION = RING1_VECTOR_GENERAL_PROTECTION, PAGE_FAULT = RING1_VECTOR_PAGE_FAULT };
#define PUSHES_ERROR_CODE 0x60227d00u /* vectors 8, 10 to 14, 17, 21, 29, 30 */
#define IDT 2u                      /* of an error code: its selector is a vector */
enum { COMPATIBLE_CS = 0x23 };      /* Linux's, of 32-bit code */
enum { CANONICAL_BITS = 47 };
enum { STACK_BYTES = 64 << 10 }; /* the signal frame holds the vector registers too: up to 11 KiB of them with AMX */
#define ADDRESS ((1ull << RING1_TI_SHIFT) - 1)
#define FLAG(word, flag) ((word) >> RING1_TI_SHIFT & (flag))

/* Constants, and not variables, which the guest could write. */
#define TRAPS ((const volatile struct ring1_traps *)(RING1_KERNEL_WINDOW + RING1_TRAP_TABLE))
#define VCPU (&((struct shared_info *)(RING1_KERNEL_WINDOW + RING1_SHARED_INFO))->vcpu_info[0])
_Static_assert(sizeof(struct ring1_traps) <= RING1_PAGE_SIZE, "one page");

static char stack[STACK_BYTES] __attribute__((aligned(64)));
volatile int entry_depth;
volatile struct entry entry_at;

/* What the hardware clears when it delivers, and the host kernel does not: the alignment check is none of ring 0, and an iretq
 * with NT set is a task switch of old. */
static void as_ring0(void)
{
    __builtin_ia32_writeeflags_u64(__builtin_ia32_readeflags_u64() & ~(uint64_t)(ALIGN_FLAG | NESTED_FLAG));
}

/* Where no frame may lie: beyond the addresses of a process (the push would be a fault of another kind), in the hypervisor's
 * area, be it shared_info, and in what we run on ourselves. */
static int is_no_stack(uint64_t at)
{
    return at >> CANONICAL_BITS || at - (uint64_t)(uintptr_t)stack < sizeof stack ||
           (at - RING1_KERNEL_WINDOW < RING1_NR_WINDOWS * RING1_SPACE_BYTES &&
            (at - RING1_KERNEL_WINDOW) % RING1_SPACE_BYTES >= RING1_HYPERVISOR_VIRT_START);
}

/* As an interrupt does it: the frame below `top`, at an address that is a multiple of 16. A page of the stack that is not there
 * is filled by a second one of us, or it is a double fault. */
void enter(greg_t *reg, uint64_t top, uint64_t word, int has_error, uint64_t error)
{
    volatile struct ring1_exception_frame *frame = (struct ring1_exception_frame *)(top & ~(uint64_t)15) - 1;
    uint64_t selectors = (uint64_t)reg[REG_CSGSFS]; /* cs, gs, fs, ss: 16 bits each */
    uint64_t masked = __atomic_load_n(&VCPU->evtchn_upcall_mask, __ATOMIC_SEQ_CST);
    uint16_t cs, ss;

    if (is_no_stack((uint64_t)frame) || is_no_stack((uint64_t)(frame + 1) - 1))
        entry_ends((uint64_t)frame, RING1_PF_DELIVERY);
    if (has_error)
        frame->error = error;
    frame->rip = (uint64_t)reg[REG_RIP];
    frame->cs = (selectors & 0xffff) | masked << 32;
    frame->rflags = (uint64_t)reg[REG_EFL];
    frame->rsp = (uint64_t)reg[REG_RSP];
    frame->ss = selectors >> 48;
    if (FLAG(word, RING1_TI_MASK_EVENTS))
        __atomic_store_n(&VCPU->evtchn_upcall_mask, 1, __ATOMIC_SEQ_CST);
    __asm__("mov %%cs,%0\n mov %%ss,%1" : "=r"(cs), "=r"(ss));
    reg[REG_CSGSFS] = (greg_t)((selectors & 0xffffffff0000) | cs | (uint64_t)ss << 48);
    reg[REG_RSP] = (greg_t)(uintptr_t)(has_error ? &frame->error : &frame->rip);
    reg[REG_RIP] = (greg_t)(word & ADDRESS);
    reg[REG_EFL] &= ~(greg_t)(TRAP_FLAG | DIRECTION_FLAG | NESTED_FLAG | RESUME_FLAG | ALIGN_FLAG);
}

/* Whether the last two bytes before rip, or the first two at it, are `int $vector`. What was just run is there, or filled. */
static int is_int(const uint8_t *code, uint64_t vector) { return code[0] == 0xcd && code[1] == vector; }

/* There is no instruction that faulted, but a frame that nobody can return to. Its signs, in order: an rt_sigreturn whose frame
 * cannot be read leaves no vector (what stands there is that of an exception before), but a fault has RF set and a trap is of the
 * instruction before rip; one whose selectors or rip the processor refused has them in the context; an iretq is at rip. */
static int cannot_return(const greg_t *reg, const siginfo_t *info, uint64_t vector)
{
    const uint8_t *code = (const uint8_t *)reg[REG_RIP];
    uint16_t cs = (uint16_t)reg[REG_CSGSFS], ours;

    if (info->si_signo != SIGSEGV || info->si_code != SI_KERNEL)
        return 0;
    if (!(reg[REG_EFL] & RESUME_FLAG))
        return vector != OVERFLOW || !(is_int(code - 2, OVERFLOW) || code[-1] == 0xce);
    __asm__("mov %%cs,%0" : "=r"(ours));
    return (cs != ours && cs != COMPATIBLE_CS) || (uint64_t)reg[REG_RIP] >> CANONICAL_BITS || code[0] == 0xcf ||
           (code[0] == 0x48 && code[1] == 0xcf);
}

/* All but a page fault of the windows. */
static void exception(greg_t *reg, const siginfo_t *info)
{
    uint64_t vector = (uint64_t)reg[REG_TRAPNO], error = (uint64_t)reg[REG_ERR], top = entry_at.rsp - RING1_RED_ZONE, word;

    if (info->si_code <= 0) /* somebody sent it: ourselves, by the filter */
        entry_at.value = RING1_SENT + (uint64_t)info->si_signo;
    if (info->si_code <= 0 || vector == PAGE_FAULT)
        entry_ends((uint64_t)(uintptr_t)info->si_addr, error);
    if (cannot_return(reg, info, vector)) {
        vector = PROTECTION, error = reg[REG_EFL] & RESUME_FLAG ? error : 0;
        word = TRAPS->failsafe;
        if (word) {
            entry_at.value = RING1_FAILSAFE;
            enter(reg, TRAPS->kernel_sp ? TRAPS->kernel_sp : top, word, 1, error);
            return;
        }
    } else if (vector == PROTECTION && error & IDT && is_int((const uint8_t *)reg[REG_RIP], error >> 3 & 0xff)) {
        word = TRAPS->trap[error >> 3 & 0xff];
        if (FLAG(word, RING1_TI_DPL)) {
            entry_at.value = error >> 3 & 0xff;
            reg[REG_RIP] += 2;
            enter(reg, top, word, 0, 0);
            return;
        }
    }
    entry_at.value = vector;
    word = vector < RING1_MAX_TRAPS ? TRAPS->trap[vector] : 0;
    if (!word)
        entry_ends(0, error);
    enter(reg, top, word, vector < 32 && PUSHES_ERROR_CODE >> vector & 1, error);
}

static void on_exception(int sig, siginfo_t *info, void *context)
{
    greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;

    (void)sig;
    as_ring0();
    if (++entry_depth == 1)
        entry_at = (struct entry){(uint64_t)reg[REG_TRAPNO], (uint64_t)reg[REG_RIP], (uint64_t)reg[REG_RSP]};
    if (entry_depth <= 2 && is_page_fault(info))
        page_fault(reg, (uint64_t)(uintptr_t)info->si_addr);
    else if (entry_depth == 1)
        exception(reg, info);
    else
        entry_ends((uint64_t)(uintptr_t)info->si_addr, RING1_PF_DELIVERY);
    entry_depth--;
}

/* The upcall, in a kernel that has unblocked the signal: an interrupt, if it would take one. If not, it looks once it unmasks. */
static void on_upcall(int sig, siginfo_t *info, void *context)
{
    greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;
    uint64_t word = TRAPS->event;

    (void)sig, (void)info;
    as_ring0();
    if (!word || __atomic_load_n(&VCPU->evtchn_upcall_mask, __ATOMIC_SEQ_CST) ||
        !__atomic_load_n(&VCPU->evtchn_upcall_pending, __ATOMIC_SEQ_CST))
        return;
    entry_depth++;
    entry_at = (struct entry){RING1_EVENT, (uint64_t)reg[REG_RIP], (uint64_t)reg[REG_RSP]};
    enter(reg, entry_at.rsp - RING1_RED_ZONE, word, 0, 0);
    entry_depth--;
}

/* Before the lock, which keeps the handlers what they are. On a stack of our own, since the guest's may be what is missing. */
long traps_install(uint64_t begin, uint64_t bytes, long sock)
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
    stack_t own = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_sigaction = on_exception, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};

    tell_of_faults(begin, bytes, sock);
    if (sigaltstack(&own, 0))
        return -errno;
    sigfillset(&action.sa_mask);
    sigdelset(&action.sa_mask, SIGSEGV);
    for (unsigned i = 0; i < sizeof signals / sizeof *signals; i++)
        if (sigaction(signals[i], &action, 0))
            return -errno;
    action.sa_sigaction = on_upcall;
    action.sa_flags |= SA_RESTART; /* whatever call it interrupts is made again, if the host ever makes it again */
    return sigaction(RING1_UPCALL_SIGNAL, &action, 0) ? -errno : 0;
}
