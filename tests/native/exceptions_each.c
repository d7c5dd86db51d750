/* Every exception once, what its handler finds, and what it costs others: nothing. */
#include "exceptions.h"

HIDDEN uint16_t unmask_x87 = 0x300;
HIDDEN uint32_t unmask_simd = 0, default_simd = 0x1f80;

static void every(void)
{
    RAISE("xor %%ecx,%%ecx\n xor %%edx,%%edx\n mov $1,%%eax", "div %%ecx");
    told("div");
    RAISE("", ".byte 0xf1");
    told("int1");
    RAISE("", "int3");
    told("int3");
    RAISE("", ".byte 0xcd,3");
    told("int-3");
    RAISE("", "int $4");
    told("int-4");
    RAISE("", "ud2");
    told("ud2");
    RAISE("", ".byte 0xce"); /* into, and bound: 32-bit code has them */
    told("into");
    RAISE("", ".byte 0x62,0,0,0,0,0");
    told("bound");
    RAISE("mov %%rbp,%%rdi\n mov $1,%%ebp\n ror %%rbp", "mov (%%rbp),%%rax\n2: mov %%rdi,%%rbp");
    told("stack");
    RAISE("mov $1,%%ecx\n ror %%rcx", "mov (%%rcx),%%rax");
    told("not-canonical");
}

/* What only the privileged may do. */
static void privileged(void)
{
    RAISE("", "cli"); told("cli");
    RAISE("", "sti"); told("sti");
    RAISE("", "hlt"); told("hlt");
    RAISE("xor %%eax,%%eax", "mov %%rax,%%cr3"); told("cr3");
    RAISE("", "mov %%cr0,%%rax"); told("cr0");
    RAISE("", "lgdt (%%rsp)"); told("lgdt");
    RAISE("", "lidt (%%rsp)"); told("lidt");
    RAISE("", "inb $0x80,%%al"); told("in");
    RAISE("", "outb %%al,$0x80"); told("out");
    RAISE("", "rdmsr"); told("rdmsr");
    RAISE("", "wrmsr"); told("wrmsr");
    RAISE("", "invlpg (%%rsp)"); told("invlpg");
    RAISE("", "clts"); told("clts");
    RAISE("", "swapgs"); told("swapgs");
    RAISE("mov $0x1b,%%eax", "mov %%eax,%%gs"); told("selector");
}

static void arithmetic(void)
{
    RAISE("fninit\n fldcw unmask_x87(%%rip)\n fld1\n fldz\n fdivrp", "fwait"); told("x87");
    __asm__ volatile("fninit");
    RAISE("ldmxcsr unmask_simd(%%rip)\n xorps %%xmm0,%%xmm0", "divss %%xmm0,%%xmm0"); told("simd");
    __asm__ volatile("ldmxcsr default_simd(%rip)");
    RAISE("pushf\n orl $0x40000,(%%rsp)\n popf\n lea 1(%%rsp),%%rcx\n and $-8,%%rcx", "mov 1(%%rcx),%%rax"); told("alignment");
}

static void page_faults(void)
{
    handle_all();
    RAISE("movabs $0x200000000008,%%rcx", "mov %%rax,(%%rcx)"); told("write");
    RAISE("movabs $0x200000000008,%%rcx", "mov (%%rcx),%%rax"); told("read");
    RAISE("lea handlers(%%rip),%%rcx", "mov %%rax,(%%rcx)"); told("write-code");
}

/* TF by popf: behind each instruction, until the handler clears it. And a step onto an instruction that faults. */
static void steps(void)
{
    handle_all();
    keep_stepping = 4;
    resume = 0;
    __asm__ volatile("lea 1f(%%rip),%%rax\n mov %%rax,expected(%%rip)\n pushf\n orl $0x100,(%%rsp)\n popf\n"
                     "1: nop\n nop\n nop\n nop\n nop\n nop" : : : "rax", "memory", "cc");
    note((int64_t)times);
    told("step");
    RAISE("pushf\n orl $0x100,(%%rsp)\n popf", "ud2"); told("step-onto");
    note((int64_t)(seen.rflags & TF));
}

/* int n: by its DPL, behind the instruction and without an error code; else general protection. */
static void software(void)
{
    handle_all();
    RAISE("", "int $0x50"); told("dpl0");
    for (uint32_t dpl = 1; dpl <= 3; dpl++) {
        handle(0x50, dpl);
        RAISE("", "int $0x50"); told("dpl");
    }
    handle(0x50, 0);
    RAISE("", "int $0x50"); told("again");
    RAISE("", "int $14"); told("page-fault");
    handle(5, 3);
    RAISE("", "int $5"); told("bounds");
    handle(1, 1);
    RAISE("", "int $1"); told("debug");
    RAISE("", "int $255"); told("last");
    handle(255, 1);
    RAISE("", "int $255"); told("last");
    CALL(__HYPERVISOR_set_trap_table, 0);
    handle(13, 0);
    RAISE("", "int $0x50"); told("none");
}

