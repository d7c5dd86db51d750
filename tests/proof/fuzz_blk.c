/* The block mover against a hostile frontend: what it answers, which sectors and which bytes of pages it touches, are those
 * that the model allows, for any table of extents. */
#define _GNU_SOURCE
#include "fuzz.h"

#include <sys/mman.h>
#include <unistd.h>

#include "blk.h"

enum { SECTOR = 512, IMAGE = 48, PAGES = 6, GRANTED = 4, SEGMENTS = 11, HANDLE = 7 };
enum { READ = 0, WRITE = 1, FLUSH = 3 };

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

static _Alignas(4096) uint8_t ring[4096];
static _Alignas(4096) uint8_t pages[PAGES][4096], pages_before[PAGES][4096]; /* those from GRANTED on cannot be mapped */
static uint8_t *image, image_before[IMAGE * SECTOR];                       /* the file, as the host has it mapped */
static int fd = -1;
static struct blk_vbd vbd;

/* Tables of extents of the image's 48 sectors: one; with a hole between; backwards; sixteen of one sector each. */
static uint32_t map[IMAGE]; /* sector of the VBD -> of the image */

static void extents(uint32_t table)
{
    static const struct blk_extent tables[3][2] = {{{4, 40}, {0, 0}}, {{2, 11}, {20, 13}}, {{30, 9}, {5, 8}}};

    vbd.nr_extents = table < 3 ? 1 + (table > 0) : BLK_EXTENTS;
    for (uint32_t i = 0; i < vbd.nr_extents; i++) {
        vbd.extents[i] = table < 3 ? tables[table][i] : (struct blk_extent){(i * 5 + 3) % IMAGE, 1};
        for (uint32_t k = 0; k < vbd.extents[i].count; k++)
            map[vbd.sectors++] = (uint32_t)vbd.extents[i].first + k;
    }
}

/* ---- the model */

static uint64_t sectors_of(const struct request *r)
{
    uint64_t sectors = 0;

    if (r->nr_segments < 1 || r->nr_segments > SEGMENTS || r->handle != HANDLE)
        return 0;
    for (uint32_t s = 0; s < r->nr_segments; s++) {
        if (r->seg[s].gref >= GRANTED || r->seg[s].last > 7 || r->seg[s].first > r->seg[s].last)
            return 0;
        sectors += 1u + r->seg[s].last - r->seg[s].first;
    }
    if (sectors > vbd.sectors || r->sector > vbd.sectors - sectors)
        return 0;
    return sectors;
}

static int16_t expected(const struct request *r)
{
    if (r->op == FLUSH)
        return 0;
    if (r->op != READ && r->op != WRITE)
        return -2;
    return sectors_of(r) && (r->op == READ || vbd.writable) ? 0 : -1;
}

/* How many requests of the batch write each sector of the image, and read into each sector of a page; who is the last. */
static struct {
    uint32_t times;
    const uint8_t *other;
} to_image[IMAGE], to_page[PAGES][8];

static void account(const struct request *r)
{
    uint64_t at = r->sector;

    if ((r->op != READ && r->op != WRITE) || expected(r))
        return;
    for (uint32_t s = 0; s < r->nr_segments; s++)
        for (uint32_t k = r->seg[s].first; k <= r->seg[s].last; k++, at++) {
            uint32_t gref = r->seg[s].gref, sector = map[at];

            if (r->op == WRITE) {
                to_image[sector].times++;
                to_image[sector].other = &pages[gref][k * SECTOR];
            } else {
                to_page[gref][k].times++;
                to_page[gref][k].other = &image[sector * SECTOR];
            }
        }
}

/* Of writes to one sector the last holds; of reads into one, any. What is both read into and written from is not known. */
static void check_data(void)
{
    for (uint32_t i = 0; i < IMAGE; i++) {
        const uint8_t *now = image + i * SECTOR, *from = to_image[i].other;

        if (!to_image[i].times)
            must(!memcmp(now, image_before + i * SECTOR, SECTOR));
        else if (!to_page[(from - pages[0]) / 4096][(from - pages[0]) % 4096 / SECTOR].times)
            must(!memcmp(now, from, SECTOR));
    }
    for (uint32_t i = 0; i < PAGES * 8; i++) {
        const uint8_t *now = pages[i / 8] + i % 8 * SECTOR, *from = to_page[i / 8][i % 8].other;

        if (!to_page[i / 8][i % 8].times)
            must(!memcmp(now, pages_before[i / 8] + i % 8 * SECTOR, SECTOR));
        else if (to_page[i / 8][i % 8].times == 1 && !to_image[(from - image) / SECTOR].times)
            must(!memcmp(now, from, SECTOR));
    }
}

