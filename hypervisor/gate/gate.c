/* The gate's C half: raw calls, the stackless monitor, fork into the hypervisor's arms, what locks a process.
 *
 * Everything here runs once in a process's life, except raw6 and the monitor's loop. */
#define _GNU_SOURCE
#include <Python.h>
#include <errno.h>
#include <malloc.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>

#include "gate.h"

#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_restrict_self 446
#endif

long raw6(long nr, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long ret;

    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return ret;
}

/* ---- the monitor ---------------------------------------------------------------------------------------------
 * A task in the domain's address space with descriptors, handlers and a filter of its own. It uses registers only:
 * the guest may write every other byte of this space. r12 = command page, r13 = socket.
 * One datagram in: run the batch. One out: 4 + errno bytes, whose first four are the number of commands NOT tried,
 * taken from a constant table, so that the hypervisor's shadow stays exact without a stack. */
_Static_assert(GATE_COMMAND_BYTES == 56 && GATE_COMMAND_HEADER == 64, "the monitor's loop has these in its code");
_Static_assert(GATE_TABLE == 0x1000, "and this");

extern const char monitor_begin[], monitor_end[];
__asm__(".text\n"
        ".globl monitor_begin\n.globl monitor_end\n"
        ".hidden monitor_begin\n.hidden monitor_end\n"
        "monitor_begin:\n" MONITOR_LOOP
        "monitor_end:\n");

long monitor_code(char *page, long size)
{
    long n = monitor_end - monitor_begin;

    if (n > size)
        return -ENOSPC;
    memcpy(page, monitor_begin, (size_t)n);
    return n;
}

/* CLONE_VM without FILES, SIGHAND, THREAD: own descriptors, handlers, filter. CLONE_PARENT: the hypervisor reaps it.
 * All signals stay blocked in it for good: a handler run there would use the guest's stack. */
long monitor_spawn(uint64_t code, uint64_t commands, long sock)
{
    sigset_t all, old;
    long ret;
    register uint64_t r12 __asm__("r12") = commands;
    register long r13 __asm__("r13") = sock;
    register uint64_t r14 __asm__("r14") = code;
    register long r10 __asm__("r10") = 0, r8 __asm__("r8") = 0;

    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &old);
    r12 = commands, r13 = sock, r14 = code, r10 = 0, r8 = 0;
    __asm__ volatile("syscall\n test %%rax,%%rax\n jnz 1f\n jmp *%%r14\n 1:"
                     : "=a"(ret)
                     : "a"((long)SYS_clone), "D"((long)(CLONE_VM | CLONE_PARENT | CLONE_UNTRACED | SIGCHLD)), "S"(0L),
                       "d"(0L), "r"(r10), "r"(r8), "r"(r12), "r"(r13), "r"(r14)
                     : "rcx", "r11", "memory");
    sigprocmask(SIG_SETMASK, &old, 0);
    return ret;
}

/* ---- processes ---------------------------------------------------------------------------------------------- */

/* fork whose child belongs to OUR parent: the hypervisor is every domain's parent, not the zygote. As glibc's fork, and
 * CLONE_PARENT; PR_GET_TID_ADDRESS names glibc's own tid cell, so that its cached thread id is right in the child. */
long fork_to_parent(void)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    int *tid = 0;
    long pid;

    if (prctl(PR_GET_TID_ADDRESS, &tid, 0, 0, 0) != 0)
        tid = 0;
    PyOS_BeforeFork();
    pid = raw6(SYS_clone, CLONE_PARENT | SIGCHLD | (tid ? CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID : 0), 0, 0,
               (long)tid, 0, 0);
    if (pid == 0)
        PyOS_AfterFork_Child();
    else
        PyOS_AfterFork_Parent();
    PyGILState_Release(gil);
    return pid;
}

/* A locked domain has no mmap: the interpreter's arenas come from malloc, malloc from brk. Arenas made before are not
 * malloc's to free: they stay (a forked domain shares them with its zygote anyway). */
static char *heap_floor;

static void *arena_alloc(void *ctx, size_t size)
{
    (void)ctx;
    return aligned_alloc(4096, (size + 4095) & ~(size_t)4095);
}

static void arena_free(void *ctx, void *p, size_t size)
{
    (void)ctx;
    (void)size;
    if ((char *)p >= heap_floor && (char *)p < (char *)sbrk(0))
        free(p);
}

