/* Pins, roots and windows: frames that become tables while something can still write them. */
#include "paging.h"

static int64_t pin_l1(const uint64_t *page) { return extend(PIN_L1, mfn_of(page), 0); }
static int64_t make_readonly(const uint64_t *page) { return remap(page, ENTRY(mfn_of(page), TABLE)); }

/* A pin that is to be refused, since `at` can write the page. If it is not, the store goes into a table. */
static void refused_pin(const uint64_t *page, volatile uint64_t *at)
{
    int64_t result = pin_l1(page);

    note(result);
    if (result >= 0)
        attempt(at);
}

/* In this window. */
static void mapped_here(void)
{
    uint64_t *p = spare(0);

    note(try_store(p, STORED));
    refused_pin(p, p);
    note(make_readonly(p));
    note(pin_l1(p));
    attempt(p);
    note(extend(UNPIN, mfn_of(p), 0));
    note(remap(p, ENTRY(mfn_of(p), DATA)));
    refused_pin(p, p);
    note(make_readonly(p));
    note(extend(PIN_L2, mfn_of(p), 0));
    attempt(p);
}

/* In another window, or in a space that no window shows now. */
static void mapped_elsewhere(int leave)
{
    uint64_t *p = spare(4), root = space(0, mfn_of(p), DATA, UPPER), *seen = load(root);

    note(try_store(seen, STORED));
    if (leave)
        load_boot();
    note(make_readonly(p));
    refused_pin(p, seen);
    note(set_entry(mfn_of(spare(2)), SEEN_SLOT, ENTRY(mfn_of(p), TABLE)));
    note(pin_l1(p));
    attempt(p);
    attempt(seen);
}

static void mapped_twice(void)
{
    uint64_t *p = spare(0), *alias = spare(1);

    note(remap(alias, ENTRY(mfn_of(p), DATA)));
    note(try_store(p, STORED) + try_store(alias, STORED));
    note(make_readonly(p));
    refused_pin(p, alias);
    note(remap(alias, ENTRY(mfn_of(p), TABLE)));
    note(pin_l1(p));
    attempt(p);
    attempt(alias);
}

/* All in one list: no host mapping may outlive the entry. */
static void retype(void)
{
    uint64_t *p = spare(0), at = VIRT(p), pin[3] = {PIN_L1, mfn_of(p), 0};
    struct multicall_entry list[3] = {
        {.op = OP_UPDATE_VA_MAPPING, .args = {at, ENTRY(mfn_of(p), TABLE), 0}},
        {.op = OP_MMUEXT, .args = {VIRT(pin), 1, 0, DOMID_SELF}},
        {.op = OP_UPDATE_VA_MAPPING, .args = {at, ENTRY(mfn_of(p), DATA), 0}},
    };

    note(try_store(p, STORED));
    note(CALL(__HYPERVISOR_multicall, VIRT(list), 3));
    for (uint32_t i = 0; i < 3; i++)
        note(list[i].result);
    attempt(p);
}

/* One batch unmaps, and maps it elsewhere as a table's own page; another writable again: 512 requests, one flush. */
static void retype_in_one_batch(void)
{
    static uint64_t requests[2][2];
    uint64_t *p = spare(0), *other = spare(1);

    note(try_store(p, STORED));
    requests[0][0] = boot_entry(p);
    requests[0][1] = 0;
    requests[1][0] = boot_entry(other);
    requests[1][1] = ENTRY(mfn_of(p), TABLE);
    note(CALL(OP_MMU_UPDATE, VIRT(requests), 2, 0, DOMID_SELF));
    note(pin_l1(p));
    attempt(p);
    attempt(other);
}

/* The list's results would be written into the frame that it makes a table. Its words are no present entries, but one that
 * shows the frame itself, read-only: a good table. */
static void in_its_own_list(void)
{
    static uint64_t pins[2][3];
    uint64_t *p = spare(0);
    struct multicall_entry *list = (void *)p;

    pins[0][0] = PIN_L1, pins[0][1] = mfn_of(p), pins[1][0] = TLB_FLUSH;
    list[0].op = OP_UPDATE_VA_MAPPING, list[0].args[0] = VIRT(p), list[0].args[1] = ENTRY(mfn_of(p), TABLE);
    list[1].op = OP_MMUEXT, list[1].args[0] = VIRT(pins), list[1].args[1] = 2, list[1].args[3] = DOMID_SELF;
    list[0].result = list[1].result = 2;
    note(CALL(__HYPERVISOR_multicall, VIRT(list), 2));
    note(list[0].result);
    note(list[1].result);
    note(pin_l1(p)); /* it is pinned already */
    attempt(p + 511);
}