/* All registers, the vector ones, and the red zone, over an exception; 0: one is not what it was. */
__asm__(".globl keeps\n.hidden keeps\n"
        "keeps: push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "    lea 1f(%rip),%rax\n mov %rax,resume(%rip)\n"
        "    mov $0x0101010101010101,%rax\n mov %rax,-8(%rsp)\n mov %rax,-128(%rsp)\n"
        "    movq %rax,%xmm0\n movq %rax,%xmm15\n"
        "    mov $1,%eax\n mov $2,%ebx\n mov $3,%ecx\n mov $4,%edx\n mov $5,%esi\n mov $6,%edi\n mov $7,%ebp\n mov $8,%r8d\n"
        "    mov $9,%r9d\n mov $10,%r10d\n mov $11,%r11d\n mov $12,%r12d\n mov $13,%r13d\n mov $14,%r14d\n mov $15,%r15d\n std\n"
        "    ud2\n"
        "1:  add %rbx,%rax\n add %rcx,%rax\n add %rdx,%rax\n add %rsi,%rax\n add %rdi,%rax\n add %rbp,%rax\n add %r8,%rax\n"
        "    add %r9,%rax\n add %r10,%rax\n add %r11,%rax\n add %r12,%rax\n add %r13,%rax\n add %r14,%rax\n add %r15,%rax\n"
        "    cmp $120,%rax\n jne 9f\n"
        "    mov $0x0101010101010101,%rcx\n cmp %rcx,-8(%rsp)\n jne 9f\n cmp %rcx,-128(%rsp)\n jne 9f\n"
        "    movq %xmm0,%rdx\n cmp %rcx,%rdx\n jne 9f\n movq %xmm15,%rdx\n cmp %rcx,%rdx\n jne 9f\n"
        "    pushf\n pop %rdx\n test $0x400,%edx\n jz 9f\n"
        "    mov $1,%eax\n jmp 8f\n"
        "9:  xor %eax,%eax\n"
        "8:  cld\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n");
HIDDEN int keeps(void);

static void frame(void)
{
    uint16_t cs, ss;

    __asm__("mov %%cs,%0\n mov %%ss,%1" : "=r"(cs), "=r"(ss));
    handle_all();
    word(keeps() ? "kept" : "LOST");
    note((int64_t)(seen.cs - cs)), note((int64_t)(seen.ss - ss)), note((int64_t)(seen.rflags & DF));
    note((int64_t)(((seen.rsp - RING1_RED_ZONE) & ~15ull) - seen_at));
    RAISE("", "cli");
    note((int64_t)(((seen.rsp - RING1_RED_ZONE) & ~15ull) - seen_at));
}

/* So many, between two looks at what the hypervisor was asked; the second look is one call itself. */
static void direct(uint64_t rounds)
{
    handle_all();
    say("hypervisor: counters");
    times = 0;
    for (uint64_t i = 0; i < rounds; i++) {
        RAISE("", "ud2");
        RAISE("", "int3");
        RAISE("", "cli");
        RAISE("xor %%ecx,%%ecx\n xor %%edx,%%edx\n mov $1,%%eax", "div %%ecx");
        RAISE("", "int $4");
    }
    say("hypervisor: counters");
    note((int64_t)times);
}

/* For scripts/bench: ns of a breakpoint, its handler, and back, as the one object that a benchmark's guest prints. */
static void measure(uint32_t rounds)
{
    char line[64];
    uint64_t begin;

    if (register_one(RING1_VECTOR_BREAKPOINT, 0, (uint64_t)(uintptr_t)twin_handler))
        return;
    begin = now_ns();
    for (uint32_t i = 0; i < rounds; i++)
        __asm__ volatile("int3" : : : "memory");
    put_text(put_decimal(put_text(line, "{\"ns\": "), (int64_t)((now_ns() - begin) / rounds)), "}\n");
    print(line);
}

/* Between two looks at what the hypervisor was asked; a line is a call, and the second look is one itself. */
static void counted(void (*raise)(void))
{
    handle_all();
    say("hypervisor: counters");
    raise();
    say("hypervisor: counters");
}

int case_each(const char *name)
{
    CASE("bench", measure(100000))
    CASE("every", counted(every))
    CASE("privileged", counted(privileged))
    CASE("arithmetic", counted(arithmetic))
    CASE("page-faults", page_faults())
    CASE("steps", steps())
    CASE("software", software())
    CASE("frame", frame())
    CASE("direct", direct(20000))
    return 0;
}