void brk_heap_only(void)
{
    static PyObjectArenaAllocator arenas = {0, arena_alloc, arena_free};

    mallopt(M_MMAP_MAX, 0);
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_TOP_PAD, 256 << 10);
    heap_floor = sbrk(0);
    PyObject_SetArenaAllocator(&arenas);
}

/* Of SIGCHLD, ends alone: a child that the scheduler stops would have its parent look for one, twice a switch. */
long open_signalfd(int sig, int fd)
{
    struct sigaction ends = {.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDSTOP};
    sigset_t set;
    int made;

    if (sig == SIGCHLD && sigaction(SIGCHLD, &ends, 0))
        return -errno;
    sigemptyset(&set);
    sigaddset(&set, sig);
    if (sigprocmask(SIG_BLOCK, &set, 0))
        return -errno;
    made = signalfd(-1, &set, SFD_NONBLOCK);
    if (made < 0)
        return -errno;
    if (fd < 0)
        return made;
    if (made != fd) {
        if (dup2(made, fd) < 0)
            return -errno;
        close(made);
    }
    return fd;
}

/* Enter a native kernel: rdi = rsi = start_info, the stack is the frame that ends its reservation (nr_pages @32 and
 * virt_base @2048 of start_info) with a return address of 0 on it, rbp 0, direction clear. It never returns: what is below
 * on this stack is the guest's to keep. Every operand has a register of its own: between them, rsp and rbp change. */
void enter_kernel(uint64_t entry, uint64_t start_info)
{
    uint64_t pages = *(uint64_t *)(start_info + 32), base = *(uint64_t *)(start_info + 2048);
    uint64_t window = *(uint64_t *)(start_info + 2056), top = window + base + pages * 4096;

    __asm__ volatile("mov %0,%%rsp\n xor %%ebp,%%ebp\n push %%rbp\n cld\n jmp *%1"
                     :
                     : "a"(top), "d"(entry), "D"(start_info), "S"(start_info)
                     : "memory");
    __builtin_unreachable();
}

/* ---- locks -------------------------------------------------------------------------------------------------- */

long install_filter(const void *program, int count)
{
    struct sock_fprog prog = {(unsigned short)count, (struct sock_filter *)(uintptr_t)program};

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return -errno;
    return raw6(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, (long)&prog, 0, 0, 0);
}

long landlock_abi(void)
{
    return raw6(SYS_landlock_create_ruleset, 0, 0, 1 /* LANDLOCK_CREATE_RULESET_VERSION */, 0, 0, 0);
}

/* Second layer where all domains share one uid: no file, no socket by name, no signal to anybody outside. What is handled (file
 * system, network, scopes), for landlock_create_ruleset; returns how many bytes of it this ABI takes. */
long landlock_rules(long abi, uint64_t *rules)
{
    rules[0] = 0x1fff, rules[1] = rules[2] = 0;
    if (abi >= 2)
        rules[0] |= 1 << 13; /* REFER */
    if (abi >= 3)
        rules[0] |= 1 << 14; /* TRUNCATE */
    if (abi >= 5)
        rules[0] |= 1 << 15; /* IOCTL_DEV */
    if (abi >= 4)
        rules[1] = 3; /* TCP bind and connect */
    if (abi >= 6)
        rules[2] = 3; /* abstract sockets, signals */
    return abi >= 6 ? 24 : abi >= 4 ? 16 : 8;
}

long landlock_all(long abi)
{
    uint64_t rules[3];
    long size = landlock_rules(abi, rules), fd, r;

    fd = raw6(SYS_landlock_create_ruleset, (long)rules, size, 0, 0, 0, 0);
    if (fd < 0)
        return fd;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return -errno;
    r = raw6(SYS_landlock_restrict_self, fd, 0, 0, 0, 0, 0);
    close((int)fd);
    return r;
}

/* Root keeps only what the hypervisor lives by; `keep` is a bit set of CAP_ numbers. */
long keep_capabilities(uint64_t keep)
{
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];

    for (int cap = 0; cap < 64; cap++)
        if (!(keep >> cap & 1) && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) && errno != EINVAL)
            return -errno;
    for (int i = 0; i < 2; i++) {
        data[i].effective = data[i].permitted = (uint32_t)(keep >> 32 * i);
        data[i].inheritable = 0;
    }
    return raw6(SYS_capset, (long)&head, (long)data, 0, 0, 0, 0);
}
