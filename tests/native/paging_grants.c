/* Frames that two domains have: `granter` grants us its frame `secret` (for writing), and its page table `table`. */
#include "paging.h"

#define AT(n) (RING1_GRANT_BASE + (n) * RING1_PAGE_SIZE)

static uint32_t last_handle;

static int64_t map_grant(uint64_t domid, uint64_t gref, uint32_t flags, uint64_t va)
{
    struct gnttab_map_grant_ref map = {
        .host_addr = va, .flags = GNTMAP_host_map | flags, .ref = (uint32_t)gref, .dom = (uint16_t)domid,
    };

    CALL(__HYPERVISOR_grant_table_op, GNTTABOP_map_grant_ref, VIRT(&map), 1);
    last_handle = map.handle;
    return map.status;
}

static int64_t unmap_grant(uint64_t va, uint32_t handle)
{
    struct gnttab_unmap_grant_ref unmap = {.host_addr = va, .handle = handle};

    CALL(__HYPERVISOR_grant_table_op, GNTTABOP_unmap_grant_ref, VIRT(&unmap), 1);
    return unmap.status;
}

static void grant(uint64_t gref, uint64_t domid, uint64_t mfn, uint16_t flags)
{
    volatile struct grant_entry_v1 *entry = (struct grant_entry_v1 *)HOST(start_page->own.grant_table) + gref;

    entry->domid = (uint16_t)domid;
    entry->frame = (uint32_t)mfn;
    __atomic_store_n(&entry->flags, flags, __ATOMIC_SEQ_CST);
}

/* Another domain's page table, which it grants to us for writing. */
static void others_table(void)
{
    note(map_grant(number("granter="), number("table_gref="), 0, AT(0)));
    attempt(HOST(AT(0)));
    note(map_grant(number("granter="), number("table_gref="), GNTMAP_readonly, AT(0)));
    attempt(HOST(AT(0)));
}

/* The same by a store, where a store to a table is a request. */
static void store_to_others_table(void)
{
    note(assist(1));
    note(map_grant(number("granter="), number("table_gref="), GNTMAP_readonly, AT(0)));
    attempt(HOST(AT(0)));
}

/* What was granted for reading only. */
static void readonly(void)
{
    note(map_grant(number("granter="), number("readonly_gref="), 0, AT(0)));
    note(map_grant(number("granter="), number("readonly_gref="), GNTMAP_readonly, AT(0)));
    attempt(HOST(AT(0)));
}

/* Our own table, granted by ourselves to ourselves; then the other way round: first mapped, then a table. */
static void own_table(void)
{
    uint64_t *t = table(0, 1), *p = spare(1), me = start_page->own.domid;

    grant(20, me, mfn_of(t), GTF_permit_access);
    note(map_grant(DOMID_SELF, 20, 0, AT(0)));
    attempt(HOST(AT(0)));
    grant(21, me, mfn_of(p), GTF_permit_access);
    note(map_grant(me, 21, 0, AT(1)));
    note(try_store(HOST(AT(1)), STORED));
    note(remap(p, ENTRY(mfn_of(p), TABLE)));
    note(extend(PIN_L1, mfn_of(p), 0));
    note(unmap_grant(AT(1), last_handle));
    note(extend(PIN_L1, mfn_of(p), 0));
    attempt(HOST(AT(1)));
    attempt(p);
}

static int64_t copy_into(uint64_t frame, uint64_t domid, uint16_t flags, const uint64_t *from)
{
    struct gnttab_copy copy = {
        .source = {.frame = mfn_of(from), .domid = DOMID_SELF}, .dest = {.frame = frame, .domid = (uint16_t)domid},
        .len = 64, .flags = flags,
    };

    CALL(__HYPERVISOR_grant_table_op, GNTTABOP_copy, VIRT(&copy), 1);
    return copy.status;
}

static void copy_into_table(void)
{
    uint64_t *t = table(0, 1), *p = spare(1), me = start_page->own.domid;

    p[0] = 2;
    note(copy_into(mfn_of(t), DOMID_SELF, 0, p));
    grant(20, me, mfn_of(t), GTF_permit_access);
    note(copy_into(20, me, GNTCOPY_dest_gref, p));
    note(copy_into(number("table_gref="), number("granter="), GNTCOPY_dest_gref, p));
    note(copy_into(number("secret="), DOMID_SELF, 0, p));
    note(copy_into(mfn_of(table(2, 0)), DOMID_SELF, 0, p));
    unchanged(t);
    attempt(t);
}

static int64_t transfer(uint64_t mfn)
{
    struct gnttab_transfer gift = {.mfn = mfn, .domid = (uint16_t)number("granter="), .ref = (uint32_t)number("taker_gref=")};

    CALL(__HYPERVISOR_grant_table_op, GNTTABOP_transfer, VIRT(&gift), 1);
    return gift.status;
}

static void transfers(void)
{
    uint64_t *t = table(0, 1), *p = spare(1);

    note(transfer(mfn_of(t)));
    note(remap(t, 0));
    note(transfer(mfn_of(t)));
    note(try_store(p, STORED));
    note(transfer(mfn_of(p)));
    note(remap(p, 0));
    note(transfer(mfn_of(p)));
    attempt(p);
    note(remap(p, ENTRY(mfn_of(p), DATA)));
    attempt(p);
}

static void unmapped(void)
{
    note(map_grant(number("granter="), number("secret_gref="), 0, AT(0)));
    note(try_store(HOST(AT(0)), 2));
    note(unmap_grant(AT(0), last_handle));
    attempt(HOST(AT(0)));
    note(remap(spare(0), ENTRY(number("secret="), DATA)));
}

/* The granter ends while its frame is mapped here: a page of zeros stands in its place, which is ours alone. The machine that
 * runs us looks whether a store gets through to the frame. */
static void granter_dies(void)
{
    volatile uint64_t *at = HOST(AT(0));
    uint64_t value = 2;

    note(map_grant(number("granter="), number("secret_gref="), 0, AT(0)));
    note(*at != 0);
    say("hypervisor: end-granter");
    do
        value += 2;
    while (try_store(at + 1, value) && *at);
    note((int64_t)*at);
    say("hypervisor: is-it-gone");
    note(try_store(at, STORED));
    say("hypervisor: look-at-secret");
    note(unmap_grant(AT(0), last_handle));
    attempt(at);
}

int attack_grants(const char *name)
{
    ATTACK("grant-table", others_table())
    ATTACK("store-others-table", store_to_others_table())
    ATTACK("grant-readonly", readonly())
    ATTACK("grant-own-table", own_table())
    ATTACK("grant-copy", copy_into_table())
    ATTACK("grant-unmapped", unmapped())
    ATTACK("transfer", transfers())
    ATTACK("granter-dies", granter_dies())
    return 0;
}
