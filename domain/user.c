/* A program's turn and its kernel's, from the kernel's side: one call gives the CPU to the program and returns with why it came
 * back. No hypercall is made here.
 *
 * The control region is the program's to write, at any time. What is used of it is copied once into `struct user`; the only
 * pointers followed are those that the host's own kernel gave before the program's first instruction: a program whose
 * registers come to lie elsewhere has moved its stack into the region, and is given up.
 *
 * The upcall's signal is blocked in a kernel for good, except here, while the program has the turn: its handler leaves the wait. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <linux/futex.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "ring1_user.h"

struct context { /* the host's struct ucontext, asm/ucontext.h and asm/sigcontext.h */
    uint64_t flags, link, stack, stack_flags, stack_bytes;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags;
    uint16_t cs, gs, fs, ss;
    uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8], sigmask;
};
_Static_assert(sizeof(struct context) == 304, "struct ucontext");
_Static_assert(offsetof(struct context, fpstate) == 224, "struct sigcontext");
enum { FP_XSTATE = 1, SIGCONTEXT_SS = 2, STRICT_RESTORE_SS = 4, SW_RESERVED = 464, XSTATE_MAGIC = 0x46505853 };
enum { R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8, RAX, RCX, RDX, RSI, RDI, ORIG_RAX, RIP, CS, EFLAGS, RSP, SS, FS_BASE, GS_BASE };

enum { FRAME_NS = 10000000, FRAME_TRIES = 10 }; /* as AGAIN_NS and AGAIN of user.py */
enum { USER_CS = 0x33, USER_SS = 0x2B, USER_FLAGS = 0x202 };

enum { TOLD_LATE = 2 }; /* of `told`: it came back by itself first, so the signal is still to come, and says nothing then */

static sigjmp_buf leave;

static void on_upcall(int sig)
{
    (void)sig;
    siglongjmp(leave, 1);
}

/* Once a kernel. The signal stays blocked. */
int32_t user_init(void)
{
    struct sigaction action = {.sa_handler = on_upcall};

    return sigaction(SIGUSR2, &action, 0) ? -errno : 0;
}

static uint32_t turn_of(const struct user *u)
{
    return __atomic_load_n(&((struct ring1_cell *)(void *)u->control)->turn, __ATOMIC_ACQUIRE);
}

/* It has given the turn away, or is gone. Any other word leaves the turn its own. */
static int is_back(const struct user *u)
{
    uint32_t turn = turn_of(u);

    return turn == RING1_TURN_KERNEL || turn == RING1_TURN_DEAD;
}

static struct context *context_of(const struct user *u)
{
    return (struct context *)(void *)(u->control + u->frame);
}

static struct ring1_call *call_of(const struct user *u)
{
    return (struct ring1_call *)(void *)(u->control + RING1_CALL_AT);
}

/* Whether the gate is to wake us. */
static uint32_t *waits_of(const struct user *u)
{
    return (uint32_t *)(void *)(u->control + RING1_WAITS_AT);
}

static void give_turn(const struct user *u, uint32_t turn)
{
    struct ring1_cell *cell = (void *)u->control;

    *waits_of(u) = 0;
    __atomic_store_n(&cell->turn, turn, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &cell->turn, FUTEX_WAKE, 1, 0, 0, 0);
}

/* Whether all that a direct call can take back was changed: its result. */
static int result_only(struct user *u)
{
    u->came_with[RAX] = u->registers[RAX];
    return !memcmp(u->came_with, u->registers, sizeof u->registers);
}

/* The program goes on with these registers, in a frame. */
static void give(struct user *u)
{
    struct ring1_cell *cell = (void *)u->control;
    struct context *c = context_of(u);
    const uint64_t *r = u->registers;

    c->flags = FP_XSTATE | SIGCONTEXT_SS | STRICT_RESTORE_SS;
    c->link = 0;
    c->stack = RING1_USER_CONTROL + 4096, c->stack_flags = 0, c->stack_bytes = RING1_CONTROL_BYTES - 4096;
    c->r8 = r[R8], c->r9 = r[R9], c->r10 = r[R10], c->r11 = r[R11], c->r12 = r[R12], c->r13 = r[R13];
    c->r14 = r[R14], c->r15 = r[R15], c->rdi = r[RDI], c->rsi = r[RSI], c->rbp = r[RBP], c->rbx = r[RBX];
    c->rdx = r[RDX], c->rax = r[RAX], c->rcx = r[RCX], c->rsp = r[RSP], c->rip = r[RIP], c->eflags = r[EFLAGS];
    c->cs = (uint16_t)r[CS], c->ss = (uint16_t)r[SS];
    c->fpstate = RING1_USER_CONTROL + u->fpu;
    c->sigmask = 0;
    cell->fs_base = r[FS_BASE] >> 47 ? 0 : r[FS_BASE];
    cell->gs_base = r[GS_BASE] >> 47 ? 0 : r[GS_BASE];
    give_turn(u, RING1_TURN_PROGRAM);
}

