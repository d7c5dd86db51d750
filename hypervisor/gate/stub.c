/* The gate of an application's process, and the zygote that makes such processes: no library, no data, one page of code.
 *
 * The whole section is copied into a sealed file (monitor.py: stub_image), an ELF program that is loaded at RING1_USER_GATE. Run, it
 * is the zygote: an order comes in on descriptor 3, and the child that it forks, a child of the hypervisor's, shuts
 * itself in and waits until nothing is left around it but this page, its monitor's commands and the control region. From then on
 * its only thread is here or in the program:
 *
 *     program: a system call, an exception, a signal of the hypervisor's
 *       -> the host puts all registers on the stack of signals and enters on_signal
 *     on_signal: says why in the cell, gives the turn to the kernel, waits for it, returns
 *       -> rt_sigreturn loads what the kernel has made of those registers
 *
 * A program whose system calls were rewritten comes in at RING1_USER_CALL instead, without the host's 3 us of signal: see below.
 *
 * A page fault asks the hypervisor first, over a socket of its own: what the tables allow is mapped, and the kernel never hears
 * of it. What a program does to the memory that it shares with this code hurts that program. */
#define _GNU_SOURCE
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>

#include "../public/ring1_user.h"
#include "gate.h"

#pragma GCC target("general-regs-only,fsgsbase")
#pragma GCC optimize("no-tree-loop-distribute-patterns,no-jump-tables")

#define STUB __attribute__((section("stub"), used))
#define INLINE static inline __attribute__((always_inline))
enum { FD_USER_FAULT = 12 }; /* layout.py: FD_FAULT */
enum { RETRY = 0, PAGE_FAULT = 14, SYS_MSEAL = 462, SA_RESTORER_FLAG = 0x04000000, LIMIT_MSGQUEUE = 12 };
enum { FD_SOCKET = 3, FD_RO = 5, FD_COMMANDS = 7, NR_RIGHTS = 5 };
#define COMMANDS (RING1_USER_GATE + 4096) /* layout.py */
#define SIGNALS \
    (1u << SIGILL | 1u << SIGTRAP | 1u << SIGBUS | 1u << SIGFPE | 1u << SIGSEGV | 1u << SIGSYS | 1u << SIGUSR1)

struct kernel_sigaction {
    void (*handler)(int, siginfo_t *, void *);
    unsigned long flags;
    void (*restorer)(void);
    uint64_t mask;
};
_Static_assert(sizeof(struct space_order) == SPACE_ORDER_BYTES, "zygote.py packs it");

INLINE long call6(long nr, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long ret;

    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return ret;
}
#define CALL(nr, a, b, c, d) call6(nr, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)

INLINE _Noreturn void leave(int status)
{
    for (;;)
        CALL(SYS_exit_group, status, 0, 0, 0);
}

/* ---- in the process of an application */

/* 0: the hypervisor has mapped it, or says that the tables do not allow it: *error is then as they have it. */
INLINE int ask(uint64_t address, uint64_t *error, const greg_t *reg)
{
    uint64_t fault[5] = {address, *error, (uint64_t)reg[REG_RIP], (uint64_t)reg[REG_RSP], 0};
    uint32_t verdict[4] = {1, 0, 0, 0};

    if (call6(SYS_sendto, FD_USER_FAULT, (long)fault, sizeof fault, MSG_NOSIGNAL, 0, 0) != sizeof fault ||
        call6(SYS_recvfrom, FD_USER_FAULT, (long)verdict, sizeof verdict, MSG_NOSIGNAL, 0, 0) != sizeof verdict)
        leave(1);
    *error = verdict[1];
    return verdict[0] == RETRY;
}

/* The direct entry, at RING1_USER_CALL: rax is the number, rcx where to go on, r11 anybody's, all else the program's. It has no
 * stack. The turn is given at CALL_GIVEN; a kernel that wants more than rax changed asks for a frame, and gets an exception. */