/* ---- the play */

static void serve(struct peer *front)
{
    struct request batch[BLK_BATCH];
    uint32_t grefs[BLK_BATCH * SEGMENTS], base = front->sh->rsp_prod;
    int32_t n = blk_take(&vbd), missing, r;

    if (n <= 0)
        return;
    must(n <= BLK_BATCH);
    memcpy(batch, vbd.batch, (size_t)n * sizeof *batch);
    missing = blk_missing(&vbd, grefs, BLK_BATCH * SEGMENTS);
    for (int32_t i = 0; i < missing; i++)
        if (grefs[i] < GRANTED)
            vbd.address[grefs[i]] = (uintptr_t)pages[grefs[i]];
    memset(to_image, 0, sizeof to_image);
    memset(to_page, 0, sizeof to_page);
    memcpy(image_before, image, sizeof image_before);
    memcpy(pages_before, pages, sizeof pages);
    for (int32_t i = 0; i < n; i++)
        account(&batch[i]);
    base = ((struct ring_back *)vbd.ring)->rsp_prod_pvt;
    r = blk_run(&vbd);
    must(r == 0 || r == 1);
    must(front->sh->rsp_prod == base + (uint32_t)n);
    for (int32_t i = 0; i < n; i++) {
        const struct response *answer = slot_at(front, base + (uint32_t)i);

        must(answer->id == batch[i].id && answer->op == batch[i].op);
        must(answer->status == expected(&batch[i]));
    }
    check_data();
    for (int32_t i = 0; i < missing; i++) /* each batch finds its grants anew, so that plays do not depend on each other */
        vbd.address[grefs[i]] = 0;
}

static void ask(struct input *in, struct peer *front)
{
    struct request r = {.handle = HANDLE, .id = number(in, 1)};

    r.op = (uint8_t)below(in, 4);
    r.nr_segments = (uint8_t)(1 + below(in, SEGMENTS));
    r.sector = below(in, 40);
    for (uint32_t s = 0; s < r.nr_segments; s++) {
        uint32_t n = (uint32_t)number(in, 1);

        r.seg[s].gref = n % GRANTED;
        r.seg[s].first = (uint8_t)(n / 4 % 8);
        r.seg[s].last = (uint8_t)(r.seg[s].first + n / 32 % (8u - r.seg[s].first));
    }
    if (rarely(in, 16))
        r.nr_segments += (uint8_t)below(in, 32);
    if (rarely(in, 8))
        r.seg[below(in, SEGMENTS)].last += (uint8_t)(1 + below(in, 8));
    while (rarely(in, 3))
        poke(in, &r, 32); /* the head and the first segment */
    if (rarely(in, 8))
        r.sector = (uint64_t)-(int64_t)below(in, 16);
    put_request(front, &r, sizeof r);
}

static void open_image(void)
{
    fd = memfd_create("image", 0);
    must(fd >= 0 && !ftruncate(fd, IMAGE * SECTOR));
    image = mmap(NULL, IMAGE * SECTOR, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    must(image != MAP_FAILED);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct peer front = peer_of(ring, sizeof(struct request), start_index(&in));

    if (fd < 0)
        open_image();
    for (uint32_t i = 0; i < IMAGE; i++)
        memset(image + i * SECTOR, (int)(0x80 + i), SECTOR);
    for (uint32_t i = 0; i < PAGES * 8; i++)
        memset(pages[i / 8] + i % 8 * SECTOR, (int)(1 + i), SECTOR);
    memset(&vbd, 0, offsetof(struct blk_vbd, address));
    extents(below(&in, 4));
    vbd.fd = fd;
    vbd.handle = HANDLE;
    vbd.writable = !rarely(&in, 4);
    must(blk_attach(&vbd, ring, sizeof ring) == 0);
    while (more(&in))
        switch (below(&in, 8)) {
        default:
            ask(&in, &front);
            break;
        case 5:
            if (rarely(&in, 4))
                mischief(&in, &front);
            break;
        case 6:
            blk_recheck(&vbd);
            /* fall through */
        case 7:
            serve(&front);
        }
    serve(&front);
    return 0;
}