/* A system call, with its arguments in these registers. */
static int32_t called(struct user *u, uint64_t number, uint32_t arch)
{
    uint64_t *r = u->registers;

    r[ORIG_RAX] = u->number = (uint32_t)number;
    u->native = arch == RING1_ARCH_X86_64 && !(number & RING1_X32_BIT);
    if (arch == RING1_ARCH_X86_64) {
        memcpy(u->arguments, (uint64_t[6]){r[RDI], r[RSI], r[RDX], r[R10], r[R8], r[R9]}, sizeof u->arguments);
    } else {
        uint64_t a[6] = {r[RBX], r[RCX], r[RDX], r[RSI], r[RDI], r[RBP]};

        for (int i = 0; i < 6; i++)
            u->arguments[i] = (uint32_t)a[i];
    }
    return USER_SYSCALL;
}

/* A direct call, which is a system call of x86-64's table. What the entry did not keep is as `syscall` leaves it. */
static int32_t take_call(struct user *u, const struct ring1_cell *cell)
{
    struct ring1_call call;
    uint64_t *r = u->registers;

    memcpy(&call, call_of(u), sizeof call);
    __asm__ volatile("" : : : "memory");
    memcpy(r, &call, offsetof(struct ring1_call, rsp));
    r[RSP] = call.rsp, r[RIP] = call.rcx, r[EFLAGS] = r[R11] = USER_FLAGS, r[CS] = USER_CS, r[SS] = USER_SS;
    r[FS_BASE] = cell->fs_base, r[GS_BASE] = cell->gs_base;
    u->traps++;
    if (u->told)
        u->told = TOLD_LATE;
    u->direct = 1;
    called(u, call.rax, RING1_ARCH_X86_64);
    memcpy(u->came_with, r, sizeof u->came_with);
    return USER_SYSCALL;
}
_Static_assert(offsetof(struct ring1_call, rsp) == ORIG_RAX * 8, "struct user_regs_struct");

/* Why it came back, from one copy of the cell and of the registers. */
static int32_t take(struct user *u)
{
    struct ring1_cell cell;
    struct context c;
    uint64_t *r = u->registers;

    memcpy(&cell, u->control, sizeof cell);
    __asm__ volatile("" : : : "memory");
    if (!cell.signal)
        return take_call(u, &cell);
    memcpy(&c, context_of(u), sizeof c);
    __asm__ volatile("" : : : "memory");
    if (cell.frame != RING1_USER_CONTROL + u->frame || c.fpstate != RING1_USER_CONTROL + u->fpu)
        return USER_DEAD;
    r[R8] = c.r8, r[R9] = c.r9, r[R10] = c.r10, r[R11] = c.r11, r[R12] = c.r12, r[R13] = c.r13, r[R14] = c.r14;
    r[R15] = c.r15, r[RDI] = c.rdi, r[RSI] = c.rsi, r[RBP] = c.rbp, r[RBX] = c.rbx, r[RDX] = c.rdx, r[RAX] = c.rax;
    r[RCX] = c.rcx, r[RSP] = c.rsp, r[RIP] = c.rip, r[EFLAGS] = c.eflags, r[CS] = c.cs, r[SS] = c.ss;
    r[FS_BASE] = cell.fs_base, r[GS_BASE] = cell.gs_base, r[ORIG_RAX] = UINT64_MAX;
    u->traps++;
    if (cell.signal == SIGUSR1) {
        int late = u->told == TOLD_LATE;

        u->told = 0;
        return late ? USER_STALE : USER_TIMEOUT;
    }
    if (u->told)
        u->told = TOLD_LATE;
    if (cell.signal != SIGSYS) {
        u->vector = (uint32_t)cell.vector, u->error = cell.error, u->address = cell.address;
        return u->vector == 14 ? USER_FAULT : USER_EXCEPTION;
    }
    return called(u, cell.number, cell.arch);
}

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* Until it is the kernel's turn: 1; 0: not within `ns` (-1: no end), however often the program wakes us for nothing. A word that the
 * host finds no page for is mapped by reading it. */
static int wait_turn(const struct user *u, int64_t ns)
{
    int64_t end = ns < 0 ? 0 : now_ns() + ns;
    uint32_t turn;

    __atomic_store_n(waits_of(u), 1, __ATOMIC_SEQ_CST);
    while ((turn = turn_of(u)) != RING1_TURN_KERNEL && turn != RING1_TURN_DEAD) {
        struct timespec left = {ns / 1000000000, ns % 1000000000};

        syscall(SYS_futex, u->control, FUTEX_WAIT, turn, ns < 0 ? 0 : &left, 0, 0);
        if (ns >= 0 && (ns = end - now_ns()) <= 0)
            return turn_of(u) == RING1_TURN_KERNEL;
    }
    return 1;
}