enum { CALL_GIVEN = 0x80, CALL_BYTES = 0x120 };
__asm__(".pushsection stub_call,\"ax\",@progbits\n"
        "0: movabs $0x7FFC020000,%r11\n"
        "   mov %r15,64(%r11)\n mov %r14,72(%r11)\n mov %r13,80(%r11)\n mov %r12,88(%r11)\n mov %rbp,96(%r11)\n"
        "   mov %rbx,104(%r11)\n mov %r10,120(%r11)\n mov %r9,128(%r11)\n mov %r8,136(%r11)\n mov %rax,144(%r11)\n"
        "   mov %rcx,152(%r11)\n mov %rdx,160(%r11)\n mov %rsi,168(%r11)\n mov %rdi,176(%r11)\n mov %rsp,184(%r11)\n"
        "   rdfsbase %rax\n mov %rax,48(%r11)\n rdgsbase %rax\n mov %rax,56(%r11)\n"
        "   movl $0,4(%r11)\n xor %eax,%eax\n xchg %eax,(%r11)\n" /* the turn; whoever waits is looked for after it */
        "   .org 0x80,0x90\n"
        "   cmpl $0,192(%r11)\n je 1f\n"
        "   mov %r11,%rdi\n mov $1,%esi\n mov $1,%edx\n xor %r10d,%r10d\n mov $202,%eax\n syscall\n" /* FUTEX_WAKE */
        "1: movabs $0x7FFC020000,%rdi\n mov (%rdi),%eax\n test %eax,%eax\n jnz 2f\n"
        "   xor %esi,%esi\n xor %edx,%edx\n xor %r10d,%r10d\n mov $202,%eax\n syscall\n jmp 1b\n" /* FUTEX_WAIT */
        "2: cmp $1,%eax\n jne 3f\n"
        "   mov %rdi,%r11\n mov 120(%r11),%r10\n mov 144(%r11),%rax\n mov 152(%r11),%rcx\n mov 160(%r11),%rdx\n"
        "   mov 168(%r11),%rsi\n mov 176(%r11),%rdi\n jmp *%rcx\n"
        "3: cmp $3,%eax\n jne 4f\n ud2\n"
        "4: mov $231,%eax\n mov $2,%edi\n syscall\n jmp 4b\n"
        "   .org 0x120,0xcc\n"
        ".popsection\n");
_Static_assert(RING1_USER_CONTROL == 0x7FFC020000 && RING1_CALL_AT == 64 && RING1_WAITS_AT == 192 &&
                   RING1_TURN_PROGRAM == 1 && RING1_TURN_FRAME == 3 && FUTEX_WAIT == 0 && FUTEX_WAKE == 1 && SYS_futex == 202 && SYS_exit_group == 231,
               "above");

/* The CPU is to be taken away, and the program is in there. Before it has given the turn there is no need; nor while it waits; and
 * when it has the turn again, its registers are those that it would go on with. 1: return at once. */
INLINE int in_call(greg_t *reg, const struct ring1_cell *cell)
{
    const struct ring1_call *call = (const struct ring1_call *)(RING1_USER_CONTROL + RING1_CALL_AT);
    uint64_t at = (uint64_t)reg[REG_RIP] - RING1_USER_CALL;

    if (at >= CALL_BYTES)
        return 0;
    if (at < CALL_GIVEN || __atomic_load_n(&cell->turn, __ATOMIC_ACQUIRE) != RING1_TURN_PROGRAM)
        return 1;
    reg[REG_R10] = (greg_t)call->r10, reg[REG_RAX] = (greg_t)call->rax, reg[REG_RDX] = (greg_t)call->rdx;
    reg[REG_RSI] = (greg_t)call->rsi, reg[REG_RDI] = (greg_t)call->rdi;
    reg[REG_RIP] = reg[REG_RCX] = (greg_t)call->rcx;
    return 0;
}

STUB static void on_signal(int sig, siginfo_t *info, void *context)
{
    ucontext_t *c = context;
    greg_t *reg = c->uc_mcontext.gregs;
    struct ring1_cell *cell = (struct ring1_cell *)RING1_USER_CONTROL;
    uint64_t error = (uint64_t)reg[REG_ERR];

    if (sig == SIGSEGV && info->si_code > 0 && reg[REG_TRAPNO] == PAGE_FAULT &&
        ask((uint64_t)reg[REG_CR2], &error, reg))
        return;
    if (sig == SIGUSR1 && in_call(reg, cell))
        return;
    cell->signal = (uint32_t)sig;
    if (sig == SIGSYS) {
        cell->number = (uint64_t)(uint32_t)info->si_syscall;
        cell->arch = info->si_arch;
    } else {
        cell->vector = (uint64_t)reg[REG_TRAPNO];
        cell->error = (uint32_t)error;
        cell->address = (uint64_t)reg[REG_CR2];
    }
    cell->frame = (uint64_t)(uintptr_t)c;
    cell->fs_base = __builtin_ia32_rdfsbase64();
    cell->gs_base = __builtin_ia32_rdgsbase64();
    __atomic_exchange_n(&cell->turn, RING1_TURN_KERNEL, __ATOMIC_SEQ_CST);
    if (*(volatile uint32_t *)(RING1_USER_CONTROL + RING1_WAITS_AT))
        CALL(SYS_futex, &cell->turn, FUTEX_WAKE, 1, 0);
    while (__atomic_load_n(&cell->turn, __ATOMIC_ACQUIRE) == RING1_TURN_KERNEL)
        CALL(SYS_futex, &cell->turn, FUTEX_WAIT, RING1_TURN_KERNEL, 0);
    if (cell->turn != RING1_TURN_PROGRAM)
        leave(2);
    __builtin_ia32_wrfsbase64(cell->fs_base);
    __builtin_ia32_wrgsbase64(cell->gs_base);
}

