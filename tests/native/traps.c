/* A kernel whose exceptions are its own. Its command line says which: raise=NAME [times=N] [handler=NAME].
 *
 * It says one line: "vector error distance mask flags" of what its handler found, and how often; distance is how far the frame's
 * rip is behind the instruction. test_traps.py has what each must be. */
#include "kernel.h"

enum { OP_SET_TRAP_TABLE = 0 };
enum { TRAP_FLAG = 0x100, ALIGNMENT_FLAG = 0x40000 };
struct trap_info { uint8_t vector, flags; uint16_t cs; uint32_t pad; uint64_t address; };
struct seen { uint64_t count, vector, error, rip, cs, rflags, rsp, ss, at, mask; };
struct seen seen __attribute__((visibility("hidden")));
uint64_t resume __attribute__((visibility("hidden"))); /* where the handler goes on; 0: where it was */
extern const char entries[] __attribute__((visibility("hidden")));
extern const char again[] __attribute__((visibility("hidden")));
#define ENTRY_BYTES 16

/* One entry a vector; those without an error code push a 0 in its place. Everything but rip and TF is as it was afterwards. */
__asm__(".balign 16\n.globl entries\n.hidden entries\nentries:\n"
        ".set n, 0\n.rept 256\n.balign 16\n"
        ".if n == 8 || (n >= 10 && n <= 14) || n == 17 || n == 21 || n == 29 || n == 30\n nop\n nop\n .else\n push $0\n .endif\n"
        "pushq $n\n jmp common\n.set n, n + 1\n.endr\n"
        "common: push %rax\n push %rcx\n"
        "mov 16(%rsp),%rax\n mov %rax,seen+8(%rip)\n"
        "lea 24(%rsp),%rcx\n mov %rcx,seen+64(%rip)\n"
        "mov 24(%rsp),%rax\n mov %rax,seen+16(%rip)\n"
        "mov 32(%rsp),%rax\n mov %rax,seen+24(%rip)\n"
        "mov 40(%rsp),%rax\n mov %rax,seen+32(%rip)\n"
        "mov 48(%rsp),%rax\n mov %rax,seen+40(%rip)\n"
        "mov 56(%rsp),%rax\n mov %rax,seen+48(%rip)\n"
        "mov 64(%rsp),%rax\n mov %rax,seen+56(%rip)\n"
        "incq seen(%rip)\n"
        "mov resume(%rip),%rax\n test %rax,%rax\n jz 1f\n mov %rax,32(%rsp)\n"
        "1: andq $~0x40100,48(%rsp)\n"
        "pop %rcx\n pop %rax\n add $16,%rsp\n iretq\n"
        /* A handler that faults itself, for ever: by the same exception, on its own stack. */
        ".globl again\n.hidden again\nagain: ud2\n");

static char line[256], *end;

static void note(int64_t value)
{
    char digits[24];

    put_decimal(digits, value);
    end = put_text(put_text(end, end == line ? "" : " "), digits);
}

static int64_t set_traps(const struct trap_info *list) { return CALL(OP_SET_TRAP_TABLE, VIRT(list)); }

static uint64_t handler_of(uint32_t vector) { return (uint64_t)(uintptr_t)entries + vector * ENTRY_BYTES; }

static void handle(uint32_t vector, uint8_t flags, uint64_t address)
{
    struct trap_info list[2] = {{(uint8_t)vector, flags, 0x33, 0, address}, {0, 0, 0, 0, 0}};

    if (set_traps(list))
        shut_down(SHUTDOWN_crash, 1, "set_trap_table");
}

/* `code` raises it; what comes behind is where the handler goes on, unless the instruction is done by then. */
#define RAISE(code) \
    __asm__ volatile("lea 2f(%%rip),%%rax\n mov %%rax,resume(%%rip)\n lea 1f(%%rip),%%r8\n" \
                     "1: " code "\n2: mov %%r8,%0" : "=m"(at) : : "rax", "rcx", "rdx", "r8", "r9", "xmm0", "xmm1", "memory", "cc")

