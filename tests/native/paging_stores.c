/* Writable page tables (vm_assist): what a store to a table is asked to do, by an instruction or by a message made by hand. */
#include "paging.h"
#include "ring1_mmu.h"

enum { SYS_sendto = 44, SYS_recvfrom = 45 };
#define OUT_OF_RANGE (1ull << 40)

int64_t assist(int on)
{
    return CALL(__HYPERVISOR_vm_assist, on ? VMASST_CMD_enable : VMASST_CMD_disable, VMASST_TYPE_writable_pagetables);
}

static void asked(uint64_t *at, uint64_t entry) { word(try_store(at, entry) ? "ALLOWED" : "faulted"); }

/* Nothing of it before it is asked for, nor after. */
static void opted(void)
{
    uint64_t *t = table(0, 1);

    attempt(t + 3);
    note(assist(1));
    note(try_store(t + 3, STORED));
    word(t[3] == STORED ? "there" : "not there");
    note(assist(0));
    attempt(t + 4);
    note(CALL(__HYPERVISOR_vm_assist, 2, VMASST_TYPE_writable_pagetables));
    note(CALL(__HYPERVISOR_vm_assist, VMASST_CMD_enable, 1));
}

/* An entry under a window, through the table: the page is there, is another one, and is not. An upper one too. */
static void followed(void)
{
    uint64_t root = space(0, mfn_of(spare(4)), DATA, UPPER), *seen = load(root), *l1 = spare(2) + SEEN_SLOT, *l2 = spare(1);

    spare(4)[0] = 4, spare(5)[0] = 5;
    note(assist(1));
    note((int64_t)seen[0]);
    note(try_store(l1, ENTRY(mfn_of(spare(5)), DATA)));
    note((int64_t)seen[0]);
    note(try_store(l1, ENTRY(mfn_of(spare(5)), TABLE)));
    attempt(seen);
    note(try_store(l2, 0));
    attempt(seen + 1);
    load_boot();
}

/* What mmu_update would refuse: a writable table, a frame of another, none, a bit; and the table is as it was. */
static void refused(void)
{
    uint64_t *t = table(0, 1), *other = table(1, 2);

    note(assist(1));
    asked(t, ENTRY(mfn_of(t), DATA));
    asked(t, ENTRY(number("secret="), DATA));
    asked(t, ENTRY(number("free="), DATA));
    asked(t, ENTRY(OUT_OF_RANGE - 1, DATA));
    asked(t, ENTRY(mfn_of(spare(4)), DATA | 1 << 7));
    asked(other, ENTRY(mfn_of(other), UPPER));
    unchanged(t);
    unchanged(other);
}

/* Stores that are no entry: to a page that is read-only and no table, half an entry, one that is not aligned. */
static void no_entry(void)
{
    uint64_t *t = table(0, 1), *data = spare(4);

    note(remap(data, ENTRY(mfn_of(data), TABLE)));
    note(assist(1));
    attempt(data);
    attempt((uint64_t *)((char *)t + 4));
    unchanged(data);
    unchanged(t);
}

/* The verdict on a message that the entry code did not send. */
static void forge(const void *at, uint64_t error, uint64_t value)
{
    uint64_t message[5] = {(uint64_t)(uintptr_t)at, error, 0, (uint64_t)(uintptr_t)&message, value}, verdict[2] = {77, 0};

    SYS6(SYS_sendto, RING1_FD_FAULT, message, sizeof message, 0, 0, 0);
    SYS6(SYS_recvfrom, RING1_FD_FAULT, verdict, sizeof verdict, 0, 0, 0);
    note((int64_t)(uint32_t)verdict[0]);
}

/* By hand it gets what mmu_update gives: 2 where that would do it, 1 where it would not. */
static void forged(void)
{
    const uint64_t store = RING1_PF_STORE | RING1_PF_USER | RING1_PF_WRITE;
    uint64_t *t = table(0, 1), *data = spare(4);

    note(assist(1));
    forge(t, store, ENTRY(number("secret="), DATA));
    forge(t, store, ENTRY(mfn_of(t), DATA));
    forge((char *)t + 4, store, 0);
    forge(t, RING1_PF_STORE | RING1_PF_USER, STORED); /* no write: the page is there to be read */
    forge(data, store, STORED);                       /* to be written: it is mapped, and nothing is stored */
    forge(HOST(7ull * RING1_SPACE_BYTES), store, STORED); /* a window that shows nothing */
    unchanged(t);
    unchanged(data);
    forge(t, store, ENTRY(mfn_of(data), TABLE));
    word(t[0] == ENTRY(mfn_of(data), TABLE) ? "there" : "not there");
}

int attack_stores(const char *name)
{
    ATTACK("store-opted", opted())
    ATTACK("store-followed", followed())
    ATTACK("store-refused", refused())
    ATTACK("store-no-entry", no_entry())
    ATTACK("store-forged", forged())
    return 0;
}
