/* The entry code of page faults.
 *
 * An access that the host kernel refuses in the windows is told to the hypervisor over a socket, with what the hardware says
 * of it (in 2003: the hypervisor read CR2). It maps what the guest's tables allow, and the access runs again; or it says
 * that the guest's own handler is to be entered (traps.c); or it has done what a store to a page table asked for (vm_assist),
 * and the access is skipped. rt_sigreturn restores the signal mask on every way out, so a fault in the guest's handler is an
 * ordinary one.
 *
 * A second fault, of ourselves, is filled or ends the domain: it says so to the hypervisor, with what the first one was at. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include "entry.h"

static struct {
    uint64_t begin, bytes;
    long sock;
} windows;

void tell_of_faults(uint64_t begin, uint64_t bytes, long sock)
{
    windows.begin = begin, windows.bytes = bytes, windows.sock = sock;
}

/* SIGSEGV while SIGSEGV is blocked: the host kernel kills with it, as if there were no handler. The filter leaves us no way
 * to take the handler back. */
static _Noreturn void die(void)
{
    uint64_t set = 1ull << (SIGSEGV - 1);

    raw6(SYS_rt_sigprocmask, SIG_BLOCK, (long)&set, 0, sizeof set, 0, 0);
    for (;;)
        __asm__ volatile("hlt");
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

/* The hypervisor ends the domain, for a reason that it makes of this; whoever it is that does not, dies of SIGSEGV. */
_Noreturn void entry_ends(uint64_t address, uint64_t error)
{
    struct fault last = {address, error | RING1_PF_UNHANDLED, entry_at.rip, entry_at.rsp, entry_at.value};
    struct verdict none;

    if (talk(SYS_sendto, &last, sizeof last) == sizeof last)
        talk(SYS_recvfrom, &none, sizeof none);
    die();
}

/* Only what the host kernel's page-fault handler raised about the windows: not a privileged instruction (SI_KERNEL), not a
 * protection key, not a signal that somebody sent, whose si_addr is made of a pid and a uid. */
int is_page_fault(const siginfo_t *info)
{
    return info->si_signo == SIGSEGV && (info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR) &&
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

/* One that is_page_fault. */
void page_fault(greg_t *reg, uint64_t address)
{
    struct fault fault = {address, (uint64_t)reg[REG_ERR], entry_at.rip, entry_at.rsp, 0};
    struct verdict verdict;
    int length = 0;

    if (entry_depth > 1)
        fault.error |= RING1_PF_DELIVERY, fault.value = entry_at.value;
    else if (fault.error & RING1_PF_WRITE)
        length = decode_store(reg, fault.address, &fault.value);
    if (length)
        fault.error |= RING1_PF_STORE;
    if (talk(SYS_sendto, &fault, sizeof fault) != sizeof fault)
        die();
    if (talk(SYS_recvfrom, &verdict, sizeof verdict) != sizeof verdict) /* 0: the hypervisor hung up */
        die();
    if (verdict.what == RING1_BOUNCE && entry_depth == 1)
        enter(reg, entry_at.rsp - RING1_RED_ZONE, verdict.word, 1, verdict.error);
    else if (verdict.what == RING1_SKIP && length)
        reg[REG_RIP] += length;
    else if (verdict.what != RING1_RETRY)
        die();
}
