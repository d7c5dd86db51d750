/* A process whose page faults are served by its own second thread, which stands for the hypervisor and its monitor.
 *
 *     faults CASE    exit code 0: as it should be; 1: a sentence says what was not; or it dies of the signal that the case wants
 *
 * The first thread touches pages of a reserved space; the second one is told of it over the socket, maps the page or not, and
 * answers. Its trap table and shared_info are two pages of its own. Compiled together with hypervisor/gate/fault.c and traps.c
 * themselves. The last words of the entry code are printed. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "gate.h"
#include "ring1_mmu.h"

#define PAGE 4096L
#define PAGES 8
#define CODE 0x5afe /* the error code that the hypervisor gives a handler: no hardware's */
#define CHECK(what) ((what) ? (void)0 : failed(__LINE__, #what))

struct fault { uint64_t address, error, rip, rsp, value; };
struct verdict { uint32_t what, error; uint64_t word; };
struct frame { uint64_t error, rip, cs, rflags, rsp, ss; };
enum { RETRY, BOUNCE, SKIP, NONSENSE, BOUNCE_THEN_FILL };
enum { PRESENT = 1, WRITE = 2, USER = 4, FETCH = 16 };
#define STORE (1ull << 32)

static char *window;
static int ours, theirs;           /* the hypervisor's end, and the entry code's */
static volatile int answer = RETRY;         /* what the next page that is not mapped gets */
static volatile int protection = PROT_READ | PROT_WRITE;
static volatile int told, silent; /* silent: nobody is to be told of a page fault */
static volatile struct fault last;
static struct frame seen[2]; /* by the guest's handler */
static uint64_t frames_at[2], flags_at_entry;
static volatile int bounced;
uint64_t touched_rsp; /* by touch: its stack pointer when it touched */
static volatile uint64_t trapped_at;
extern const char touched[], handler[], stepped[];
uint64_t touch(void *at);

