/* wrap: every mover at work while its indexes pass 2^32, from 0xFFFFFF00 on, with honest peers of our own C: whoever sleeps is
 * only woken where the ring said so. Prints what got across; ends with what is wrong. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "blk.h"
#include "guest.h"
#include "hv.h"
#include "net.h"
#include "record.h"
#include "ringlib.h"
#include "switch.h"

enum { PAGE = 4096, ROUNDS = 1000 };
#define START 0xFFFFFF00u

static _Alignas(4096) uint8_t pages[6][PAGE];

#define must(holds) ((holds) ? (void)0 : failed(#holds, __LINE__))

static void failed(const char *what, int line)
{
    fprintf(stderr, "wrap.c:%d: does not hold: %s\n", line, what);
    exit(1);
}

static uint32_t dice(uint32_t n)
{
    static uint32_t state = 20031;

    state = state * 1664525 + 1013904223;
    return (state >> 16) % n;
}

static struct ring_back *back_of(void *state) { return state; }

/* Both ends of a ring as if they had always counted from START. */
static void wound_on(void *front_state, void *back_state)
{
    struct ring_front *front = front_state;
    struct ring_back *back = back_state;

    front->sh->req_prod = front->sh->rsp_prod = START;
    front->sh->req_event = front->sh->rsp_event = START + 1;
    front->req_prod_pvt = front->rsp_cons = front->rsp_seen = START;
    back->rsp_prod_pvt = back->req_cons = back->req_seen = START;
}

/* How many went through a ring, whose indexes are small again. */
static uint32_t passed(void *back_state)
{
    uint32_t n = back_of(back_state)->req_cons - START;

    must(n > 1000 && n < START);
    return n;
}

/* ---- a virtual disk: writes of one sector each, read back */

enum { SECTORS = 256 };
struct blk_request {
    uint8_t op, nr_segments;
    uint16_t handle;
    uint32_t pad;
    uint64_t id, sector;
    struct {
        uint32_t gref;
        uint8_t first, last;
        uint16_t pad;
    } seg[11];
};
struct blk_response {
    uint64_t id;
    uint8_t op, pad;
    int16_t status;
    uint32_t pad2;
};

static struct blk_vbd vbd;
static _Alignas(4096) uint8_t data[32][PAGE];

static void blk_serve(void)
{
    uint32_t grefs[BLK_BATCH * 11], looks = 0;

    do {
        must(++looks < ROUNDS); /* a final check that says there is something, for ever */
        while (blk_take(&vbd) > 0) {
            int32_t n = blk_missing(&vbd, grefs, BLK_BATCH * 11);

            for (int32_t i = 0; i < n; i++)
                vbd.address[grefs[i]] = (uintptr_t)data[grefs[i]];
            must(blk_run(&vbd) == 1); /* the front sleeps */
        }
    } while (blk_recheck(&vbd));
}

static void blk(void)
{
    struct ring_front front;

    vbd.fd = memfd_create("image", 0);
    must(vbd.fd >= 0 && !ftruncate(vbd.fd, SECTORS * 512));
    vbd.writable = vbd.nr_extents = 1;
    vbd.extents[0] = (struct blk_extent){0, SECTORS};
    vbd.sectors = SECTORS;
    ring_front_init(&front, pages[0], PAGE, sizeof(struct blk_request), sizeof(struct blk_response));
    blk_attach(&vbd, pages[0], PAGE);
    wound_on(&front, vbd.ring);
    for (uint32_t round = 0, n = 0; round < ROUNDS; round++) { /* a batch written, then the same read back */
        struct blk_request q[32] = {0};
        struct blk_response a[32];
        int reading = round % 2;

        n = reading ? n : 1 + dice(32);
        for (uint32_t i = 0; i < n; i++) {
            q[i] = (struct blk_request){.op = (uint8_t)!reading, .nr_segments = 1, .id = round * 100 + i};
            q[i].sector = (round / 2 * 32 + i) % SECTORS;
            q[i].seg[0].gref = i;
            fill(data[i], 512, reading ? 0 : round + 1 + i);
        }
        must(ring_front_publish(&front, q, n) == 1); /* the back sleeps */
        blk_serve();
        must(ring_front_take(&front, a, 32) == (int32_t)n && !ring_front_recheck(&front));
        for (uint32_t i = 0; i < n; i++)
            must(a[i].id == q[i].id && a[i].status == 0 && whole(data[i], 512, round + !reading + i));
    }
    printf("blk %u\n", passed(vbd.ring));
}

/* ---- two frontends and the switch */

static struct netfront fronts[2];
static struct nswitch sw;
static uint8_t pools[4][NET_RING][PAGE];

static int switch_turn(void)
{
    uint32_t grefs[SWITCH_RING];
    int32_t n = vif_take(&sw.vifs[0], 64);

    must(n >= 0 && vif_take(&sw.vifs[1], 0) >= 0);
    for (uint32_t i = 0; i < 2; i++)
        for (uint32_t buffers = 0; buffers < 2; buffers++) {
            struct vif *v = &sw.vifs[i];
            int32_t m = vif_missing(v, (int32_t)buffers, grefs, SWITCH_RING);

            for (int32_t k = 0; k < m; k++)
                (buffers ? v->writable : v->readable)[grefs[k]] = (uintptr_t)pools[2 * i + buffers][grefs[k]];
        }
    must(switch_run(&sw, 0) == 0);
    return n == 64 || vif_recheck(&sw.vifs[0]);
}

