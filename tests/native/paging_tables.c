/* Entries: what mmu_update and update_va_mapping are asked to make writable. */
#include "paging.h"

/* The boot mapping shows a table read-only; an entry that would show it writable. */
static void writable_entry(uint32_t level)
{
    uint64_t *t = table(0, level);

    note(remap(t, ENTRY(mfn_of(t), DATA)));
    attempt(t + 511);
}

static void writable_boot_table(uint32_t which)
{
    uint64_t *t = (uint64_t *)HOST(start_page->xen.pt_base) + which * ENTRIES;

    note(remap(t, ENTRY(mfn_of(t), DATA)));
    attempt(t + 511);
}

static void by_va_mapping(void)
{
    uint64_t *t = table(0, 1);

    note(CALL(OP_UPDATE_VA_MAPPING, VIRT(t), ENTRY(mfn_of(t), DATA), 0));
    attempt(t);
}

/* The command that keeps A and D is no way round the check. */
static void by_preserve_ad(void)
{
    uint64_t *t = table(0, 1), at = boot_entry(spare(1)) | PRESERVE_AD;

    note(update(at, ENTRY(mfn_of(t), DATA)));
    attempt(t);
    note(remap(spare(1), ENTRY(mfn_of(t), TABLE)));
    note(update(at, ENTRY(mfn_of(t), DATA)));
    attempt(spare(1));
}

/* A page of one's own, then that page as a table below a window, with an entry for itself or for the table above it. */
static void own_entry(uint32_t level, uint64_t flags)
{
    uint64_t root = space(0, mfn_of(spare(4)), TABLE, UPPER), *seen;
    uint64_t t = level == 1 ? mfn_of(spare(2)) : level == 2 ? mfn_of(spare(1)) : root;

    seen = load(root);
    note(set_entry(t, SEEN_SLOT + (level > 1), ENTRY(t, flags)));
    attempt(level == 1 ? seen : spare(3 - level) + 511);
    load_boot();
    attempt(spare(3 - level) + 511);
}

/* An L2 as the L1 of a higher one: its entries, which are writable, would show its L1 tables. */
static void linear(void)
{
    uint64_t root = space(0, mfn_of(spare(4)), TABLE, UPPER);

    note(set_entry(root, 1, ENTRY(root, UPPER)));
    note(set_entry(mfn_of(spare(1)), 1, ENTRY(mfn_of(spare(1)), UPPER)));
    note(set_entry(mfn_of(spare(1)), 1, ENTRY(root, UPPER)));
    note(set_entry(root, 1, ENTRY(mfn_of(spare(2)), UPPER)));
    note(extend(PIN_L1, mfn_of(spare(1)), 0));
    attempt(load(root) + (1 << 18)); /* what slot 1 of the L2 would show */
    attempt(spare(1));
}

static void second_parent(void)
{
    uint64_t root = space(0, mfn_of(spare(4)), DATA, UPPER), *seen = load(root);

    note(set_entry(mfn_of(spare(1)), 1, ENTRY(mfn_of(spare(2)), UPPER)));
    note(set_entry(root, 1, ENTRY(mfn_of(spare(1)), UPPER)));
    attempt(seen + (1 << 18));
    attempt(seen + (1 << 27));
    attempt(spare(2));
}

/* What the level above allows counts, at once: its entry is taken back under a page that was written already. */
static void upper_rights(void)
{
    uint64_t *p = spare(4), root = space(0, mfn_of(p), DATA, PRESENT), *seen = load(root);

    note((int64_t)*(volatile uint64_t *)seen); /* it is mapped now, to be read */
    attempt(seen);
    note(set_entry(mfn_of(spare(1)), 0, ENTRY(mfn_of(spare(2)), UPPER)));
    note(try_store(seen, STORED));
    note(set_entry(mfn_of(spare(1)), 0, ENTRY(mfn_of(spare(2)), PRESENT)));
    attempt(seen);
    note(set_entry(mfn_of(spare(1)), 0, ENTRY(mfn_of(spare(2)), UPPER)));
    note(try_store(seen, STORED));
    note(set_entry(root, 0, 0));
    attempt(seen);
}

static void bits(void)
{
    uint64_t root = space(0, mfn_of(spare(4)), TABLE, UPPER), *seen = load(root), mfn = mfn_of(spare(5));
    static const uint8_t l1[] = {3, 4, 7}, upper[] = {3, 4, 7, 8};

    for (uint32_t i = 0; i < sizeof l1; i++)
        note(set_entry(mfn_of(spare(2)), SEEN_SLOT, ENTRY(mfn, DATA | 1ull << l1[i])));
    for (uint32_t i = 0; i < sizeof upper; i++)
        note(set_entry(mfn_of(spare(1)), 1, ENTRY(mfn, UPPER | 1ull << upper[i])));
    attempt(seen);
    attempt(seen + (1 << 18));
}

