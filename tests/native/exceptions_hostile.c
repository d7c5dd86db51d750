/* Handlers and stacks that are bad, and what a guest may spoil: each costs the domain alone, and says why. */
#include "exceptions.h"

/* ---- a trap table of which something is bad: what came before stands, what comes after does not */

static int64_t after(struct trap_info bad)
{
    static struct trap_info list[4];
    uint64_t good = (uint64_t)(uintptr_t)handlers + 16 * 3;

    list[0] = (struct trap_info){.vector = 3, .cs = 0x33, .address = good};
    list[1] = bad;
    list[2] = (struct trap_info){.vector = 6, .cs = 0x33, .address = good};
    CALL(__HYPERVISOR_set_trap_table, 0);
    return CALL(__HYPERVISOR_set_trap_table, VIRT(list));
}

static void table(void)
{
    const volatile struct ring1_traps *traps = HOST(RING1_TRAP_TABLE);
    uint64_t at = (uint64_t)(uintptr_t)handlers, top = RING1_KERNEL_WINDOW + RING1_HYPERVISOR_VIRT_START;
    struct trap_info bad[] = {
        {.vector = 2, .cs = 0x33, .address = at}, {.vector = 8, .cs = 0x33, .address = at},
        {.vector = 18, .cs = 0x33, .address = at}, {.vector = 4, .cs = 0x33, .flags = 0x10, .address = at},
        {.vector = 4, .cs = 0x33, .flags = 0x80, .address = at}, {.vector = 4, .cs = 0x30, .address = at},
        {.vector = 4, .cs = 0, .address = at}, {.vector = 4, .cs = 0x33, .address = 1ull << 47},
        {.vector = 4, .cs = 0x33, .address = ~0ull}, {.vector = 4, .cs = 0x33, .address = top},
        {.vector = 4, .cs = 0x33, .address = RING1_KERNEL_WINDOW + RING1_MONITOR_CODE},
        {.vector = 4, .cs = 0x33, .address = RING1_KERNEL_WINDOW + RING1_SHARED_INFO},
        {.vector = 4, .cs = 0x33, .address = top + 15 * RING1_SPACE_BYTES},
        {.vector = 14, .cs = 0x33, .flags = 8 | 3, .address = at},
        {.vector = 4, .cs = 0x33, .flags = 8 | 3, .address = at}, {.vector = 0x80, .cs = 0x33, .flags = 3, .address = at},
        {.vector = 0x80, .cs = 0x33, .flags = 8, .address = at}, {.vector = 0x80, .cs = 0x33, .flags = 8 | 4 | 3, .address = at},
        {.vector = 0x80, .cs = 0x33, .flags = 8 | 3, .address = top}, {.vector = 0x80, .cs = 0x30, .flags = 8 | 3, .address = at},
        {.vector = 0x80, .cs = 0x33, .flags = 8 | 3, .address = 1ull << 47},
        {.vector = 0x80, .cs = 0x33, .flags = 0x18 | 3, .address = at},
        {.vector = 0x80, .cs = 0x33, .flags = 8 | 1, .address = at}, {.vector = 6, .cs = 0x33, .flags = 8, .address = at},
    };

    for (uint32_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        note(after(bad[i]));
        word(traps->trap[3] && !traps->trap[bad[i].vector] && !traps->trap[6] ? "stands" : "DIFFERS");
        if (i % 8 == 7)
            flush();
    }
    note(CALL(__HYPERVISOR_set_trap_table, 8)); /* nothing is mapped there */
    note(after((struct trap_info){.vector = 0x80, .cs = 0x33, .flags = 8 | 3, .address = at}));
    word(traps->trap[6] && !traps->trap[0x80] ? "fast" : "DIFFERS");
    note(CALL(__HYPERVISOR_set_callbacks, top, at)), note(CALL(__HYPERVISOR_set_callbacks, at, 1ull << 47));
    note(CALL(__HYPERVISOR_stack_switch, 0x2b, top)), note(CALL(__HYPERVISOR_stack_switch, 0x28, at));
    note((int64_t)(traps->event | traps->failsafe | traps->kernel_sp));
}

/* ---- who writes the page of handlers */

static void store(void)
{
    handle(14, 0);
    RAISE("movabs $0x207ffc004030,%%rcx", "mov %%rax,(%%rcx)");
    told("store");
    CALL(__HYPERVISOR_set_trap_table, 0);
    RAISE("movabs $0x207ffc004030,%%rcx", "mov %%rax,(%%rcx)"); /* the same without anybody who goes on behind it */
    word("LIVED");
}

/* ---- handlers */

static void handler(uint32_t vector, uint64_t address)
{
    note(register_one(vector, 0, address));
    flush();
    RAISE("", "ud2");
    word("LIVED");
}

/* In turn, as fast as they are told, while exceptions are raised: each enters the one or the other. */
static void changes(uint64_t rounds)
{
    static struct trap_info one[2] = {{.vector = 3, .cs = 0x33}};
    uint64_t raised = 0;

    handle(3, 0);
    times = twins = 0;
    for (uint64_t i = 0; i < rounds; i++) {
        struct { int32_t fd; int16_t events, revents; } reply = {RING1_FD_REPLY, 1 /* POLLIN */, 0};
        int64_t now[2] = {0, 0};
        uint64_t at = VIRT(one);

        one[0].address = (uint64_t)(uintptr_t)(i % 2 ? handlers + 48 : twin_handler);
        hypercall_begin(__HYPERVISOR_set_trap_table, &at, 1);
        do {
            __asm__ volatile("int3" : : : "memory");
            raised++;
        } while (SYS5(SYS_ppoll, &reply, 1, now, 0, 8) != 1);
        hypercall_end();
    }
    word(times + twins == raised ? "all" : "LOST");
    word(times && twins ? "both" : "ONE");
}

