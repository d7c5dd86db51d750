/* What the attacks of paging.c are made of: entries, tables of our own, stores that may fault, and one line that says how it
 * went: a number for each call, "faulted" or "ALLOWED" for each store, "unchanged" or "CHANGED" for each look at a table. */
#ifndef PAGING_H
#define PAGING_H

#include "kernel.h"

enum { OP_SET_TRAP_TABLE = 0, OP_MMU_UPDATE = 1, OP_SET_GDT = 2, OP_UPDATE_DESCRIPTOR = 10, OP_UPDATE_VA_MAPPING = 14 };
enum { OP_MMUEXT = 26 };
enum { PIN_L1, PIN_L2, PIN_L3, UNPIN = 4, NEW_BASEPTR, TLB_FLUSH, INVLPG, CLEAR_PAGE = 16, COPY_PAGE };
enum { INCREASE = 0, DECREASE = 1, POPULATE = 6, EXCHANGE = 11 };
enum { ENTRIES = 512, PRESERVE_AD = 2 };
#define PRESENT 1ull
#define RW 2ull
#define NX (1ull << 63)
#define DATA (PRESENT | RW | NX)
#define TABLE (PRESENT | NX) /* as a page that is a table may be mapped */
#define UPPER (PRESENT | RW)
#define ENTRY(mfn, flags) ((uint64_t)(mfn) << 12 | (flags))
#define STORED (0x0bad0badeull << 1) /* not a present entry, wherever it lands */

/* A page of ours that nobody uses, zeroed, mapped writable; its frame. */
uint64_t *spare(uint32_t n);
uint64_t mfn_of(const void *page);

/* The machine address of the boot mapping's entry of a page of ours; to set that, an entry of any table, or one by address. */
uint64_t boot_entry(const void *page);
int64_t remap(const void *page, uint64_t entry);
int64_t set_entry(uint64_t table, uint32_t slot, uint64_t entry);
int64_t update(uint64_t ptr, uint64_t entry);
int64_t extend(uint32_t command, uint64_t arg1, uint64_t arg2);

/* Page `n` as a pinned table: 1, 2 or 3 its level, 0 a descriptor table. Says nothing where it goes well. */
uint64_t *table(uint32_t n, uint32_t level);

/* A root, its L2 and its L1 in pages n, n + 1, n + 2, pinned: shows `mfn` at SEEN of a window, with `flags`, below `upper`. */
uint64_t space(uint32_t n, uint64_t mfn, uint64_t flags, uint64_t upper);
#define SEEN_SLOT 16
uint64_t *load(uint64_t root);            /* make it the base pointer; where its window shows SEEN */
void handle_faults(void);                 /* vector 14 is ours */
void load_boot(void);                     /* back to where we began */
uint64_t boot_root(void);

/* Whether a store was done: 0 if it faulted. `attempt` also says so. */
int try_store(volatile uint64_t *at, uint64_t value);
void attempt(volatile uint64_t *at);
int there_is_a_reply(void);               /* to a call that was begun */
void note(int64_t result);
void unchanged(const uint64_t *page);     /* still zeros */
void word(const char *text);

uint64_t number(const char *key);         /* of the command line */

int64_t assist(int on);                   /* writable page tables: a store to one is a request */

int attack_tables(const char *name);
int attack_pins(const char *name);
int attack_memory(const char *name);
int attack_grants(const char *name);
int attack_hammer(const char *name);
int attack_stores(const char *name);
#define ATTACK(text, call) \
    if (same(name, text)) { \
        call; \
        return 1; \
    }

#endif