static void net(void)
{
    static const uint8_t head[42] = {2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, [23] = 17, [29] = 1, [33] = 2};
    static uint8_t in[64 * NET_FRAME];
    uint32_t sent = 0, got = 0;

    for (uint32_t i = 0; i < 2; i++) {
        struct netfront *n = &fronts[i];
        struct vif *v = &sw.vifs[i];

        n->tx_pool = (uintptr_t)pools[2 * i];
        n->rx_pool = (uintptr_t)pools[2 * i + 1];
        for (uint32_t k = 0; k < NET_RING; k++)
            n->tx_refs[k] = n->rx_refs[k] = k;
        must(!net_open(n, pages[2 * i], pages[2 * i + 1], PAGE) && !vif_attach(v, pages[2 * i], pages[2 * i + 1], PAGE));
        wound_on(n->tx, v->tx);
        wound_on(n->rx, v->rx);
        must(net_post(n) == 1);
        memcpy(v->mac, i ? head : head + 6, 6);
        v->connected = 1;
    }
    sw.accept_by_default = 1;
    while (got < 4 * ROUNDS) {
        uint32_t lengths[64], n = 1 + dice(64), took = 0;
        uint8_t out[64 * 32];
        int32_t r;

        for (uint32_t i = 0; i < n; i++) {
            fill(out + i * 32, 32, sent + i);
            lengths[i] = 32;
        }
        r = net_send(&fronts[0], head, sizeof head, out, lengths, n, &took);
        must(r >= 0 && took == n);
        sent += n;
        must(r == 1); /* the switch sleeps, and so do both fronts */
        for (uint32_t turns = 0; switch_turn(); turns++)
            must(turns < ROUNDS);
        must(vif_publish(&sw.vifs[1]) == 1 && vif_publish(&sw.vifs[0]) == 1);
        r = net_recv(&fronts[1], in, lengths, 64, &took);
        must(r >= 0 && took == n);
        for (uint32_t i = 0; i < took; i++, got++) {
            uint32_t offset;

            must(udp_payload(in + i * 74, 74, &offset) == 32 && whole(in + i * 74 + offset, 32, got));
        }
        must(!net_recheck_rx(&fronts[1]) && net_reap(&fronts[0]) == (int32_t)n && !net_recheck_tx(&fronts[0]));
    }
    printf("net %u %u\n", passed(sw.vifs[0].tx), passed(sw.vifs[1].rx));
}

/* ---- hypercalls by ring */

static struct callring ring;
static struct evt_end end;
static struct evt_end *ends[2] = {0, &end};

static void hypervisor_drains(void)
{
    uint32_t looks = 0;

    do {
        int32_t left = callring_run(&ring, ends, 1, 0, 8);

        must(left >= 0 && ++looks < ROUNDS);
        ring.nr_signals = 0;
        if (left)
            callring_answer(&ring, (int64_t)ring.entries[ring.next][2]);
    } while (ring.taken || callring_recheck(&ring));
}

static void callring(void)
{
    struct ring_front front;
    uint32_t done = 0;

    end.ports[5].state = 5;
    end.shared_info = pages[5];
    ring_front_init(&front, pages[4], PAGE, 64, 16);
    callring_attach(&ring, pages[4]);
    wound_on(&front, ring.ring);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        uint64_t q[100][8] = {{0}}, a[100][2];
        uint32_t n = 1 + dice(100), pushed = 0, answered = 0, doorbells = 0;

        for (uint32_t i = 0; i < n; i++) {
            q[i][0] = dice(2) ? 32 : 17;
            q[i][2] = q[i][0] == 32 ? 4 : done + i;
            q[i][3] = q[i][0] == 32 ? 5 : 0;
        }
        while (callring_round(&front, q, n, &pushed, a, &answered, 0) == 1) {
            must(++doorbells <= n);
            hypervisor_drains();
        }
        must(answered == n && doorbells);
        for (uint32_t i = 0; i < n; i++, done++)
            must(a[i][0] == q[i][0] && a[i][1] == (q[i][0] == 32 ? 0 : q[i][2]));
    }
    must(passed(ring.ring) == done);
    printf("callring %u\n", done);
}

/* ---- byte rings */

static void bytes(void)
{
    static _Atomic uint32_t cons = START, prod = START;
    uint8_t buffer[32], in[32], out[40];
    uint32_t written = 0, got = 0;

    for (uint32_t turns = 0; got < 4 * ROUNDS; turns++) {
        uint32_t n = dice(sizeof out);
        int32_t r;

        for (uint32_t i = 0; i < n; i++)
            out[i] = (uint8_t)((written + i) * 7);
        r = bytes_write(buffer, &cons, &prod, sizeof buffer, out, n);
        must(turns < 100 * ROUNDS && r >= 0 && r <= (int32_t)n && written + (uint32_t)r - got <= sizeof buffer);
        written += (uint32_t)r;
        r = bytes_read(buffer, &cons, &prod, sizeof buffer, in, dice(sizeof in));
        must(r >= 0);
        for (int32_t i = 0; i < r; i++, got++)
            must(in[i] == (uint8_t)(got * 7));
    }
    must(cons < START);
    printf("bytes %u\n", got);
}

int main(void)
{
    blk();
    net();
    callring();
    bytes();
    return 0;
}