/* ---- stacks: everything is handled, and nothing can be */

static void on_stack(uint64_t stack)
{
    handle_all();
    RAISE_ON(stack, "ud2");
    word("LIVED");
}

/* A stack whose page has lost its host mapping is filled in the middle of the push. */
static void on_lost_page(void)
{
    struct mmuext_op op = {.cmd = MMUEXT_INVLPG_LOCAL, .arg1 = VIRT(page(4))};

    handle_all();
    *(volatile uint64_t *)page(4) = 1;
    note(CALL(__HYPERVISOR_mmuext_op, VIRT(&op), 1, 0, DOMID_SELF));
    say("hypervisor: counters");
    RAISE_ON((uint64_t)(uintptr_t)page(4) + 4096, "ud2");
    say("hypervisor: counters");
    told("filled");
}

static uint64_t entry_stack(void)
{
    struct { uint64_t at; int32_t flags; uint64_t size; } old;

    SYS2(SYS_sigaltstack, 0, &old);
    return old.at;
}

/* ---- the entry code itself: its address is no secret, nor are its variables out of reach */

static uint64_t entry_code(void)
{
    uint64_t old[4] = {0};

    SYS4(SYS_rt_sigaction, RING1_UPCALL_SIGNAL, 0, old, 8);
    return old[0];
}

/* Called by hand, with a signal frame that is nowhere: its own access faults, which is a page fault like any other. Twice, so that
 * what the first one left behind would be seen. */
static void called(uint64_t context)
{
    void (*upcall)(int, void *, void *) = (void (*)(int, void *, void *))(uintptr_t)entry_code();

    handle_all();
    note(CALL(__HYPERVISOR_set_callbacks, (uint64_t)(uintptr_t)event_handler, 0));
    *(volatile uint8_t *)HOST(RING1_SHARED_INFO) = 1;
    for (uint32_t i = 0; i < 2; i++) {
        __asm__ volatile("lea 1f(%%rip),%%rax\n mov %%rax,resume(%%rip)\n mov %%rsp,resume_rsp(%%rip)\n"
                         "mov %0,%%rdx\n call *%1\n1:"
                         : : "r"(context), "r"(upcall) : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "memory", "cc");
        note((int64_t)seen.vector);
    }
    flush();
    RAISE("", "ud2");
    told("after");
}

static void spoiled(void)
{
    volatile uint8_t *at = (volatile uint8_t *)(uintptr_t)entry_stack();

    handle_all();
    for (int i = -256; i < (64 << 10) + 256; i++)
        at[i] = 0xff;
    RAISE("", "ud2");
    word("LIVED");
}

static void raise_nothing_handled(const char *what)
{
    if (same(what, "div"))
        RAISE("xor %%ecx,%%ecx\n xor %%edx,%%edx\n mov $1,%%eax", "div %%ecx");
    else if (same(what, "ud2"))
        RAISE("", "ud2");
    else if (same(what, "cli"))
        RAISE("", "cli");
    else if (same(what, "int3"))
        RAISE("", "int3");
    else if (same(what, "outside"))
        RAISE("mov $8,%%ecx", "movb $1,(%%rcx)");
    word("LIVED");
}

int case_hostile(const char *name)
{
    CASE("table", table())
    CASE("store", store())
    CASE("changes", changes(500))
    CASE("handler-faults", handler(6, (uint64_t)(uintptr_t)faulting_handler))
    CASE("handler-nowhere", handler(6, RING1_KERNEL_WINDOW + 16))
    CASE("handler-data", handler(6, (uint64_t)(uintptr_t)page(3)))
    CASE("handler-outside", handler(6, 64))
    CASE("handler-on-top", handler(6, RING1_KERNEL_WINDOW + RING1_MONITOR_CODE))
    CASE("stack-null", on_stack(0x1000))
    CASE("stack-0", on_stack(0))
    CASE("stack-not-canonical", on_stack(1ull << 63))
    CASE("stack-last", on_stack(~0ull))
    CASE("stack-commands", on_stack(RING1_KERNEL_WINDOW + RING1_COMMANDS + 0x800))
    CASE("stack-traps", on_stack(RING1_KERNEL_WINDOW + RING1_TRAP_TABLE + 0x1000))
    CASE("stack-shared-info", on_stack(RING1_KERNEL_WINDOW + RING1_SHARED_INFO + 0x1000))
    CASE("stack-below-top", on_stack(RING1_KERNEL_WINDOW + RING1_HYPERVISOR_VIRT_START + 150))
    CASE("stack-code", on_stack((uint64_t)(uintptr_t)handlers + 2048))
    CASE("stack-page-table", on_stack((uint64_t)(uintptr_t)HOST(start_page->xen.pt_base) + 4096))
    CASE("stack-grants", on_stack(RING1_KERNEL_WINDOW + RING1_GRANT_BASE + 4096))
    CASE("stack-entry-code", on_stack(entry_stack() + 4096))
    CASE("stack-lost-page", on_lost_page())
    CASE("called", called(RING1_KERNEL_WINDOW + 32))
    CASE("called-outside", called(32))
    CASE("spoiled", spoiled())
    CASE("none-div", raise_nothing_handled("div"))
    CASE("none-ud2", raise_nothing_handled("ud2"))
    CASE("none-cli", raise_nothing_handled("cli"))
    CASE("none-int3", raise_nothing_handled("int3"))
    CASE("none-outside", raise_nothing_handled("outside"))
    return 0;
}