/* Frames that the hypervisor writes. */
static void held(void)
{
    struct ring1_sring *ring = (void *)spare(0);
    uint64_t *shared_info = HOST(RING1_VIRT_BASE), *grants = HOST(RING1_VIRT_BASE + RING1_GRANT_PFN * RING1_PAGE_SIZE);

    ring->req_event = ring->rsp_event = 2;
    note(CALL(RING1_OP_callring, RING1_CALLRING_setup, VIRT(ring)));
    ring->req_prod = 2; /* two calls, of zeros: their answers go into the page */
    note(make_readonly(spare(0)));
    note(pin_l1(spare(0)));
    if (CALL(RING1_OP_callring, RING1_CALLRING_kick) == 0 && extend(UNPIN, mfn_of(spare(0)), 0) >= 0)
        word("CHANGED");
    handle_faults();
    attempt(spare(0));
    note(make_readonly(shared_info));
    note(pin_l1(shared_info));
    attempt(shared_info);
    note(make_readonly(grants));
    note(pin_l1(grants));
    attempt(grants);
    note(remap(spare(0), 0));
    note(CALL(__HYPERVISOR_memory_op, DECREASE, VIRT((uint64_t[]){mfn_of(spare(0))}), 1, 0));
}

static void not_ours(void)
{
    note(extend(PIN_L1, number("secret="), 0));
    note(extend(PIN_L1, number("free="), 0));
    note(extend(PIN_L1, number("nr_frames="), 0));
    note(extend(PIN_L1, ~0ull, 0));
    note(extend(NEW_BASEPTR, number("secret="), 0));
    note(extend(UNPIN, number("table="), 0));
    note(extend(NEW_BASEPTR, mfn_of(table(0, 2)), 0));
    note(extend(PIN_L3, mfn_of(spare(0)), 0));
    note(extend(PIN_L2, mfn_of(table(1, 1)), 0));
    note(extend(PIN_L1, mfn_of(table(2, 0)), 0));
    attempt(spare(0));
    attempt(spare(1));
    attempt(spare(2));
}

/* A tree that holds a writable entry for one of its own tables, met before or after it is one. */
static void in_its_own_tree(uint64_t which)
{
    uint64_t *root = spare(0), *l2 = spare(1), *l1 = spare(2);

    l1[SEEN_SLOT] = ENTRY(mfn_of(spare(which)), DATA);
    l2[0] = ENTRY(mfn_of(l1), UPPER);
    root[0] = ENTRY(mfn_of(l2), UPPER);
    for (uint32_t i = 0; i < 3; i++)
        remap(spare(i), ENTRY(mfn_of(spare(i)), TABLE));
    note(extend(PIN_L3, mfn_of(root), 0));
    note(extend(PIN_L1, mfn_of(l1), 0));
    note(extend(PIN_L2, mfn_of(l2), 0));
    note(set_entry(mfn_of(l1), SEEN_SLOT, 0)); /* whatever it is now: a plain store, or an update */
    note(extend(PIN_L3, mfn_of(root), 0));
    attempt(load(mfn_of(root)));
    for (uint32_t i = 0; i < 3; i++)
        attempt(spare(i) + 511);
}

/* ---- roots and windows */

/* A page shown writable by one root; its window is left, its tables are given up, and the page becomes a table. */
static void unpinned_root(int while_current)
{
    uint64_t *p = spare(4), root = space(0, mfn_of(p), DATA, UPPER), *seen = load(root);

    note(try_store(seen, STORED));
    if (while_current)
        note(extend(UNPIN, root, 0));
    load_boot();
    if (!while_current)
        note(extend(UNPIN, root, 0));
    attempt(seen);
    note(make_readonly(p));
    note(pin_l1(p));
    attempt(seen);
    note(remap(spare(0), ENTRY(mfn_of(spare(0)), DATA))); /* the root is none any more */
    note(try_store(spare(0), STORED));
}