static uint64_t raise(const char *name)
{
    volatile uint64_t at = 0;
    static uint64_t words[4];

    if (same(name, "divide"))
        RAISE("xor %%ecx,%%ecx\n mov $1,%%eax\n xor %%edx,%%edx\n lea 1f(%%rip),%%r8\n 1: div %%ecx");
    else if (same(name, "step"))
        RAISE("movq $0,resume(%%rip)\n pushf\n orq $0x100,(%%rsp)\n lea 1f(%%rip),%%r8\n popf\n 1: nop\n nop");
    else if (same(name, "breakpoint"))
        RAISE("int3");
    else if (same(name, "overflow"))
        RAISE("int $4");
    else if (same(name, "opcode"))
        RAISE("ud2");
    else if (same(name, "cli"))
        RAISE("cli");
    else if (same(name, "hlt"))
        RAISE("hlt");
    else if (same(name, "cr3"))
        RAISE("mov %%rax,%%cr3");
    else if (same(name, "lgdt"))
        RAISE("lgdt (%%rsp)");
    else if (same(name, "out"))
        RAISE("outb %%al,$0x80");
    else if (same(name, "canonical"))
        RAISE("movabs $0x8000000000000000,%%rcx\n lea 1f(%%rip),%%r8\n 1: mov (%%rcx),%%rax");
    else if (same(name, "int"))
        RAISE("int $0x55");
    else if (same(name, "alignment"))
        __asm__ volatile("lea 2f(%%rip),%%rax\n mov %%rax,resume(%%rip)\n lea 1f(%%rip),%%r8\n pushf\n orq $0x40000,(%%rsp)\n popf\n"
                         "1: mov 1(%1),%%rcx\n2: mov %%r8,%0\n pushf\n andq $~0x40000,(%%rsp)\n popf"
                         : "=m"(at) : "r"(words) : "rax", "rcx", "r8", "memory", "cc");
    else if (same(name, "simd"))
        RAISE("movl $0x1d80,-8(%%rsp)\n ldmxcsr -8(%%rsp)\n mov $1,%%ecx\n cvtsi2sd %%ecx,%%xmm0\n xorps %%xmm1,%%xmm1\n"
              "lea 1f(%%rip),%%r8\n 1: divsd %%xmm1,%%xmm0");
    else if (same(name, "x87"))
        RAISE("fninit\n movw $0x37b,-8(%%rsp)\n fldcw -8(%%rsp)\n fld1\n fldz\n fdivrp\n lea 1f(%%rip),%%r8\n 1: fwait\n fninit");
    else if (same(name, "stack-gone")) /* a frame that cannot be pushed: a page of the window that is not there */
        __asm__ volatile("mov %0,%%rsp\n ud2" : : "r"(HOST(0x3f00000000)));
    else if (same(name, "stack-hypervisor"))
        __asm__ volatile("mov %0,%%rsp\n ud2" : : "r"(HOST(RING1_MONITOR_CODE + 0x800)));
    else if (same(name, "stack-nowhere"))
        __asm__ volatile("mov $0x1000,%%esp\n ud2" : : :);
    else
        shut_down(SHUTDOWN_crash, 2, "no such exception");
    return at;
}

/* A table of good and bad entries: what is in force afterwards is seen by what is delivered. */
static void refused(void)
{
    struct trap_info list[4] = {{6, 3, 0x33, 0, handler_of(6)}, {0, 0, 0, 0, 0}, {13, 3, 0x33, 0, handler_of(13)}, {0, 0, 0, 0, 0}};
    const struct trap_info bad[] = {
        {0x80, 3, 0x33, 0, handler_of(3)}, {3, 8, 0x33, 0, handler_of(3)}, {3, 3, 0x30, 0, handler_of(3)},
        {3, 3, 0x33, 0, RING1_KERNEL_WINDOW + RING1_MONITOR_CODE}, {3, 3, 0x33, 0, RING1_KERNEL_WINDOW + RING1_SHARED_INFO},
        {3, 3, 0x33, 0, 1ull << 47}, {3, 3, 0x33, 0, ~0ull},
    };

    for (uint32_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        list[1] = bad[i];
        note(set_traps(list));
    }
    raise("opcode"); /* before the bad one: it stands */
    note((int64_t)seen.count);
    say(line);
    raise("cli"); /* behind it: it was never looked at */
}

/* The word behind "key=" of the command line; empty: it is not there. */
static const char *value(const char *key, char *room)
{
    const char *at = option(key);
    uint32_t n = 0;

    while (at && *at && *at != ' ' && n < 31)
        room[n++] = *at++;
    room[n] = 0;
    return room;
}

/* For scripts/bench: ns of a breakpoint, its handler, and back, as the one object that a benchmark's guest prints. */
static int measure(uint32_t n)
{
    uint64_t begin;

    handle(3, 3, handler_of(3));
    resume = 0;
    begin = now_ns();
    for (uint32_t i = 0; i < n; i++)
        __asm__ volatile("int3" : : : "memory");
    note((int64_t)((now_ns() - begin) / n));
    print("{\"ns\": "), print(line), print("}\n");
    return 0;
}

int kernel_main(void)
{
    char rooms[3][32];
    const char *name = value("raise=", rooms[0]), *handler = value("handler=", rooms[1]), *times = value("times=", rooms[2]);
    volatile uint8_t *mask = (volatile uint8_t *)HOST(RING1_SHARED_INFO) + 1;
    uint32_t n = *times ? 100000 : 1;
    uint64_t at = 0;

    end = line;
    if (same(name, "bench"))
        return measure(100000);
    if (same(name, "refused")) {
        refused();
    } else {
        for (uint32_t vector = 0; vector < 32; vector++)
            if (vector != 14 && !same(handler, "none"))
                handle(vector, vector == 6 ? 7 : 3, handler_of(vector));
        handle(0x55, 3, handler_of(0x55));
        if (same(handler, "dpl-0"))
            handle(0x55, 0, handler_of(0x55));
        if (same(handler, "itself"))
            handle(6, 3, (uint64_t)(uintptr_t)again);
        if (same(handler, "data"))
            handle(6, 3, (uint64_t)(uintptr_t)&seen);
        *mask = 0;
        for (uint32_t i = 0; i < n; i++)
            at = raise(name);
        note((int64_t)seen.count), note((int64_t)seen.vector), note((int64_t)seen.error), note((int64_t)(seen.rip - at));
        note(*mask), note((int64_t)(seen.at % 16)), note((int64_t)(seen.rsp - seen.at));
        note(!(seen.rflags & TRAP_FLAG) == !same(name, "step")), note(seen.cs & 3), note(seen.ss & 3);
    }
    say(line);
    return 0;
}
