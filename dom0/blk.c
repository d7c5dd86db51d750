/* The block mover. It acts on private copies of requests only; the frames hold data, never anything that is believed.
 *
 *   take      copy a batch out of the ring
 *   missing   name the grants of it that are not mapped yet: the caller maps them
 *   run       check each copy, translate, sort, merge neighbours, move, answer all at once
 *
 * Data goes straight between the image and the granted frames. Only calls that do not pin pages are used, so that a frame
 * that was revoked meanwhile is a zero page, not somebody else's memory. */
#define _GNU_SOURCE
#include "blk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "ring.h"

#define SECTOR 512u
#define SEGMENTS 11

struct segment {
    uint32_t gref;
    uint8_t first, last;
    uint16_t pad;
};
struct request {
    uint8_t op, nr_segments;
    uint16_t handle;
    uint32_t pad;
    uint64_t id, sector;
    struct segment seg[SEGMENTS];
};
struct response {
    uint64_t id;
    uint8_t op, pad;
    int16_t status;
    uint32_t pad2;
};
_Static_assert(sizeof(struct request) == 112 && offsetof(struct request, sector) == 16, "blkif_request");
_Static_assert(offsetof(struct request, seg) == 24, "blkif_request");
_Static_assert(sizeof(struct response) == 16 && offsetof(struct response, status) == 10, "blkif_response");
_Static_assert(sizeof(struct ring_back) <= 64, "the room that blk_vbd has for it");

enum { READ = 0, WRITE = 1, FLUSH = 3 };
enum { OKAY = 0, ERROR = -1, EOPNOTSUPPORTED = -2 };
enum { RD_BYTES, WR_BYTES, REQUESTS, BATCHES, NOTIFIES, ERRORS, OCCUPANCY };

/* One contiguous stretch of the image of one request. */
struct piece {
    uint64_t at; /* byte of the image */
    uint32_t request, nr_iov;
    uint64_t bytes;
    struct iovec iov[SEGMENTS];
};

static struct ring_back *ring_of(struct blk_vbd *v) { return (struct ring_back *)v->ring; }
static struct request *request_of(struct blk_vbd *v, uint32_t i) { return (struct request *)v->batch + i; }

int32_t blk_attach(struct blk_vbd *v, void *page, uint64_t bytes)
{
    return ring_back_attach(ring_of(v), page, bytes, sizeof(struct request), sizeof(struct response));
}

int32_t blk_recheck(struct blk_vbd *v) { return ring_back_recheck(ring_of(v)); }

int32_t blk_take(struct blk_vbd *v)
{
    int32_t n = ring_back_take(ring_of(v), v->batch, BLK_BATCH);

    v->taken = n > 0 ? (uint32_t)n : 0;
    if (n > 0 && v->stats && (uint64_t)n > v->stats[OCCUPANCY])
        v->stats[OCCUPANCY] = (uint64_t)n;
    return n;
}

int32_t blk_missing(struct blk_vbd *v, uint32_t *grefs, uint32_t max)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < v->taken; i++) {
        struct request *r = request_of(v, i);

        if (r->op > WRITE || r->nr_segments > SEGMENTS)
            continue;
        for (uint32_t s = 0; s < r->nr_segments && n < max; s++) {
            uint32_t gref = r->seg[s].gref;

            if (gref < BLK_GREFS && !v->address[gref]) {
                v->address[gref] = 1; /* named once; the caller puts the address, or leaves it refused */
                grefs[n++] = gref;
            }
        }
    }
    return (int32_t)n;
}

/* Sectors [sector, sector + count) of the VBD begin at *where of the image and go on for *length <= count.
 * -EINVAL for any that is not the VBD's. 64-bit, and no sum that can wrap: sector <= sectors is known before. */
int32_t blk_translate(const struct blk_vbd *v, uint64_t sector, uint64_t count, uint64_t *where, uint64_t *length)
{
    if (!count || sector >= v->sectors || count > v->sectors - sector)
        return -EINVAL;
    for (uint32_t i = 0; i < v->nr_extents && i < BLK_EXTENTS; i++) {
        const struct blk_extent *e = &v->extents[i];

        if (sector < e->count) {
            *where = e->first + sector;
            *length = count < e->count - sector ? count : e->count - sector;
            return 0;
        }
        sector -= e->count;
    }
    return -EINVAL;
}

/* Sectors a request moves, or 0 where it cannot be. */
static uint64_t checked_sectors(const struct blk_vbd *v, const struct request *r)
{
    uint64_t sectors = 0;

    if (!r->nr_segments || r->nr_segments > SEGMENTS || r->handle != v->handle || (r->op == WRITE && !v->writable))
        return 0;
    for (uint32_t s = 0; s < r->nr_segments; s++) {
        const struct segment *g = &r->seg[s];

        if (g->first > g->last || g->last > 7 || g->gref >= BLK_GREFS || v->address[g->gref] <= 1)
            return 0;
        sectors += (uint64_t)(g->last - g->first) + 1;
    }
    return sectors;
}

