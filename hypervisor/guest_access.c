/* Copies between the hypervisor and a guest's memory, through the guest's own tables, page by page. */
#include "tables.h"

#include <errno.h>
#include <string.h>

#define PAGE 4096u

/* How much of a stretch lies in its first page. */
static uint32_t in_page(uint64_t va, uint32_t size)
{
    uint32_t left = PAGE - (uint32_t)(va % PAGE);

    return size < left ? size : left;
}

static char *at(struct mmu *m, uint32_t mfn, uint64_t va)
{
    return m->machine + ((uint64_t)mfn << 12) + va % PAGE;
}

static int within(uint64_t va, uint32_t size) { return va < 1ull << SPACE_SHIFT && size <= (1ull << SPACE_SHIFT) - va; }

/* 0, or -EFAULT. Each byte is read once. */
int32_t guest_read(struct mmu *m, uint32_t root, uint64_t va, uint32_t size, void *out)
{
    char *to = out;
    uint32_t n, mfn;

    if (!within(va, size))
        return -EFAULT;
    for (; size; va += n, to += n, size -= n) {
        n = in_page(va, size);
        mfn = mmu_walk(m, root, va, 0);
        if (mfn == NO_MFN)
            return -EFAULT;
        memcpy(to, at(m, mfn, va), n);
    }
    return 0;
}

/* 0 with all of it written, or -EFAULT with nothing. Nobody else changes tables meanwhile. */
int32_t guest_write(struct mmu *m, uint32_t root, uint64_t va, uint32_t size, const void *data)
{
    const char *from = data;
    uint32_t n, mfn;

    if (!within(va, size))
        return -EFAULT;
    for (uint32_t done = 0; done < size; done += in_page(va + done, size - done))
        if (mmu_walk(m, root, va + done, 1) == NO_MFN)
            return -EFAULT;
    for (; size; va += n, from += n, size -= n) {
        n = in_page(va, size);
        mfn = mmu_walk(m, root, va, 1);
        memcpy(at(m, mfn, va), from, n);
    }
    return 0;
}
