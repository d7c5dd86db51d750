/* Stores, one after another, at an address that the hypervisor goes on taking away and giving back until it says stop. What it
 * does meanwhile, and how it knows that no store came late, is in paging_hammer.py. */
#include "paging.h"

/* Words of the store's page, which nobody else uses here. */
enum { STOP, PROGRESS };

static void wish(const char *what, const uint64_t *numbers, uint32_t n)
{
    char text[200], *at = put_text(put_text(text, "hypervisor: "), what);

    for (uint32_t i = 0; i < n; i++)
        at = put_decimal(put_text(at, " "), (int64_t)numbers[i]);
    say(text);
}

static void store_until_told(volatile uint64_t *at)
{
    volatile uint64_t *shared = HOST(RING1_VIRT_BASE + start_page->xen.store_pfn * RING1_PAGE_SIZE);
    uint64_t done = 0, value;

    for (value = 2; !shared[STOP]; value += 2)
        if (try_store(at, value))
            shared[PROGRESS] = ++done;
    note(done > 0);
}

static void at_entry(const char *how)
{
    uint64_t root = space(0, mfn_of(spare(4)), DATA, UPPER), *seen = load(root);
    const uint64_t frames[] = {
        number("rounds="), mfn_of(spare(4)), mfn_of(spare(5)), mfn_of(spare(2)), mfn_of(spare(1)), root,
    };

    note(remap(spare(4), 0));
    note(remap(spare(5), 0));
    wish(how, frames, 6);
    store_until_told(seen);
}

static void at_grant(void)
{
    struct gnttab_map_grant_ref map = {
        .host_addr = RING1_GRANT_BASE, .flags = GNTMAP_host_map, .ref = (uint32_t)number("secret_gref="),
        .dom = (uint16_t)number("granter="),
    };
    const uint64_t frames[] = {number("rounds="), number("secret=")};

    CALL(__HYPERVISOR_grant_table_op, GNTTABOP_map_grant_ref, VIRT(&map), 1);
    note(map.status);
    wish("revoke-grant", frames, 2);
    store_until_told(HOST(RING1_GRANT_BASE));
}

/* The monitor is spoiled under a kernel that goes on asking for it, and never sleeps: eight times a page is taken away and
 * given back. */
static void without_monitor(const char *how)
{
    uint64_t *p = spare(0);

    wish(how, 0, 0);
    for (uint32_t i = 0; i < 8; i++) {
        uint64_t request[2] = {boot_entry(p), ENTRY(mfn_of(p), TABLE)};

        hypercall_begin(OP_MMU_UPDATE, (const uint64_t[]){VIRT(request), 1, 0, DOMID_SELF}, 4);
        while (!there_is_a_reply())
            try_store(p, STORED);
        note(hypercall_end());
        attempt(p);
        remap(p, ENTRY(mfn_of(p), DATA));
        try_store(p, STORED);
    }
}

/* Calls that take the hypervisor as long as calls can, one after the other: 512 times all translations, or 256 times a tree of
 * 32 full tables that becomes one and is taken apart. */
static void storm(int of_pins)
{
    static uint64_t ops[512][3];
    uint64_t *l2 = spare(0), *p = spare(40);

    for (uint32_t t = 1; t <= 32; t++) {
        for (uint32_t i = 0; i < ENTRIES; i++)
            spare(t)[i] = ENTRY(mfn_of(p), DATA);
        l2[t] = ENTRY(mfn_of(spare(t)), UPPER);
        remap(spare(t), ENTRY(mfn_of(spare(t)), TABLE));
    }
    remap(l2, ENTRY(mfn_of(l2), TABLE));
    for (uint32_t i = 0; i < 512; i++)
        ops[i][0] = !of_pins ? TLB_FLUSH : i & 1 ? UNPIN : PIN_L2, ops[i][1] = mfn_of(l2);
    for (uint64_t i = number("rounds="); i; i--)
        note(CALL(OP_MMUEXT, VIRT(ops), 512, 0, DOMID_SELF));
}

/* A hypercall ring that is never empty, of calls that the hypervisor serves in Python: nobody waits for the doorbell. */
static void full_ring(void)
{
    struct ring1_sring *ring = (void *)spare(0);
    struct multicall_entry *slots = (void *)(spare(0) + 8);
    uint32_t prod = 0, rings = 0, rung = 0, count = (uint32_t)number("rounds=") * 1000;

    ring->req_event = ring->rsp_event = 1;
    note(CALL(RING1_OP_callring, RING1_CALLRING_setup, VIRT(ring)));
    while (prod != count) {
        while (prod - __atomic_load_n(&ring->rsp_prod, __ATOMIC_ACQUIRE) < 32 && prod != count)
            slots[prod++ % 32] = (struct multicall_entry){.op = __HYPERVISOR_xen_version, .args = {XENVER_version}};
        __atomic_store_n(&ring->req_prod, prod, __ATOMIC_SEQ_CST);
        if (rung && there_is_a_reply())
            rung = hypercall_end() != 0;
        if (!rung)
            hypercall_begin(RING1_OP_callring, (const uint64_t[]){RING1_CALLRING_kick}, 1), rings++;
        rung = 1;
    }
    hypercall_end();
    note(rings < count / 64);
}

/* Short calls, until the hypervisor says stop. */
static void neighbour(void)
{
    volatile uint64_t *shared = HOST(RING1_VIRT_BASE + start_page->xen.store_pfn * RING1_PAGE_SIZE);

    while (!shared[STOP])
        CALL(__HYPERVISOR_xen_version, XENVER_version);
}

int attack_hammer(const char *name)
{
    ATTACK("hammer-entry", at_entry("revoke-entry"))
    ATTACK("hammer-transfer", at_entry("revoke-transfer"))
    ATTACK("hammer-upper", at_entry("revoke-upper"))
    ATTACK("hammer-window", at_entry("revoke-window"))
    ATTACK("hammer-flush", at_entry("revoke-flush"))
    ATTACK("hammer-grant", at_grant())
    ATTACK("hammer-flushes", storm(0))
    ATTACK("hammer-pins", storm(1))
    ATTACK("hammer-ring", full_ring())
    ATTACK("hammer-neighbour", neighbour())
    ATTACK("hammer-monitor-killed", without_monitor("monitor-killed"))
    ATTACK("hammer-monitor-stopped", without_monitor("monitor-stopped"))
    ATTACK("hammer-monitor-starved", without_monitor("monitor-starved"))
    ATTACK("hammer-monitor-killed-later", wish("monitor-killed-later", 0, 0); store_until_told(spare(0)))
    return 0;
}