long raw6(long nr, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long ret;

    __asm__ volatile("syscall" : "=a"(ret) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return ret;
}

static _Noreturn void failed(int line, const char *what)
{
    fprintf(stderr, "line %d: %s\n", line, what);
    _exit(1);
}

/* Reads 8 bytes at rdi, with the direction flag set and its red zone in use: both are as before afterwards, or it stops. */
__asm__(".globl touch\n.globl touched\n.globl handler\n"
        "touch: mov %rsp,touched_rsp(%rip)\n mov $0x123456789abcdef,%rcx\n mov %rcx,-8(%rsp)\n mov %rcx,-128(%rsp)\n std\n"
        "touched: mov (%rdi),%rax\n"
        "   cmp %rcx,-8(%rsp)\n jne 1f\n cmp %rcx,-128(%rsp)\n jne 1f\n"
        "   pushf\n pop %rdx\n cld\n test $0x400,%edx\n jz 1f\n ret\n"
        "1: cld\n ud2\n"
        /* A guest's handler of vector 14: everything is kept, C looks at the frame, iretq. */
        "handler: push %rax\n push %rcx\n push %rdx\n push %rsi\n push %rdi\n push %r8\n push %r9\n push %r10\n push %r11\n pushf\n"
        "   cld\n lea 80(%rsp),%rdi\n mov (%rsp),%rsi\n call in_handler\n"
        "   add $8,%rsp\n pop %r11\n pop %r10\n pop %r9\n pop %r8\n pop %rdi\n pop %rsi\n pop %rdx\n pop %rcx\n pop %rax\n"
        "   add $8,%rsp\n iretq\n");

static void map(uint64_t address)
{
    CHECK(raw6(SYS_mprotect, (long)(address & ~(uint64_t)(PAGE - 1)), PAGE, protection, 0, 0, 0) == 0);
}

/* The guest's kernel: its page 1 is missing too, which is the hypervisor's to fill; page 2 is bounced to itself again. */
__attribute__((used, target("general-regs-only"))) void in_handler(struct frame *frame, uint64_t flags)
{
    int n = bounced++;

    CHECK(n < 2);
    seen[n] = *frame;
    frames_at[n] = (uint64_t)frame;
    if (n == 0) {
        uint64_t page_to_map = last.address;

        flags_at_entry = flags;
        answer = RETRY;
        CHECK(*(volatile char *)(window + PAGE) == 0); /* a fault within the handler, filled */
        answer = BOUNCE;
        CHECK(*(volatile char *)(window + 2 * PAGE) == 0); /* and one that comes back here */
        CHECK(bounced == 2);
        map(page_to_map);
    } else {
        map(last.address);
    }
}

static void *hypervisor(void *unused)
{
    struct verdict verdict = {0, CODE, (uint64_t)(uintptr_t)handler};

    (void)unused;
    while (recv(ours, (void *)&last, sizeof last, 0) == sizeof last) {
        if (last.error & RING1_PF_UNHANDLED) {
            fprintf(stderr, "ends: value %lu, error %#lx, address %#lx\n", last.value, (uint64_t)(last.error & ~RING1_PF_UNHANDLED), last.address);
            shutdown(ours, SHUT_RDWR);
            break;
        }
        told++;
        CHECK(!silent && told < 10); /* since the last look */
        verdict.what = (uint32_t)answer;
        if (answer == BOUNCE_THEN_FILL)
            verdict.what = BOUNCE, answer = RETRY;
        if (answer == RETRY)
            map(last.address);
        CHECK(send(ours, &verdict, sizeof verdict, 0) == sizeof verdict);
    }
    return 0;
}

static void own_page(uint64_t va)
{
    void *at = (void *)(RING1_KERNEL_WINDOW + va);

    CHECK(mmap(at, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == at);
}

static void begin(uint64_t from, uint64_t bytes)
{
    const struct rlimit no_core = {0, 0};
    pthread_t thread;
    int pair[2];

    setrlimit(RLIMIT_CORE, &no_core);
    own_page(RING1_TRAP_TABLE);
    own_page(RING1_SHARED_INFO);
    window = mmap(0, (PAGES + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    window += PAGE; /* what is before and behind it is not there either */
    CHECK(window != MAP_FAILED + PAGE && socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
    ours = pair[0], theirs = pair[1];
    CHECK(traps_install(bytes ? from : (uint64_t)(uintptr_t)window, bytes ? bytes : PAGES * PAGE, theirs) == 0);
    CHECK(pthread_create(&thread, 0, hypervisor, 0) == 0);
}

static void told_once(const void *address, uint64_t error)
{
    CHECK(told == 1 && last.address == (uint64_t)(uintptr_t)address && last.error == error);
}

/* ---- filled */

static void reads(void)
{
    errno = 77;
    CHECK(touch(window + 0x128) == 0);
    told_once(window + 0x128, USER);
    CHECK(last.rip == (uint64_t)(uintptr_t)touched && last.rsp == touched_rsp);
    CHECK(errno == 77);
    touch(window + 0x800);
    CHECK(told == 1);
}

static void writes(void)
{
    *(volatile uint32_t *)(window + PAGE - 8) = 5;
    told_once(window + PAGE - 8, USER | WRITE);
    CHECK(*(volatile uint32_t *)(window + PAGE - 8) == 5);
}

static void fetches(void)
{
    protection = PROT_READ | PROT_WRITE;
    map((uint64_t)(uintptr_t)window);
    *(volatile char *)window = (char)0xc3; /* ret */
    protection = PROT_READ | PROT_EXEC;
    ((void (*)(void))(uintptr_t)window)();
    told_once(window, PRESENT | USER | FETCH);
}

static void upgrades(void)
{
    protection = PROT_READ;
    map((uint64_t)(uintptr_t)window);
    CHECK(*(volatile char *)window == 0);
    protection = PROT_READ | PROT_WRITE;
    *(volatile char *)window = 1;
    told_once(window, PRESENT | USER | WRITE);
}

static void last_byte(void)
{
    CHECK(*(volatile char *)(window + PAGES * PAGE - 1) == 0);
    told_once(window + PAGES * PAGE - 1, USER);
}

/* The stack itself is what is missing: a push to a page that is filled. */
static void stack(void)
{
    char *top = window + 3 * PAGE;

    __asm__ volatile("mov %%rsp,%%rbx\n mov %0,%%rsp\n push $7\n mov %%rbx,%%rsp" : : "r"(top) : "rbx", "memory");
    told_once(top - 8, USER | WRITE);
    CHECK(*(volatile uint64_t *)(top - 8) == 7);
}

/* ---- skipped: the store that `mov` made of `reg` is told of, not done, and what follows it runs with every register kept */

static uint64_t *target;
#define SKIPS(text, reg, ...) do { \
        uint64_t value = 0x1122334455667788, behind = 0; \
        told = 0; \
        __asm__ volatile("mov %2,%%" reg "\n" text "\n mov $1,%0\n cmp %2,%%" reg "\n je 1f\n ud2\n 1:" \
                         : "=&r"(behind) : "b"(target), "D"(value), "S"(2L) : reg, "memory", ##__VA_ARGS__); \
        CHECK(behind == 1 && last.value == value); \
        told_once(target, USER | WRITE | STORE); \
    } while (0)

static void skips(void)
{
    target = (uint64_t *)(window + 0x128);
    answer = SKIP;
    SKIPS("mov %%rax,(%1)", "rax");
    SKIPS("mov %%r15,(%1)", "r15");
    SKIPS("mov %%rcx,(%1)", "rcx");
    SKIPS("mov %1,%%r12\n mov %%rdx,(%%r12)", "rdx", "r12");
    SKIPS("mov %1,%%r13\n mov %%r9,(%%r13)", "r9", "r13");
    SKIPS("lea -8(%1),%%r8\n mov %%rdx,8(%%r8)", "rdx", "r8");
    SKIPS("lea 0x80(%1),%%r11\n mov %%rdx,-0x80(%%r11)", "rdx", "r11");
    SKIPS("lea -0x12345678(%1),%%rcx\n mov %%r10,0x12345678(%%rcx)", "r10", "rcx");
    SKIPS("lea -16(%1),%%rdx\n mov %%rax,(%%rdx,%3,8)", "rax", "rdx");
    SKIPS("lea -24(%1),%%rdx\n mov $1,%%r14d\n mov %%rax,16(%%rdx,%%r14,8)", "rax", "rdx", "r14");
    SKIPS("lea -0x1002(%1),%%rdx\n mov %%r8,0x1000(%%rdx,%3)", "r8", "rdx");
    SKIPS("mov %1,%%rdx\n shr $3,%%rdx\n mov %%rax,0(,%%rdx,8)", "rax", "rdx");
    SKIPS("xchg %1,%%rsp\n mov %%rax,(%%rsp)\n xchg %1,%%rsp", "rax");
}

/* From the next instruction on: code in the window itself, whose next page is the target. */
static void skips_relative(void)
{
    static const unsigned char code[] = {0x48, 0x89, 0x05, 0xf9, 0x0f, 0, 0, 0xc3}; /* mov %rax,0xff9(%rip); ret */

    protection = PROT_READ | PROT_WRITE | PROT_EXEC;
    map((uint64_t)(uintptr_t)window);
    memcpy(window, code, sizeof code);
    answer = SKIP;
    __asm__ volatile("call *%0" : : "r"(window), "a"(99L) : "memory");
    told_once(window + PAGE, USER | WRITE | STORE);
    CHECK(last.value == 99);
}

/* Its page, or the second of its two, is unmapped when it is to be decoded (test_fault.py puts the call of lose_code there): the
 * entry code's own fault is served, and then it is told of the store. */
static char *lost;

void lose_code(void)
{
    if (lost)
        raw6(SYS_mprotect, (long)lost, PAGE, PROT_NONE, 0, 0, 0);
    lost = 0;
}

static void loses(char *page, uint64_t at)
{
    static const unsigned char code[] = {0x48, 0x89, 0x05, 0, 0, 0, 0, 0xc3}; /* mov %rax,...(%rip); ret */
    uint32_t beyond = (uint32_t)(2 * PAGE - (long)at - 7);

    protection = PROT_READ | PROT_WRITE | PROT_EXEC;
    map((uint64_t)(uintptr_t)window);
    map((uint64_t)(uintptr_t)window + PAGE);
    memcpy(window + at, code, sizeof code);
    memcpy(window + at + 3, &beyond, sizeof beyond);
    lost = page;
    __asm__ volatile("call *%0" : : "r"(window + at), "a"(99L) : "memory");
    CHECK(told == 2 && last.address == (uint64_t)(uintptr_t)(window + 2 * PAGE));
    CHECK(last.error == (USER | WRITE | STORE) && last.value == 99 && *(uint64_t *)(window + 2 * PAGE) == 99);
}

static void lost_code(void) { loses(window, 0); }
static void lost_half(void) { loses(window + PAGE, PAGE - 2); } /* the first two bytes do not say what it is */

/* What is no such store is told of as a write like any other. */
#define WRITES(text, at) do { \
        told = 0, answer = RETRY; \
        __asm__ volatile(text : : "b"(at), "a"(5L) : "memory", "rcx", "rdi"); \
        told_once(window + n++ * PAGE + (told_at), USER | WRITE); \
    } while (0)

static void other_stores(void)
{
    uint64_t n = 0, told_at = 8;

    WRITES("mov %%r8d,(%0)", window + 8);
    WRITES("mov %%al,(%0)", window + PAGE + 8);
    WRITES("movq $7,(%0)", window + 2 * PAGE + 8);
    WRITES("add %%rax,(%0)", window + 3 * PAGE + 8);
    WRITES("mov %0,%%rdi\n mov $1,%%ecx\n rep stosq", window + 4 * PAGE + 8);
    WRITES("movnti %%rax,(%0)", window + 5 * PAGE + 8);
    map((uint64_t)(uintptr_t)(window + 6 * PAGE)); /* and one of two pages of which only the second is missing */
    told_at = 0, n = 7;
    WRITES("mov %%rax,(%0)", window + 7 * PAGE - 4);
}

/* ---- bounced */

static void bounces(void)
{
    uint16_t cs, ss;

    __asm__("mov %%cs,%0\n mov %%ss,%1" : "=r"(cs), "=r"(ss));
    answer = BOUNCE;
    CHECK(touch(window) == 0);
    CHECK(told == 3 && bounced == 2);
    CHECK(seen[0].error == CODE && seen[0].rip == (uint64_t)(uintptr_t)touched && seen[0].rsp == touched_rsp);
    CHECK(seen[0].cs == cs && seen[0].ss == ss);
    CHECK(seen[0].rflags & 0x400);
    CHECK(!(flags_at_entry & 0x400));
    CHECK(frames_at[0] == ((touched_rsp - 128) & ~(uint64_t)15) - sizeof(struct frame));
    CHECK(frames_at[1] % 16 == 0 && frames_at[1] < frames_at[0]);
}

/* The page of the stack that the frame is pushed on went after the hypervisor made it ready: it is filled again. */
static void loses_its_stack(void)
{
    char *top = window + 4 * PAGE;

    answer = BOUNCE_THEN_FILL;
    __asm__ volatile("mov %%rsp,%%rbx\n mov %0,%%rsp\n mov (%1),%%rax\n mov %%rbx,%%rsp"
                     : : "r"(top), "r"(window) : "rax", "rbx", "memory");
    CHECK(told == 4 && bounced == 2);
    CHECK(frames_at[0] == (uint64_t)(top - 128 - sizeof(struct frame)));
}

static void on_trap(int sig, siginfo_t *info, void *context)
{
    greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;

    (void)sig, (void)info;
    if (!trapped_at)
        trapped_at = (uint64_t)reg[REG_RIP];
    reg[REG_EFL] &= ~(greg_t)0x100;
}

/* The interrupted code is being single-stepped; the handler is not. */
static void steps(void)
{
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};
    uint64_t value = 1;

    sigaction(SIGTRAP, &action, 0);
    answer = BOUNCE;
    __asm__ volatile("sub $128,%%rsp\n pushf\n orl $0x100,(%%rsp)\n popf\n mov (%1),%0\n"
                     ".globl stepped\nstepped: add $128,%%rsp\n"
                     : "+a"(value) : "D"(window) : "memory");
    CHECK(value == 0 && bounced == 2 && trapped_at == (uint64_t)(uintptr_t)stepped);
}

/* ---- what is no page fault of the windows: the last words; and what the hypervisor did not say. Each dies of SIGSEGV */

static void null(void) { silent = 1; __asm__ volatile("movb $0,8" : : : "memory"); }
static void below(void) { silent = 1, touch(window - 8); }
static void above(void) { silent = 1, touch(window + PAGES * PAGE); }
static void privileged(void) { silent = 1; __asm__ volatile("cli"); }
static void sent(void) { silent = 1, kill(getpid(), SIGSEGV); }
static void hung_up(void) { shutdown(ours, SHUT_RDWR), touch(window); }
static void closed(void) { close(theirs), touch(window); }
static void nonsense(void) { answer = NONSENSE, touch(window); }
static void skipped_read(void) { answer = SKIP, touch(window); }
static void too_short(void) { send(ours, "\0\0\0", 4, 0), touch(window); }
static void bus(void) { silent = 1, kill(getpid(), SIGBUS); }

/* A handler's frame has no page to stand on, and it is no page of the windows either. */
static void no_stack(void)
{
    answer = BOUNCE;
    __asm__ volatile("mov $4096,%%esp\n mov (%0),%%rax" : : "r"(window) : "rax", "memory");
}

static const struct { const char *name; void (*run)(void); uint64_t from, bytes; } cases[] = {
    {"reads", reads, 0, 0}, {"writes", writes, 0, 0}, {"fetches", fetches, 0, 0}, {"upgrades", upgrades, 0, 0},
    {"last-byte", last_byte, 0, 0}, {"stack", stack, 0, 0}, {"bounces", bounces, 0, 0}, {"null", null, 0, 0},
    {"below", below, 0, 0}, {"above", above, 0, 0}, {"privileged", privileged, 0, 0}, {"hung-up", hung_up, 0, 0}, {"closed", closed, 0, 0},
    {"nonsense", nonsense, 0, 0}, {"too-short", too_short, 0, 0}, {"bus", bus, 0, 0}, {"no-stack", no_stack, 0, 0},
    {"steps", steps, 0, 0}, {"skips", skips, 0, 0}, {"loses-its-stack", loses_its_stack, 0, 0}, {"skips-relative", skips_relative, 0, 0},
    {"other-stores", other_stores, 0, 0}, {"skipped-read", skipped_read, 0, 0},
    {"lost-code", lost_code, 0, 0}, {"lost-half", lost_half, 0, 0},
    {"sent", sent, 0, (uint64_t)1 << 63}, /* whoever sent it: pid and uid are an address of these windows */
    {"privileged-everywhere", privileged, 0, (uint64_t)1 << 47},
};

int main(int argc, char **argv)
{
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++)
        if (argc == 2 && !strcmp(argv[1], cases[i].name)) {
            begin(cases[i].from, cases[i].bytes);
            cases[i].run();
            return 0;
        }
    return 2;
}
