/* Memory whose every read is seen. A region is without access; a touch faults, is noted with its bytes, and runs as a single
 * step with the region open. An attacker who is always in time changes what was read right after its first read.
 *
 * Code that is watched is compiled with general registers only, so that a read's width is that of a plain instruction, and
 * with the memcpy below, which reads each byte once. Reads of an exchange (lock cmpxchg) come as writes: what they saw is
 * what they decided on. */
#ifndef PROOF_TRAP_H
#define PROOF_TRAP_H

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

enum { REGIONS = 8, REGION_BYTES = 4096, TRAP_FLAG = 0x100, WRITE_FAULT = 2 };

static struct region {
    uint8_t *at;
    uint32_t header; /* the first `header` bytes may be read once a call, the others once at all */
    uint32_t judged; /* bytes from here on are data: moved, never believed, read as often as anybody likes */
    uint8_t mask;    /* which bytes of every eight the attacker changes: bit 0 the first */
    uint8_t reads[REGION_BYTES], changed[REGION_BYTES];
} regions[REGIONS];
static uint32_t nr_regions;
static int trapping, attacking;
static uint32_t nr_reads, nr_twice, limit; /* `limit`: reads of a header byte that this call may do */

static struct { /* the access under way */
    struct region *region;
    uint32_t offset, width;
    int write;
} now;

static void give_up(const char *what, const uint8_t *code)
{
    dprintf(2, "trap: %s: %02x %02x %02x %02x\n", what, code[0], code[1], code[2], code[3]);
    _exit(3);
}

/* Bytes that the instruction at `code` reads or writes of memory. */
static uint32_t width_of(const uint8_t *code)
{
    const uint8_t *at = code;
    uint32_t full = 4;

    for (; *at == 0x66 || *at == 0xf0 || *at == 0xf2 || *at == 0xf3; at++)
        if (*at == 0x66)
            full = 2;
    if ((*at & 0xf0) == 0x40)
        full = *at++ & 8 ? 8 : full;
    if (*at == 0x0f) {
        at++;
        if (*at == 0xb6 || *at == 0xbe || *at == 0xb0 || *at == 0xc0 || (*at & 0xf0) == 0x90)
            return 1;
        if (*at == 0xb7 || *at == 0xbf)
            return 2;
        if (*at == 0xb1 || *at == 0xc1 || *at == 0xa3 || *at == 0xab || *at == 0xb3 || *at == 0xba || *at == 0xbb ||
            *at == 0xaf || (*at & 0xf0) == 0x40)
            return full;
        give_up("an instruction it does not know", code);
    }
    if (*at == 0x63)
        return 4;
    if ((*at < 0x40 && (*at & 7) < 4) || (*at >= 0x80 && *at <= 0x8b && *at != 0x82) || *at == 0xc6 || *at == 0xc7 ||
        (*at & 0xf6) == 0xf6)
        return *at & 1 || *at == 0x83 ? full : 1;
    give_up("an instruction it does not know", code);
    return 0;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    ucontext_t *c = context;
    const uint8_t *code = (const uint8_t *)c->uc_mcontext.gregs[REG_RIP];
    uint8_t *at = info->si_addr;

    for (struct region *r = regions; r < regions + nr_regions; r++)
        if (trapping && at >= r->at && at < r->at + REGION_BYTES) {
            now.region = r;
            now.offset = (uint32_t)(at - r->at);
            now.width = width_of(code);
            now.write = (c->uc_mcontext.gregs[REG_ERR] & WRITE_FAULT) != 0;
            mprotect(r->at, REGION_BYTES, PROT_READ | PROT_WRITE);
            c->uc_mcontext.gregs[REG_EFL] |= TRAP_FLAG;
            return;
        }
    (void)number;
    if (attacking && write(1, "1\n", 2) == 2) /* it was led astray: the attack made a difference */
        _exit(0);
    give_up("a fault outside every region", code);
}

static void on_step(int number, siginfo_t *info, void *context)
{
    struct region *r = now.region;

    for (uint32_t i = now.offset; i < now.offset + now.width && i < REGION_BYTES; i++) {
        if (now.write) {
            r->changed[i] = 0;
            continue;
        }
        nr_reads++;
        nr_twice += ++r->reads[i] > (i < r->header ? limit : 1) && i < r->judged;
        if (attacking && !(i < r->header && limit > 1) && r->reads[i] == 1 && r->mask >> i % 8 & 1) {
            r->at[i] = (uint8_t)~r->at[i];
            r->changed[i] = 1;
        }
    }
    mprotect(r->at, REGION_BYTES, PROT_NONE);
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_EFL] &= ~TRAP_FLAG;
    (void)number;
    (void)info;
}

/* The page at `at`. */
static struct region *region(void *at, uint32_t header)
{
    struct region *r = &regions[nr_regions++];

    memset(r, 0, sizeof *r);
    r->at = at;
    r->header = header;
    r->judged = REGION_BYTES;
    r->mask = 0xff;
    return r;
}

static void trap_close(void)
{
    trapping = 1;
    for (uint32_t i = 0; i < nr_regions; i++)
        mprotect(regions[i].at, REGION_BYTES, PROT_NONE);
}

static void trap_begin(int attack)
{
    struct sigaction fault = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    struct sigaction step = {.sa_sigaction = on_step, .sa_flags = SA_SIGINFO};

    sigaction(SIGSEGV, &fault, NULL);
    sigaction(SIGTRAP, &step, NULL);
    nr_reads = nr_twice = 0;
    attacking = attack;
    trap_close();
}

static void trap_end(void)
{
    trapping = 0;
    for (uint32_t i = 0; i < nr_regions; i++)
        mprotect(regions[i].at, REGION_BYTES, PROT_READ | PROT_WRITE);
}

/* Another call begins: headers may be read again, and the attacker has put right what is still as it left it. */
static void trap_call(uint32_t reads_of_a_header_byte)
{
    int still = trapping;

    trap_end();
    limit = reads_of_a_header_byte;
    for (struct region *r = regions; r < regions + nr_regions; r++)
        for (uint32_t i = 0; i < r->header; i++) {
            if (r->changed[i])
                r->at[i] = (uint8_t)~r->at[i];
            r->changed[i] = r->reads[i] = 0;
        }
    if (still)
        trap_close();
}

/* ---- what the watched code is linked with: eight bytes at a time, then the rest */

void *memcpy(void *to, const void *from, size_t n)
{
    volatile uint8_t *t = to;
    const volatile uint8_t *f = from;

    for (; n >= 8; n -= 8, t += 8, f += 8)
        *(volatile uint64_t *)t = *(const volatile uint64_t *)f;
    for (; n; n--)
        *t++ = *f++;
    return to;
}

void *memmove(void *to, const void *from, size_t n)
{
    volatile uint8_t *t = to;
    const volatile uint8_t *f = from;

    if (t <= f || t >= f + n)
        return memcpy(to, from, n);
    while (n--)
        t[n] = f[n];
    return to;
}

int memcmp(const void *a, const void *b, size_t n)
{
    const volatile uint8_t *x = a, *y = b;

    for (; n; n--, x++, y++)
        if (*x != *y)
            return *x - *y;
    return 0;
}

#endif
