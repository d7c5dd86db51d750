/* Entries of page tables, for the kernels that read and write them; the bits are those of public/mmu.py. */
#ifndef RING1_TABLES_H
#define RING1_TABLES_H

#include "hv.h"

#define PTE_P 1ull
#define PTE_RW 2ull
#define PTE_US 4ull
#define PTE_AD (1ull << 5 | 1ull << 6)
#define PTE_G (1ull << 8)
#define PTE_NX (1ull << 63)
#define PTE_FRAME 0x000ffffffffff000ull
#define PTE_OWN (7ull << 9 | 0x7ffull << 52) /* the guest's own bits */
#define PTE_UPPER_ALLOWED (PTE_P | PTE_RW | PTE_US | PTE_AD | PTE_NX | PTE_FRAME | PTE_OWN)
#define PTE_L1_ALLOWED (PTE_UPPER_ALLOWED | PTE_G)
#define PTE_MFN(entry) (((entry) & PTE_FRAME) >> 12)

#define TOP_L2_SLOT 480    /* of an L2 for the last GiB: the hypervisor's 64 MB begin here */
#define GRANT_L3_SLOT 256  /* of the root in window 0: GRANT_BASE */
#define SPACE_SHIFT 39

_Static_assert((uint64_t)GRANT_L3_SLOT << 30 == 0x4000000000, "GRANT_BASE");
_Static_assert((511ull << 30 | (uint64_t)TOP_L2_SLOT << 21) == (1ull << SPACE_SHIFT) - (64 << 20), "HYPERVISOR_VIRT_START");

static inline uint64_t *table_of(struct mmu *m, uint32_t mfn)
{
    return (uint64_t *)(void *)(m->machine + ((uint64_t)mfn << 12));
}

int l1_get(struct mmu *m, uint16_t domid, uint64_t entry);
void l1_put(struct mmu *m, uint64_t entry);

#endif
