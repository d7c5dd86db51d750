/* The block mover: requests from a ring to an image and back. build_blk.py hands the marked lines to cffi. */
#ifndef RING1_BLK_H
#define RING1_BLK_H

#include <stdint.h>

/* cdef begin */
#define BLK_EXTENTS 16
#define BLK_GREFS 4096
#define BLK_BATCH 32

struct blk_extent {
    uint64_t first, count; /* sectors of the image */
};
struct blk_vbd {
    uint64_t ring[8]; /* struct ring_back */
    int32_t fd;
    uint16_t handle, writable;
    uint32_t nr_extents, broken, taken, faulty;
    struct blk_extent extents[BLK_EXTENTS];
    uint64_t sectors;
    uint64_t *stats;               /* seven counters of the statistics row */
    uint64_t address[BLK_GREFS];   /* of a mapped grant; 0 unknown, 1 refused */
    unsigned char batch[3584];     /* BLK_BATCH requests of 112 bytes: the private copies */
};

int32_t blk_attach(struct blk_vbd *vbd, void *page, uint64_t bytes);
int32_t blk_take(struct blk_vbd *vbd);
int32_t blk_missing(struct blk_vbd *vbd, uint32_t *grefs, uint32_t max);
int32_t blk_run(struct blk_vbd *vbd);
int32_t blk_recheck(struct blk_vbd *vbd);
int32_t blk_translate(const struct blk_vbd *vbd, uint64_t sector, uint64_t count, uint64_t *where, uint64_t *length);
/* cdef end */

#endif