/* Cut a request at its extents, BLK_EXTENTS pieces at most; returns how many, or 0 where a sector is not the VBD's. */
static uint32_t cut(const struct blk_vbd *v, uint32_t index, struct piece *out)
{
    const struct request *r = (const struct request *)v->batch + index;
    uint64_t left = checked_sectors(v, r), sector = r->sector, where, length, skip = 0;
    uint32_t n = 0, s = 0;

    while (left) {
        struct piece *p = &out[n];

        if (n == BLK_EXTENTS || blk_translate(v, sector, left, &where, &length))
            return 0;
        *p = (struct piece){.at = where * SECTOR, .request = index};
        sector += length;
        left -= length;
        while (length) { /* the segments that carry these sectors */
            const struct segment *g = &r->seg[s];
            uint64_t here = (uint64_t)(g->last - g->first) + 1 - skip, take = here < length ? here : length;

            p->iov[p->nr_iov++] =
                (struct iovec){(char *)(uintptr_t)v->address[g->gref] + (g->first + skip) * SECTOR, take * SECTOR};
            p->bytes += take * SECTOR;
            length -= take;
            skip += take;
            if (take == here) {
                s++;
                skip = 0;
            }
        }
        n++;
    }
    return n;
}

/* All of it, or an error: short transfers go on, the end of the image reads as an error. */
static int move(int fd, int write, struct iovec *iov, uint32_t n, uint64_t at)
{
    while (n) {
        ssize_t done = write ? pwritev2(fd, iov, (int)n, (off_t)at, 0) : preadv2(fd, iov, (int)n, (off_t)at, 0);

        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return -1;
        at += (uint64_t)done;
        while (n && (size_t)done >= iov->iov_len) {
            done -= (ssize_t)iov->iov_len;
            iov++;
            n--;
        }
        if (n) {
            iov->iov_base = (char *)iov->iov_base + done;
            iov->iov_len -= (size_t)done;
        }
    }
    return 0;
}

static int by_place(const void *a, const void *b)
{
    const struct piece *x = *(struct piece *const *)a, *y = *(struct piece *const *)b;

    return x->at < y->at ? -1 : x->at > y->at;
}

static int overlap(struct piece *const *order, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++)
        if (order[i]->at < order[i - 1]->at + order[i - 1]->bytes)
            return 1;
    return 0;
}

/* Requests [from, to) of one kind: sorted by place, neighbours in one call. Writes that overlap stay in the order they
 * came in: the last one holds. A piece is a segment or a part of one at each end, so a batch has no more iovecs than this. */
static void transfer(struct blk_vbd *v, uint32_t from, uint32_t to, int op, int16_t *status)
{
    static struct piece pieces[BLK_BATCH * BLK_EXTENTS];
    static struct piece *order[BLK_BATCH * BLK_EXTENTS];
    static struct iovec iov[BLK_BATCH * (SEGMENTS + BLK_EXTENTS)];
    uint32_t n = 0, i, j;

    for (i = from; i < to; i++) {
        uint32_t got;

        if (request_of(v, i)->op != op)
            continue;
        got = v->broken ? 0 : cut(v, i, pieces + n);
        status[i] = got ? OKAY : ERROR;
        n += got;
    }
    for (i = 0; i < n; i++)
        order[i] = &pieces[i];
    qsort(order, n, sizeof *order, by_place);
    if (op == WRITE && overlap(order, n))
        for (i = 0; i < n; i++)
            order[i] = &pieces[i];
    for (i = 0; i < n; i = j) {
        uint64_t end = order[i]->at;
        uint32_t parts = 0;

        for (j = i; j < n && order[j]->at == end; j++) {
            memcpy(iov + parts, order[j]->iov, order[j]->nr_iov * sizeof *iov);
            parts += order[j]->nr_iov;
            end += order[j]->bytes;
        }
        if (move(v->fd, op == WRITE, iov, parts, order[i]->at))
            for (uint32_t k = i; k < j; k++)
                status[order[k]->request] = ERROR;
        else if (v->stats)
            v->stats[op == WRITE ? WR_BYTES : RD_BYTES] += end - order[i]->at;
    }
}

/* An error of fdatasync breaks the device: the host may have forgotten it by the next call, so that a later success
 * would prove nothing. */
static int16_t flush(struct blk_vbd *v)
{
    if (v->broken)
        return ERROR;
    if (v->writable && fdatasync(v->fd)) {
        v->broken = 1;
        return ERROR;
    }
    return OKAY;
}

/* Serve the batch that was taken and answer it: 1 notify, 0 quiet, -errno. Nothing is moved across a flush. */
int32_t blk_run(struct blk_vbd *v)
{
    int16_t status[BLK_BATCH];
    struct response answer[BLK_BATCH];
    uint32_t from = 0, errors = 0;
    int32_t r;

    for (uint32_t i = 0; i < v->taken; i++)
        status[i] = EOPNOTSUPPORTED;
    for (uint32_t i = 0; i <= v->taken; i++)
        if (i == v->taken || request_of(v, i)->op == FLUSH) {
            transfer(v, from, i, WRITE, status);
            transfer(v, from, i, READ, status);
            if (i < v->taken)
                status[i] = flush(v);
            from = i + 1;
        }
    for (uint32_t i = 0; i < v->taken; i++) {
        answer[i] = (struct response){.id = request_of(v, i)->id, .op = request_of(v, i)->op, .status = status[i]};
        errors += status[i] != OKAY;
    }
    r = ring_back_publish(ring_of(v), answer, v->taken);
    if (v->stats) {
        v->stats[REQUESTS] += v->taken;
        v->stats[BATCHES]++;
        v->stats[NOTIFIES] += r == 1;
        v->stats[ERRORS] += errors;
    }
    v->taken = 0;
    return r;
}