/* 17 roots, of which 15 have a window beside the first: what the two that lost theirs had mapped is gone. */
static void many_roots(void)
{
    uint64_t *seen[17], *p = spare(60), roots[17];
    uint32_t lost = 0;

    for (uint32_t i = 0; i < 17; i++) {
        roots[i] = space(3 * i, mfn_of(p), DATA, UPPER);
        seen[i] = load(roots[i]);
        lost += !try_store(seen[i], STORED);
    }
    note(lost);
    note(seen[15] == seen[0]);
    note(seen[16] == seen[1]);
    for (uint32_t i = 0; i < 17; i++)
        note(set_entry(mfn_of(spare(3 * i + 2)), SEEN_SLOT, 0));
    note(make_readonly(p));
    note(pin_l1(p));
    for (uint32_t i = 0; i < 15; i++)
        attempt(seen[i]);
    attempt(load(roots[0]));
}

/* A root with a writable page loses its window to others, and then its pin: what was mapped there, another root's tables
 * do not allow. */
static void evicted_root(void)
{
    uint64_t *p = spare(60), *seen = load(space(0, mfn_of(p), DATA, UPPER)), *now = 0;

    note(try_store(seen, STORED));
    for (uint32_t i = 1; i < 16; i++)
        now = load(space(3 * i, mfn_of(spare(61)), TABLE, UPPER));
    note(now == seen);
    note(extend(UNPIN, mfn_of(spare(0)), 0));
    note(make_readonly(p));
    note(pin_l1(p));
    attempt(seen);
}

/* Stores through a second space while a list takes both mappings away and pins: the fault handler's fills race with it. Every
 * store that is done is done before the reply: afterwards the frame holds the last one. */
static void race(void)
{
    uint64_t *p = spare(4), root = space(0, mfn_of(p), DATA, UPPER), *seen = load(root), l1 = mfn_of(spare(2));
    static uint64_t pin[3], unpin[3];
    static uint64_t off[2][2], on[2][2];
    struct multicall_entry list[2] = {
        {.op = OP_MMU_UPDATE, .args = {VIRT(off), 2, 0, DOMID_SELF}}, {.op = OP_MMUEXT, .args = {VIRT(pin), 1, 0, DOMID_SELF}},
    };
    uint64_t value = 2;
    uint32_t late = 0, refused = 0, rounds = (uint32_t)number("rounds=");

    off[0][0] = on[0][0] = boot_entry(p);
    off[1][0] = on[1][0] = l1 << 12 | SEEN_SLOT * 8;
    off[0][1] = off[1][1] = ENTRY(mfn_of(p), TABLE);
    on[0][1] = on[1][1] = ENTRY(mfn_of(p), DATA);
    pin[0] = PIN_L1, unpin[0] = UNPIN, pin[1] = unpin[1] = mfn_of(p);
    for (uint32_t i = 0; i < rounds; i++) {
        uint64_t last = 0;

        hypercall_begin(__HYPERVISOR_multicall, (const uint64_t[]){VIRT(list), 2}, 2);
        while (try_store(i & 1 ? seen : p, value)) {
            last = value, value += 2;
            if (there_is_a_reply())
                break;
        }
        refused += hypercall_end() < 0 || list[0].result != 2 || list[1].result != 1;
        late += *(volatile uint64_t *)p != (last ? last : *(volatile uint64_t *)p);
        late += (uint32_t)(try_store(p, value) + try_store(seen, value));
        refused += CALL(OP_MMUEXT, VIRT(unpin), 1, 0, DOMID_SELF) < 0;
        refused += CALL(OP_MMU_UPDATE, VIRT(on), 2, 0, DOMID_SELF) < 0;
    }
    note(refused);
    note(late);
    word(late ? "ALLOWED" : "faulted");
}

int attack_pins(const char *name)
{
    ATTACK("pin-here", mapped_here())
    ATTACK("pin-elsewhere", mapped_elsewhere(0))
    ATTACK("pin-not-current", mapped_elsewhere(1))
    ATTACK("pin-twice", mapped_twice())
    ATTACK("pin-in-list", in_its_own_list())
    ATTACK("pin-held", held())
    ATTACK("pin-not-ours", not_ours())
    ATTACK("retype", retype())
    ATTACK("retype-batch", retype_in_one_batch())
    ATTACK("tree-root", in_its_own_tree(0))
    ATTACK("tree-l2", in_its_own_tree(1))
    ATTACK("tree-l1", in_its_own_tree(2))
    ATTACK("unpin-root", unpinned_root(0))
    ATTACK("unpin-current-root", unpinned_root(1))
    ATTACK("many-roots", many_roots())
    ATTACK("evicted-root", evicted_root())
    ATTACK("race", race())
    return 0;
}