/* Its entry, its exit, and its beginning: without a stack, and having said so (what it was born on is unmapped then), it waits for
 * the word that all is mapped, then raises an exception, so that its first registers, too, are where the kernel finds them. */
void stub_restore(void);
_Noreturn void stub_begin(void);
void stub_zygote_entry(void);
__asm__(".pushsection stub,\"ax\",@progbits\n"
        ".hidden stub_restore\n.globl stub_restore\n.hidden stub_begin\n.globl stub_begin\n"
        ".hidden stub_zygote_entry\n.globl stub_zygote_entry\n"
        "stub_restore: mov $15,%eax\n syscall\n"
        "stub_begin: lea stub_restore(%rip),%rsi\n mov $44,%eax\n mov $12,%edi\n mov $40,%edx\n mov $0x4000,%r10d\n"
        "   xor %r8d,%r8d\n xor %r9d,%r9d\n syscall\n" /* sendto: 40 bytes of no meaning, which the filter lets through */
        "   mov $45,%eax\n mov $12,%edi\n xor %esi,%esi\n xor %edx,%edx\n mov $0x4000,%r10d\n xor %r8d,%r8d\n"
        "   xor %r9d,%r9d\n syscall\n" /* recvfrom */
        "   xor %esp,%esp\n" /* of its own stack it has none: the signal's is entered at its top, here and ever after */
        "   ud2\n"
        "stub_zygote_entry: xor %ebp,%ebp\n and $-16,%rsp\n call stub_zygote\n ud2\n"
        ".popsection\n");
_Static_assert(FD_USER_FAULT == 12 && MSG_NOSIGNAL == 0x4000, "above");

/* ---- from fork to locked: gate/boot.py says why in this order */

#define MUST(what, status)  \
    do {                    \
        if ((what) < 0)     \
            leave(status);  \
    } while (0)

/* Descriptors come in order from 4 on; each moves down to its number, and nothing else stays open. */
INLINE void place_descriptors(void)
{
    for (int i = 0; i < NR_RIGHTS; i++) {
        int to = i < 3 ? FD_SOCKET + i : i == 3 ? FD_COMMANDS : FD_USER_FAULT;

        if (to != 4 + i)
            MUST(CALL(SYS_dup3, 4 + i, to, 0, 0), 71);
    }
    CALL(SYS_close_range, 0, FD_SOCKET - 1, 0, 0);
    CALL(SYS_close_range, FD_RO + 1, FD_COMMANDS - 1, 0, 0);
    CALL(SYS_close_range, FD_COMMANDS + 1, FD_USER_FAULT - 1, 0, 0);
    CALL(SYS_close_range, FD_USER_FAULT + 1, ~0u, 0, 0);
}

INLINE void become(const struct space_order *o)
{
    if (o->uid >= 0) {
        MUST(CALL(SYS_setgroups, 0, 0, 0, 0), 72);
        MUST(CALL(SYS_setresgid, o->uid, o->uid, o->uid, 0), 72);
        MUST(CALL(SYS_setresuid, o->uid, o->uid, o->uid, 0), 72);
    }
    MUST(CALL(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0), 73);
    if (CALL(SYS_getppid, 0, 0, 0, 0) != o->parent)
        leave(80);
    MUST(CALL(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0), 73);
    CALL(SYS_prctl, PR_SET_NAME, o->name, 0, 0);
}

INLINE void limit(void)
{
    uint64_t none[2] = {0, 0};

    for (int what = 0; what < 16; what++)
        if (1 << what & (1 << RLIMIT_DATA | 1 << RLIMIT_CORE | 1 << RLIMIT_MEMLOCK | 1 << LIMIT_MSGQUEUE))
            CALL(SYS_setrlimit, what, none, 0, 0);
}

