/* Frames that cannot be returned to, flags that a frame or popf may set, and the mask that a frame remembers. */
#include "exceptions.h"

struct registers { /* struct sigcontext of Linux, x86-64 */
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags;
    uint16_t cs, gs, fs, ss;
    uint64_t error, trap, oldmask, cr2, fpstate, reserved[8];
};
static struct { /* struct ucontext of the kernel's */
    uint64_t flags, link, stack[3];
    struct registers reg;
    uint64_t mask;
} forged;
static uint64_t own_stack[512];
HIDDEN uint64_t forged_at;

/* rt_sigreturn into `forged`; whoever goes on, goes on behind it on this stack. */
#define RETURN_TO_FORGED(at) \
    do { \
        forged_at = (uint64_t)(uintptr_t)(at); \
        __asm__ volatile("lea 1f(%%rip),%%rax\n mov %%rax,resume(%%rip)\n mov %%rsp,resume_rsp(%%rip)\n" \
                         "mov forged_at(%%rip),%%rsp\n mov $15,%%eax\n lea 2f(%%rip),%%rcx\n mov %%rcx,expected(%%rip)\n" \
                         "syscall\n2: ud2\n1: cld" \
                         : : : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", \
                               "r15", "memory", "cc"); \
    } while (0)

static void forge(uint16_t cs, uint16_t ss, uint64_t rip, uint64_t rsp)
{
    forged.flags = 6; /* SS is there and is to be restored strictly */
    forged.reg = (struct registers){.cs = cs, .ss = ss, .rip = rip, .rsp = rsp, .eflags = 0x202};
    forged.mask = 1ull << (RING1_UPCALL_SIGNAL - 1);
}

static void failsafe(int with_stack)
{
    note(CALL(__HYPERVISOR_set_callbacks, 0, (uint64_t)(uintptr_t)failsafe_handler));
    if (with_stack)
        note(CALL(__HYPERVISOR_stack_switch, 0x2b, (uint64_t)(uintptr_t)(own_stack + 512)));
    flush();
}

static void told_stack(const char *name)
{
    told(name);
    word(seen_at - (uint64_t)(uintptr_t)own_stack < sizeof own_stack ? "kernel's" : "interrupted");
    flush();
}

/* The frame in `forged`: what is raised by returning to it, or at the instruction that it names. */
static void forged_told(const char *name)
{
    RETURN_TO_FORGED(&forged);
    expected = forged.reg.rip;
    told(name);
}

/* What must be refused, and its control: the same with nothing wrong in it. */
static void sigreturn(int with_failsafe)
{
    uint64_t good = (uint64_t)(uintptr_t)page(4) + 2048;

    handle_all();
    if (with_failsafe)
        failsafe(1);
    forge(0x33, 0x2b, 0, good);
    __asm__ volatile("lea 3f(%%rip),%0\n jmp 4f\n3: ud2\n4:" : "=r"(forged.reg.rip));
    forged_told("good");
    forge(0x10, 0x2b, (uint64_t)(uintptr_t)faulting_handler, good);
    forged_told("cs");
    forge(0x33, 0x10, (uint64_t)(uintptr_t)faulting_handler, good);
    forged_told("ss");
    forge(0x33, 0x2b, 1ull << 63, good);
    forged_told("rip");
    if (with_failsafe) {
        RETURN_TO_FORGED(RING1_KERNEL_WINDOW + 64); told_stack("unreadable");
        RETURN_TO_FORGED(1ull << 63); told_stack("not-canonical");
    }
}

static void sigreturn_unreadable(void)
{
    handle_all();
    RETURN_TO_FORGED(RING1_KERNEL_WINDOW + 64);
    word("LIVED");
}

#define IRETQ(cs, ss, rip) \
    RAISE("mov %%rsp,resume_rsp(%%rip)\n mov %%rsp,%%rcx\n push $" #ss "\n push %%rcx\n pushf\n push $" #cs "\n" rip "push %%rax", "iretq")

static void iretq(int with_failsafe, int with_stack)
{
    handle_all();
    if (with_failsafe)
        failsafe(with_stack);
    IRETQ(0, 0x2b, ); told_stack("null-cs");
    IRETQ(0x10, 0x2b, ); told_stack("cs");
    IRETQ(0x33, 0x18, ); told_stack("ss");
    IRETQ(0x33, 0x2b, "mov $1,%%eax\n ror %%rax\n"); told_stack("rip");
}

/* What the entry code and the handler run with, whatever the interrupted code had set; and what its frame then has. */
static void flags(void)
{
    handle_all();
    RAISE("pushf\n orl $0x4000,(%%rsp)\n popf", "ud2"); told("nt");
    note((int64_t)(seen.rflags & NT));
    RAISE("pushf\n orl $0x40000,(%%rsp)\n popf", "ud2"); told("ac");
    note((int64_t)(seen.rflags & AC));
    RAISE("pushf\n orl $0x44100,(%%rsp)\n popf", "ud2"); told("all");
    note((int64_t)(seen.rflags & (NT | AC | TF)));
    RAISE("pushf\n andl $-0x201,(%%rsp)\n popf", "ud2"); /* IF: popf leaves it alone */
    note((int64_t)(seen.rflags & 0x200));
}

static void masks(void)
{
    volatile uint8_t *mask = (volatile uint8_t *)HOST(RING1_SHARED_INFO) + 1;

    handle(6, 0);
    handle(3, RING1_TI_MASK_EVENTS);
    for (uint32_t i = 0; i < 2; i++) {
        *mask = (uint8_t)i;
        RAISE("", "ud2");
        note((int64_t)(seen.cs >> 32)), note(mask_seen), note(*mask);
        RAISE("", "int3");
        note((int64_t)(seen.cs >> 32)), note(mask_seen), note(*mask);
    }
    handle(14, RING1_TI_MASK_EVENTS);
    *mask = 0;
    RAISE("movabs $0x200000000008,%%rcx", "mov %%rax,(%%rcx)");
    note((int64_t)(seen.cs >> 32)), note(mask_seen), note(*mask);
}

int case_returns(const char *name)
{
    CASE("sigreturn", sigreturn(0))
    CASE("sigreturn-failsafe", sigreturn(1))
    CASE("sigreturn-unreadable", sigreturn_unreadable())
    CASE("iretq", iretq(0, 0))
    CASE("iretq-failsafe", iretq(1, 0))
    CASE("iretq-failsafe-stack", iretq(1, 1))
    CASE("flags", flags())
    CASE("masks", masks())
    return 0;
}