static int32_t why(struct user *u)
{
    return turn_of(u) == RING1_TURN_DEAD ? USER_DEAD : take(u);
}

/* After its creation: where the host puts the registers, and those of the vector unit as a program finds them. */
int32_t user_begin(struct user *u, int64_t ns)
{
    const struct ring1_cell *cell = (const void *)u->control;
    uint64_t frame, fpu, bytes;
    uint32_t magic;

    if (!wait_turn(u, ns) || turn_of(u) == RING1_TURN_DEAD)
        return USER_DEAD;
    frame = cell->frame - RING1_USER_CONTROL;
    if (frame >= RING1_CONTROL_BYTES - sizeof(struct context))
        return USER_DEAD;
    u->frame = frame;
    fpu = context_of(u)->fpstate - RING1_USER_CONTROL;
    if (fpu >= RING1_CONTROL_BYTES - 512)
        return USER_DEAD;
    memcpy(&magic, u->control + fpu + SW_RESERVED, sizeof magic);
    bytes = 512;
    if (magic == XSTATE_MAGIC)
        memcpy(&bytes, u->control + fpu + SW_RESERVED + 4, 4);
    if (bytes > RING1_CONTROL_BYTES - fpu)
        return USER_DEAD;
    u->fpu = fpu, u->fpu_bytes = (uint32_t)bytes;
    return take(u);
}

/* The other half of a USER_LATE: wait for a program that was told to come back. */
int32_t user_wait(struct user *u, int64_t ns)
{
    if (!wait_turn(u, ns))
        return USER_LATE;
    return why(u);
}

/* Of a program in a direct call: that it has a frame, where all its registers can be changed. It costs a signal of the host's. */
int32_t user_frame(struct user *u)
{
    struct ring1_cell cell;

    if (!u->direct)
        return 0;
    u->direct = 0, u->lost = 1;
    give_turn(u, RING1_TURN_FRAME);
    for (int i = 0; !wait_turn(u, FRAME_NS); i++)
        if (i == FRAME_TRIES)
            return USER_DEAD;
    memcpy(&cell, u->control, sizeof cell);
    if (turn_of(u) == RING1_TURN_DEAD || cell.signal != SIGILL || cell.frame != RING1_USER_CONTROL + u->frame)
        return USER_DEAD;
    u->lost = 0;
    return 0;
}

/* It goes on where it called, if all it is to have is a result; else in a frame. 0, or USER_DEAD. */
static int32_t resume(struct user *u)
{
    if (u->direct && result_only(u)) {
        u->direct = 0;
        call_of(u)->rax = u->registers[RAX];
        give_turn(u, RING1_TURN_PROGRAM);
        return 0;
    }
    if (user_frame(u))
        return USER_DEAD;
    give(u);
    return 0;
}

static int32_t run_once(struct user *u, int64_t ns)
{
    sigset_t upcall;
    int came;

    if (u->lost || turn_of(u) == RING1_TURN_DEAD)
        return USER_DEAD;
    sigemptyset(&upcall);
    sigaddset(&upcall, SIGUSR2);
    if (upcall_unmask(u->shared_info)) {
        upcall_mask(u->shared_info);
        sigtimedwait(&upcall, 0, &(struct timespec){0, 0}); /* said: it need not end the next wait for nothing */
        return USER_UPCALL;
    }
    u->upcall = 0;
    if (sigsetjmp(leave, 0)) { /* the signal is blocked again: its handler was entered, and is not returned from */
        u->upcall = 1;
        came = is_back(u);
    } else {
        if (resume(u)) {
            upcall_mask(u->shared_info);
            return USER_DEAD;
        }
        came = is_back(u); /* on our CPU it has been on meanwhile: the wake-up was its turn */
        if (!came) {
            sigprocmask(SIG_UNBLOCK, &upcall, 0);
            came = wait_turn(u, ns);
            sigprocmask(SIG_BLOCK, &upcall, 0);
        }
    }
    upcall_mask(u->shared_info);
    return came ? why(u) : USER_LATE;
}

/* Let the program go on for `ns` at most (-1: without end). USER_LATE: it has the turn still, and must be told to give it back,
 * because its time is over (u->upcall 0) or something is pending (1). */
int32_t user_run(struct user *u, int64_t ns)
{
    int32_t kind;

    do
        kind = run_once(u, ns);
    while (kind == USER_STALE);
    return kind;
}
