/* A kernel that raises every exception that a domain can raise. Its command line says which: "case=NAME". test_exceptions.py has what it
 * must say, or die of. */
#include "exceptions.h"

struct context seen;
uint64_t seen_at, times, resume, resume_rsp, expected, keep_stepping, twins, events, event_saved, event_masked;
uint8_t mask_seen;
static struct trap_info table[RING1_MAX_TRAPS + 1];
static char line[256], *end;

/* Vector n is entered at handlers + 16 * n: the vector, after a 0 where there is no error code, then everything else. */
__asm__(".globl handlers\n.hidden handlers\n.globl failsafe_handler\n.hidden failsafe_handler\n"
        ".balign 16\n"
        ".set n,0\n"
        "handlers:\n"
        ".rept 256\n"
        "    .balign 16\n"
        "    .if !((n == 8) | ((n >= 10) & (n <= 14)) | (n == 17) | (n == 21) | (n == 29) | (n == 30))\n"
        "    push $0\n"
        "    .endif\n"
        "    push $n\n"
        "    jmp common\n"
        "    .set n,n+1\n"
        ".endr\n"
        ".balign 16\n"
        "failsafe_handler: push $257\n"
        "common:\n"
        "    push %rax\n push %rbx\n push %rcx\n push %rdx\n push %rsi\n push %rdi\n push %rbp\n push %r8\n push %r9\n push %r10\n"
        "    push %r11\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "    mov %rsp,%rdi\n mov %rsp,%rbx\n and $-16,%rsp\n call on_exception\n mov %rbx,%rsp\n"
        "    pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %r11\n pop %r10\n pop %r9\n pop %r8\n pop %rbp\n pop %rdi\n pop %rsi\n"
        "    pop %rdx\n pop %rcx\n pop %rbx\n pop %rax\n"
        "    add $16,%rsp\n iretq\n"
        ".globl twin_handler\n.hidden twin_handler\n"
        "twin_handler: incq twins(%rip)\n iretq\n"
        ".globl faulting_handler\n.hidden faulting_handler\n"
        "faulting_handler: ud2\n"
        ".globl event_handler\n.hidden event_handler\n"
        "event_handler: push %rax\n push %rcx\n push %rdx\n push %rsi\n push %rdi\n push %r8\n push %r9\n push %r10\n push %r11\n"
        "    push %rbx\n"
        "    mov %rsp,%rbx\n lea 80(%rsp),%rdi\n and $-16,%rsp\n call on_event\n mov %rbx,%rsp\n"
        "    pop %rbx\n pop %r11\n pop %r10\n pop %r9\n pop %r8\n pop %rdi\n pop %rsi\n pop %rdx\n pop %rcx\n pop %rax\n iretq\n");

static struct vcpu_info *vcpu(void) { return &((struct shared_info *)HOST(RING1_SHARED_INFO))->vcpu_info[0]; }

__attribute__((used, target("general-regs-only"))) HIDDEN void on_exception(struct context *c)
{
    seen = *c;
    seen_at = (uint64_t)(uintptr_t)&c->rip;
    times++;
    mask_seen = vcpu()->evtchn_upcall_mask;
    if (c->vector == RING1_VECTOR_X87)
        __asm__ volatile("fnclex");
    if (c->vector == RING1_VECTOR_DEBUG && keep_stepping) {
        keep_stepping--;
        return;
    }
    c->rflags &= ~(uint64_t)(TF | AC | NT);
    c->cs = (c->cs & ~0xffffull) | 0x33, c->ss = 0x2b;
    if (resume)
        c->rip = resume;
    if (resume_rsp)
        c->rsp = resume_rsp;
    resume = resume_rsp = 0;
}

/* What the frame had for the mask, what it was on entry; then events are taken, and unmasked as ABI.md says. */
__attribute__((used, target("general-regs-only"))) HIDDEN void on_event(const uint64_t *frame)
{
    events++;
    event_saved = frame[1] >> 32;
    event_masked = __atomic_load_n(&vcpu()->evtchn_upcall_mask, __ATOMIC_SEQ_CST);
    do {
        take_event(0);
        __atomic_store_n(&vcpu()->evtchn_upcall_mask, 0, __ATOMIC_SEQ_CST);
    } while (__atomic_load_n(&vcpu()->evtchn_upcall_pending, __ATOMIC_SEQ_CST));
}

/* ---- registering */

int64_t register_one(uint32_t vector, uint32_t flags, uint64_t address)
{
    table[0] = (struct trap_info){.vector = (uint8_t)vector, .flags = (uint8_t)flags, .cs = 0x33, .address = address};
    table[1].address = 0;
    return CALL(__HYPERVISOR_set_trap_table, VIRT(table));
}

void handle(uint32_t vector, uint32_t flags)
{
    if (register_one(vector, flags, (uint64_t)(uintptr_t)handlers + 16 * vector))
        word("SETUP");
}

void handle_all(void)
{
    uint32_t n = 0;

    for (uint32_t v = 0; v < RING1_MAX_TRAPS; v++)
        if (v != RING1_VECTOR_NMI && v != RING1_VECTOR_DOUBLE_FAULT && v != RING1_VECTOR_MACHINE_CHECK &&
            v != RING1_VECTOR_SYSTEM_CALL)
            table[n++] = (struct trap_info){
                .vector = (uint8_t)v, .cs = 0x33, .address = (uint64_t)(uintptr_t)handlers + 16 * v};
    table[n].address = 0;
    if (CALL(__HYPERVISOR_set_trap_table, VIRT(table)))
        word("SETUP");
}

void *page(uint32_t n)
{
    return HOST(start_page->xen.pt_base + (start_page->xen.nr_pt_frames + n) * RING1_PAGE_SIZE);
}

/* ---- what it says */

void word(const char *text) { end = put_text(put_text(end, end == line ? "" : " "), text); }

void note(int64_t number)
{
    char digits[24];

    put_decimal(digits, number);
    word(digits);
}

void flush(void)
{
    say(line);
    end = line, *line = 0;
}

void told(const char *name)
{
    word(name), note((int64_t)seen.vector), note((int64_t)seen.error), note((int64_t)(seen.rip - expected));
    flush();
}

int kernel_main(void)
{
    const char *at = option("case=");
    char name[64];
    uint32_t n = 0;

    while (*at && *at != ' ' && n < sizeof name - 1)
        name[n++] = *at++;
    name[n] = 0;
    end = line;
    if (!case_each(name) && !case_hostile(name) && !case_returns(name) && !case_events(name))
        return 2; /* no such case */
    if (end != line)
        flush();
    return 0;
}