INLINE void spawn_monitor(void)
{
    long pid;
    register uint64_t r12 __asm__("r12") = COMMANDS;
    register long r13 __asm__("r13") = FD_SOCKET;
    register long r10 __asm__("r10") = 0, r8 __asm__("r8") = 0;

    __asm__ volatile("syscall\n test %%rax,%%rax\n jz monitor_in_stub\n"
                     : "=a"(pid)
                     : "a"((long)SYS_clone), "D"((long)(CLONE_VM | CLONE_PARENT | CLONE_UNTRACED | SIGCHLD)), "S"(0L),
                       "d"(0L), "r"(r10), "r"(r8), "r"(r12), "r"(r13)
                     : "rcx", "r11", "memory");
    MUST(pid, 74);
    MUST(CALL(SYS_sendto, FD_SOCKET, &pid, sizeof pid, MSG_NOSIGNAL), 74);
}
__asm__(".pushsection stub,\"ax\",@progbits\n.hidden monitor_in_stub\n.globl monitor_in_stub\n"
        "monitor_in_stub:\n" MONITOR_LOOP ".popsection\n");

INLINE void install_handlers(void)
{
    struct kernel_sigaction action = {on_signal, SA_SIGINFO | SA_ONSTACK | SA_RESTORER_FLAG, stub_restore, ~0ull};
    stack_t stack = {.ss_sp = (void *)(RING1_USER_CONTROL + 4096), .ss_flags = 0, .ss_size = RING1_CONTROL_BYTES - 4096};

    for (int sig = 1; sig < 32; sig++)
        if (SIGNALS >> sig & 1)
            MUST(CALL(SYS_rt_sigaction, sig, &action, 0, 8), 75);
    MUST(CALL(SYS_sigaltstack, &stack, 0, 0, 0), 75);
}

INLINE void lock(const struct space_order *o)
{
    struct sock_fprog program = {(unsigned short)o->nr_filter, (struct sock_filter *)(uintptr_t)o->filter};
    long fd;

    MUST(CALL(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0), 76);
    if (o->landlock_bytes) {
        MUST(fd = CALL(SYS_landlock_create_ruleset_, o->landlock, o->landlock_bytes, 0, 0), 77);
        MUST(CALL(SYS_landlock_restrict_self_, fd, 0, 0, 0), 77);
        CALL(SYS_close, fd, 0, 0, 0);
    }
    if (o->nr_filter)
        MUST(CALL(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program, 0), 78);
}

INLINE _Noreturn void be_born(const struct space_order *o)
{
    uint64_t all = ~0ull, none = 0;

    place_descriptors();
    become(o);
    if (call6(SYS_mmap, COMMANDS, 4 * 4096, PROT_READ, MAP_SHARED | MAP_FIXED_NOREPLACE, FD_COMMANDS, 0) != (long)COMMANDS)
        leave(79);
    CALL(SYS_MSEAL, COMMANDS, 4 * 4096, 0, 0);
    CALL(SYS_MSEAL, RING1_USER_GATE, 4096, 0, 0);
    limit();
    CALL(SYS_rt_sigprocmask, SIG_SETMASK, &all, 0, 8);
    spawn_monitor();
    CALL(SYS_close_range, 0, FD_USER_FAULT - 1, 0, 0);
    install_handlers();
    CALL(SYS_rt_sigprocmask, SIG_SETMASK, &none, 0, 8);
    lock(o);
    stub_begin();
}

/* One order, one child; the descriptors that came with it go again. */
STUB static _Noreturn void stub_zygote(void)
{
    struct space_order order;
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(NR_RIGHTS * sizeof(int))];
    } rights;

    CALL(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0);
    CALL(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0);
    for (;;) {
        struct iovec part = {&order, sizeof order};
        struct msghdr message = {0, 0, &part, 1, &rights, sizeof rights, 0};
        long pid;

        if (CALL(SYS_recvmsg, FD_SOCKET, &message, 0, 0) != sizeof order || message.msg_controllen != sizeof rights)
            leave(0);
        pid = call6(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0, 0);
        if (!pid)
            be_born(&order);
        CALL(SYS_sendto, FD_SOCKET, &pid, sizeof pid, MSG_NOSIGNAL);
        CALL(SYS_close_range, FD_SOCKET + 1, ~0u, 0, 0);
    }
}

/* ---- the page, as the hypervisor gets it */

extern const char __start_stub[], __stop_stub[], __start_stub_call[], __stop_stub_call[];

/* Where the program begins in it, or minus the bytes that it has, which are too many. */
long stub_code(char *page)
{
    const char *entry = (const char *)(uintptr_t)stub_zygote_entry;
    long n = __stop_stub - __start_stub, call = RING1_USER_CALL - RING1_USER_GATE;

    if (n > call)
        return -n;
    for (long i = 0; i < n; i++)
        page[i] = __start_stub[i];
    for (long i = 0; i < __stop_stub_call - __start_stub_call; i++)
        page[call + i] = __start_stub_call[i];
    return entry - __start_stub;
}
_Static_assert(RING1_USER_CALL + CALL_BYTES <= RING1_USER_GATE + 4096, "one page");
