/* A kernel that tries to write what it must not, by page tables. Its command line says how:
 *
 *     attack=NAME granter=DOMID table=MFN secret=MFN table_gref=G secret_gref=G readonly_gref=G taker_gref=G free=MFN
 *     nr_frames=N rounds=N
 *
 * It says one line of results; test_paging.py has what each must be. Every attack ends in stores: a fault is seen by the
 * handler of vector 14, which goes on behind the store. */
#include "paging.h"

static char line[512], *end;
uint64_t fault_resume __attribute__((visibility("hidden")));
uint32_t fault_count __attribute__((visibility("hidden")));
void page_fault_entry(void) __attribute__((visibility("hidden")));

/* Entered with the error code on the stack, then rip. A fault that nobody expects ends us. */
__asm__(".globl page_fault_entry\n.hidden page_fault_entry\npage_fault_entry:\n"
        "    push %rax\n"
        "    mov fault_resume(%rip), %rax\n"
        "    test %rax, %rax\n"
        "    jz 1f\n"
        "    mov %rax, 16(%rsp)\n"
        "    incl fault_count(%rip)\n"
        "    pop %rax\n"
        "    add $8, %rsp\n"
        "    iretq\n"
        "1:  ud2\n");

static void must(int64_t result)
{
    if (result < 0)
        word("SETUP"), note(result);
}

void handle_faults(void)
{
    struct { uint8_t vector, flags; uint16_t cs; uint32_t pad; uint64_t address; } traps[2] = {
        {.vector = 14, .flags = 3, .cs = 0x33, .address = (uint64_t)(uintptr_t)page_fault_entry}, {.address = 0},
    };

    must(CALL(OP_SET_TRAP_TABLE, VIRT(traps)));
}

int try_store(volatile uint64_t *at, uint64_t value)
{
    uint32_t before = fault_count;

    __asm__ volatile("lea 1f(%%rip), %%rax\n mov %%rax, fault_resume(%%rip)\n mov %1, (%0)\n"
                     "1: movq $0, fault_resume(%%rip)"
                     : : "r"(at), "r"(value) : "rax", "memory");
    return *(volatile uint32_t *)&fault_count == before;
}

int there_is_a_reply(void)
{
    struct { int32_t fd; int16_t events, revents; } one = {RING1_FD_REPLY, 1 /* POLLIN */, 0};
    int64_t now[2] = {0, 0};

    return SYS5(SYS_ppoll, &one, 1, now, 0, 8) == 1;
}

/* ---- what it says */

void word(const char *text) { end = put_text(put_text(end, end == line ? "" : " "), text); }
void attempt(volatile uint64_t *at) { word(try_store(at, STORED) ? "ALLOWED" : "faulted"); }

void note(int64_t result)
{
    char digits[24];

    put_decimal(digits, result);
    word(digits);
}

void unchanged(const uint64_t *page)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < ENTRIES; i++)
        sum |= ((const volatile uint64_t *)page)[i];
    word(sum ? "CHANGED" : "unchanged");
}

uint64_t number(const char *key)
{
    const char *text = option(key);
    uint64_t value = 0;

    for (; text && *text >= '0' && *text <= '9'; text++)
        value = value * 10 + (uint64_t)(*text - '0');
    return value;
}

/* ---- frames and tables */

static uint64_t first_table(void) { return (start_page->xen.pt_base - RING1_VIRT_BASE) / RING1_PAGE_SIZE; }
static uint64_t mfn_at(uint64_t pfn) { return ((const uint64_t *)HOST(start_page->xen.mfn_list))[pfn]; }

uint64_t mfn_of(const void *page) { return mfn_at((VIRT(page) - RING1_VIRT_BASE) / RING1_PAGE_SIZE); }

uint64_t *spare(uint32_t n)
{
    return HOST(RING1_VIRT_BASE + (first_table() + start_page->xen.nr_pt_frames + n) * RING1_PAGE_SIZE);
}

uint64_t boot_root(void) { return mfn_at(first_table()); }

int64_t update(uint64_t ptr, uint64_t entry)
{
    uint64_t request[2] = {ptr, entry};

    return CALL(OP_MMU_UPDATE, VIRT(request), 1, 0, DOMID_SELF);
}

int64_t set_entry(uint64_t table, uint32_t slot, uint64_t entry) { return update(table << 12 | slot * 8u, entry); }

/* The boot tables: a root, one L2, then the L1 tables in order. */
uint64_t boot_entry(const void *page)
{
    uint64_t at = VIRT(page) >> 12;

    return mfn_at(first_table() + 2 + at / ENTRIES) << 12 | at % ENTRIES * 8;
}

int64_t remap(const void *page, uint64_t entry) { return update(boot_entry(page), entry); }

int64_t extend(uint32_t command, uint64_t arg1, uint64_t arg2)
{
    uint64_t op[3] = {command, arg1, arg2};

    return CALL(OP_MMUEXT, VIRT(op), 1, 0, DOMID_SELF);
}

uint64_t *table(uint32_t n, uint32_t level)
{
    uint64_t *page = spare(n), list[1] = {mfn_of(page)};

    must(remap(page, ENTRY(mfn_of(page), TABLE)));
    must(level ? extend(PIN_L1 + level - 1, mfn_of(page), 0) : CALL(OP_SET_GDT, VIRT(list), ENTRIES));
    return page;
}

uint64_t space(uint32_t n, uint64_t mfn, uint64_t flags, uint64_t upper)
{
    uint64_t *root = spare(n), *l2 = spare(n + 1), *l1 = spare(n + 2);

    root[0] = ENTRY(mfn_of(l2), UPPER);
    l2[0] = ENTRY(mfn_of(l1), upper);
    l1[SEEN_SLOT] = ENTRY(mfn, flags);
    for (uint32_t i = 0; i < 3; i++)
        must(remap(spare(n + i), ENTRY(mfn_of(spare(n + i)), TABLE)));
    must(extend(PIN_L3, mfn_of(root), 0));
    return mfn_of(root);
}

uint64_t *load(uint64_t root)
{
    must(extend(NEW_BASEPTR, root, 0));
    return (uint64_t *)(uintptr_t)(*(volatile uint64_t *)HOST(RING1_SHARED_INFO + 3136) + SEEN_SLOT * RING1_PAGE_SIZE);
}

void load_boot(void) { must(extend(NEW_BASEPTR, boot_root(), 0)); }

int kernel_main(void)
{
    const char *at = option("attack=");
    char name[64];
    uint32_t n = 0;

    while (*at && *at != ' ' && n < sizeof name - 1)
        name[n++] = *at++;
    name[n] = 0;
    end = line;
    handle_faults();
    if (!attack_tables(name) && !attack_pins(name) && !attack_memory(name) && !attack_grants(name) && !attack_hammer(name) &&
        !attack_stores(name))
        return 2; /* no such attack */
    say(line);
    return 0;
}