/* A frame that is not ours. */
static void others_frame(uint64_t mfn)
{
    uint64_t *p = spare(0);

    note(remap(p, 0));
    note(remap(p, ENTRY(mfn, DATA)));
    attempt(p);
    note(remap(p, ENTRY(mfn, TABLE)));
    attempt(p);
}

/* Slots of the hypervisor's: of our root from GRANT_BASE on, of every root in its last 64 MB. */
static void hypervisors_slots(void)
{
    uint64_t root = space(0, mfn_of(spare(4)), DATA, UPPER), *seen;

    note(set_entry(boot_root(), 256, ENTRY(mfn_of(table(5, 2)), UPPER)));
    note(set_entry(boot_root(), 511, ENTRY(mfn_of(spare(5)), UPPER)));
    note(set_entry(root, 511, ENTRY(mfn_of(spare(5)), UPPER)));
    note(set_entry(mfn_of(spare(5)), 480, ENTRY(mfn_of(table(6, 1)), UPPER)));
    note(set_entry(mfn_of(spare(5)), 511, ENTRY(mfn_of(spare(6)), UPPER)));
    note(set_entry(mfn_of(table(7, 2)), 480, ENTRY(mfn_of(spare(6)), UPPER)));
    note(set_entry(root, 511, 0));
    note(set_entry(root, 511, ENTRY(mfn_of(spare(7)), UPPER)));
    seen = load(root);
    attempt(seen - SEEN_SLOT * ENTRIES + RING1_HYPERVISOR_VIRT_START / 8);
    attempt(HOST(RING1_GRANT_BASE));
    attempt(HOST(RING1_COMMANDS));
}

static void hypervisors_pages(void)
{
    attempt(HOST(RING1_MONITOR_CODE));
    attempt(HOST(RING1_COMMANDS));
    attempt(HOST(RING1_COMMANDS + 2 * RING1_PAGE_SIZE));
    attempt(HOST(RING1_HYPERVISOR_VIRT_START + (1 << 20))); /* the M2P */
    attempt(HOST(RING1_HYPERVISOR_VIRT_START + (32 << 20)));
    attempt(HOST(RING1_SHARED_INFO - 8));
    attempt(HOST(RING1_GRANT_BASE));
    attempt(HOST(0));
}

/* mmu_update stores to frames that are no tables; of another's, or into ours, it is the same rule. */
static void plain_store(void)
{
    uint64_t granters_table = number("table="), *t = table(0, 1), *gdt = table(1, 0);
    uint64_t request[2] = {granters_table << 12, 0};

    note(update(granters_table << 12, 0));
    note(CALL(OP_MMU_UPDATE, VIRT(request), 1, 0, number("granter=")));
    note(CALL(OP_UPDATE_DESCRIPTOR, mfn_of(t) << 12, 0));
    note(update(mfn_of(gdt) << 12, 0));
    note(update(mfn_of(t) << 12 | 1, 5)); /* M2P of ours: allowed */
    note(update(granters_table << 12 | 1, 5));
    attempt(t);
    attempt(gdt);
}

int attack_tables(const char *name)
{
    ATTACK("entry-l1", writable_entry(1))
    ATTACK("entry-l2", writable_entry(2))
    ATTACK("entry-l3", writable_entry(3))
    ATTACK("entry-gdt", writable_entry(0))
    ATTACK("entry-boot-root", writable_boot_table(0))
    ATTACK("entry-boot-l2", writable_boot_table(1))
    ATTACK("entry-boot-l1", writable_boot_table(2))
    ATTACK("va-mapping", by_va_mapping())
    ATTACK("preserve-ad", by_preserve_ad())
    ATTACK("itself-l1", own_entry(1, DATA))
    ATTACK("itself-l1-readonly", own_entry(1, TABLE))
    ATTACK("itself-l2", own_entry(2, UPPER))
    ATTACK("itself-l3", own_entry(3, UPPER))
    ATTACK("linear", linear())
    ATTACK("second-parent", second_parent())
    ATTACK("upper-rights", upper_rights())
    ATTACK("bits", bits())
    ATTACK("foreign", others_frame(number("secret=")))
    ATTACK("free", others_frame(number("free=")))
    ATTACK("range", others_frame(number("nr_frames=")))
    ATTACK("far-range", others_frame((1ull << 40) - 1))
    ATTACK("slots", hypervisors_slots())
    ATTACK("pages", hypervisors_pages())
    ATTACK("plain-store", plain_store())
    return 0;
}
