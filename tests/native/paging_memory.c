/* Frames that leave and come, and what the hypervisor writes at addresses that we choose: none of it goes into a table. */
#include "paging.h"

static int64_t give_back(uint64_t mfn)
{
    uint64_t list[1] = {mfn};

    return CALL(__HYPERVISOR_memory_op, DECREASE, VIRT(list), 1, 0);
}

/* A page that is mapped stays. If it does not, the store goes into a frame that is anybody's. */
static void refused_gift(uint64_t *page)
{
    int64_t result = give_back(mfn_of(page));

    note(result);
    if (result)
        attempt(page);
}

static void decrease(void)
{
    uint64_t *t = table(0, 1), *p = spare(1), *gdt = table(2, 0);

    note(give_back(mfn_of(t)));
    attempt(t);
    note(remap(t, 0));
    note(give_back(mfn_of(t))); /* still pinned */
    note(remap(gdt, 0));
    note(give_back(mfn_of(gdt)));
    note(try_store(p, STORED));
    refused_gift(p);
    note(remap(p, 0));
    note(give_back(mfn_of(p)));
    attempt(p);
    note(remap(p, ENTRY(mfn_of(p), DATA)));
    note(give_back(mfn_of(p)));
    note(give_back(boot_root()));
}

static void exchange(void)
{
    uint64_t *p = spare(0), *t = table(1, 1), gone[1] = {mfn_of(p)};
    uint64_t come[1] = {0x7ffffff}; /* a pfn, and no mfn of ours by chance: it may stay here */

    note(try_store(p, STORED));
    note(CALL(__HYPERVISOR_memory_op, EXCHANGE, VIRT(gone), 1, 0, VIRT(come), 1, 0));
    note(remap(p, 0));
    note(CALL(__HYPERVISOR_memory_op, EXCHANGE, VIRT(gone), 1, 0, VIRT(t), 1, 0)); /* its answer into a table */
    unchanged(t);
    note(CALL(__HYPERVISOR_memory_op, EXCHANGE, VIRT(gone), 1, 0, VIRT(come), 1, 0));
    attempt(p);
    note(remap(p, ENTRY(gone[0], DATA)));
    note(remap(p, ENTRY(come[0], DATA)));
    note(try_store(p, STORED));
    gone[0] = mfn_of(t);
    note(CALL(__HYPERVISOR_memory_op, EXCHANGE, VIRT(gone), 1, 0, VIRT(come), 1, 0));
    attempt(t);
}

/* A frame goes, another comes, perhaps the same: where it was mapped nothing is. */
static void balloon(void)
{
    uint64_t *p = spare(0), *q = spare(1), list[1] = {3};

    note(try_store(p, STORED));
    note(remap(p, 0));
    note(give_back(mfn_of(p)));
    note(CALL(__HYPERVISOR_memory_op, POPULATE, VIRT(list), 1, 0));
    note(remap(q, ENTRY(list[0], TABLE)));
    note(extend(PIN_L1, list[0], 0));
    attempt(p);
    attempt(q);
    unchanged(q);
}

static void fill_page(void)
{
    uint64_t *t = table(0, 1), *gdt = table(1, 0), *p = spare(2);

    p[0] = 2;
    note(extend(CLEAR_PAGE, mfn_of(t), 0));
    note(extend(COPY_PAGE, mfn_of(t), mfn_of(p)));
    note(extend(COPY_PAGE, mfn_of(gdt), mfn_of(p)));
    note(extend(COPY_PAGE, boot_root(), mfn_of(p)));
    note(extend(CLEAR_PAGE, number("secret="), 0));
    note(extend(COPY_PAGE, mfn_of(p), number("secret=")));
    unchanged(t);
    unchanged(gdt);
    attempt(t);
    attempt(gdt);
}

/* Every call that answers at an address: in a table's page, and across the end of a page before it. */
static void answers(void)
{
    uint64_t *before = spare(0), *t = table(1, 1), at = VIRT(t), list[3] = {PIN_L1, 0, 0};
    struct multicall_entry *entries = (void *)(before + ENTRIES - 8);

    note(CALL(OP_MMU_UPDATE, VIRT(list), 0, at, DOMID_SELF));
    note(CALL(OP_MMU_UPDATE, VIRT(list), 0, at - 2, DOMID_SELF));
    note(CALL(OP_MMUEXT, VIRT(list), 0, at, DOMID_SELF));
    note(CALL(OP_MMUEXT, VIRT(list), 1, at, DOMID_SELF));
    note(CALL(__HYPERVISOR_multicall, at, 1));
    entries->op = __HYPERVISOR_sched_op; /* and a second one, of the table's zeros */
    note(CALL(__HYPERVISOR_multicall, VIRT(entries), 2));
    note(CALL(__HYPERVISOR_grant_table_op, GNTTABOP_map_grant_ref, at, 1));
    note(CALL(__HYPERVISOR_grant_table_op, GNTTABOP_unmap_grant_ref, at, 1));
    note(CALL(__HYPERVISOR_grant_table_op, GNTTABOP_transfer, at, 1));
    note(CALL(__HYPERVISOR_grant_table_op, GNTTABOP_copy, at, 1));
    note(CALL(__HYPERVISOR_grant_table_op, GNTTABOP_setup_table, DOMID_SELF, 8, at));
    note(CALL(__HYPERVISOR_memory_op, INCREASE, at, 1, 0));
    note(CALL(__HYPERVISOR_memory_op, POPULATE, at, 1, 0));
    note(CALL(RING1_OP_callring, RING1_CALLRING_setup, at));
    note(CALL(__HYPERVISOR_domctl, 6, start_page->own.domid, 0, 8, at)); /* get_mem_list */
    note(CALL(__HYPERVISOR_sysctl, XEN_SYSCTL_readconsole, at, 64));
    unchanged(t);
    handle_faults(); /* a list entry of zeros is set_trap_table(0) */
    attempt(t);
}

/* The same, aimed at pages that only look as if they were ours. */
static void answers_elsewhere(void)
{
    uint64_t list[3] = {TLB_FLUSH, 0, 0};
    const uint64_t at[] = {
        RING1_COMMANDS, RING1_MONITOR_CODE, RING1_HYPERVISOR_VIRT_START + (1 << 20), RING1_GRANT_BASE, RING1_SHARED_INFO,
        RING1_SPACE_BYTES + SEEN_SLOT * RING1_PAGE_SIZE, 16 * RING1_SPACE_BYTES, ~0ull - 3,
        RING1_VIRT_BASE + RING1_KERNEL_PFN * RING1_PAGE_SIZE,
    };

    for (uint32_t i = 0; i < sizeof at / sizeof at[0]; i++)
        note(CALL(OP_MMUEXT, VIRT(list), 1, at[i], DOMID_SELF));
    attempt(HOST(RING1_COMMANDS));
    attempt(HOST(RING1_VIRT_BASE + RING1_KERNEL_PFN * RING1_PAGE_SIZE));
}

int attack_memory(const char *name)
{
    ATTACK("decrease", decrease())
    ATTACK("exchange", exchange())
    ATTACK("balloon", balloon())
    ATTACK("fill-page", fill_page())
    ATTACK("answers", answers())
    ATTACK("answers-elsewhere", answers_elsewhere())
    return 0;
}
