/* fetch [CASE]: every function of ours that reads what a peer may write, over memory whose every read is seen (trap.h).
 *
 * Each case is run three times: as it is; watched; and watched with an attacker who changes each byte right after it was
 * read for the first time. Nothing may be read twice, and all three must come out the same: what was judged is then what was
 * acted on. A line a case: its name, bytes read, bytes read twice, whether the attack made a difference. */
#include "trap.h"

#include <errno.h>
#include <stdlib.h>

#include "blk.h"
#include "guest.h"
#include "hv.h"
#include "net.h"
#include "record.h"
#include "ringlib.h"
#include "switch.h"

enum { PAGE = 4096, PAGES = 24, NEAR_WRAP = (int)0xfffffffe };

/* Pages that a peer has too. */
static _Alignas(4096) uint8_t pages[PAGES][PAGE];

static uint8_t out[1 << 16]; /* everything that came of a case */
static uint32_t nr_out;

static void note(const void *what, uint32_t bytes)
{
    memcpy(out + nr_out, what, bytes);
    nr_out += bytes;
}

static int64_t results[12]; /* of the calls, in turn */
static uint32_t nr_results;

static void result(int64_t r)
{
    note(&r, sizeof r);
    results[nr_results++] = r;
}

/* A call that may read each header byte once; LOOKS_TWICE: it may look again, for that is what it is for. */
#define CALL(call) (trap_call(1), result(call))
#define LOOKS_TWICE(call) (trap_call(2), result(call))

/* A ring as its peer made it: n requests published, `answers` of them answered, counting from just below 2^32. */
static void *raw_ring(uint8_t *page, const void *records, uint32_t size, uint32_t slot, uint32_t n, uint32_t answers)
{
    uint32_t entries = ring_entries(PAGE, slot), start = (uint32_t)NEAR_WRAP;
    struct ring_shared *sh = (struct ring_shared *)page;

    sh->req_prod = start + n;
    sh->req_event = sh->rsp_event = start + 1;
    sh->rsp_prod = start + answers;
    for (uint32_t i = 0; i < n; i++)
        memcpy(page + 64 + ((start + i) & (entries - 1)) * slot, (const uint8_t *)records + i * size, size);
    region(page, 64);
    return page;
}

static void start_front(void *state, uint32_t published)
{
    struct ring_front *f = state;

    f->rsp_cons = f->rsp_seen = (uint32_t)NEAR_WRAP;
    f->req_prod_pvt = f->rsp_cons + published;
}

static void start_back(void *state)
{
    struct ring_back *b = state;

    b->req_cons = b->req_seen = b->rsp_prod_pvt = (uint32_t)NEAR_WRAP;
}

/* ---- rings */

static uint8_t records[8 * 112];
static struct ring_front front;
static struct ring_back back;

static void some_records(uint32_t size)
{
    for (uint32_t i = 0; i < 8; i++)
        fill(records + i * size, size, i);
}

static void back_setup(void)
{
    some_records(16);
    ring_back_attach(&back, raw_ring(pages[0], records, 12, 16, 5, 0), PAGE, 12, 16);
    start_back(&back);
}

static void back_act(void)
{
    uint8_t in[16 * 12] = {0};

    CALL(back_take(&back, in, 3));
    CALL(back_publish(&back, records, 2));
    LOOKS_TWICE(back_recheck(&back));
    CALL(back_take(&back, in + 36, 5));
    CALL(back_publish(&back, records + 32, 3));
    LOOKS_TWICE(back_recheck(&back));
    note(in, sizeof in);
}

static void front_setup(void)
{
    some_records(16);
    ring_front_init(&front, pages[0], PAGE, 12, 16);
    start_front(&front, 5);
    raw_ring(pages[0], records, 16, 16, 5, 5);
}

static void front_act(void)
{
    uint8_t in[16 * 16] = {0};

    CALL(front_take(&front, in, 2));
    CALL(front_publish(&front, records, 2));
    CALL(front_take(&front, in + 32, 8));
    LOOKS_TWICE(front_recheck(&front));
    note(in, sizeof in);
}

/* ---- byte rings: indexes on a page of their own, read and written by both */

static struct { _Atomic uint32_t cons, prod; } *indexes;

static void bytes_setup(void)
{
    indexes = (void *)pages[0];
    indexes->cons = (uint32_t)NEAR_WRAP;
    indexes->prod = (uint32_t)NEAR_WRAP + 20;
    for (uint32_t i = 0; i < 32; i++)
        pages[1][i] = (uint8_t)(i + 1);
    region(pages[0], PAGE);
    region(pages[1], 0);
}

static void bytes_act(void)
{
    uint8_t in[64] = {0};

    CALL(bytes_read(pages[1], &indexes->cons, &indexes->prod, 32, in, 7));
    CALL(bytes_read(pages[1], &indexes->cons, &indexes->prod, 32, in + 7, 25));
    CALL(bytes_write(pages[1], &indexes->cons, &indexes->prod, 32, "abcdef", 6));
    note(in, sizeof in);
}

/* ---- the block mover: the ring alone is believed, the data pages are data */

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
static struct blk_vbd vbd;
static int image = -1;
static _Alignas(4096) uint8_t data[4][PAGE];

static void blk_setup(void)
{
    struct blk_request q[4] = {
        {.op = 1, .nr_segments = 2, .handle = 7, .id = 11, .sector = 3, .seg = {{0, 0, 7, 0}, {1, 2, 3, 0}}},
        {.op = 0, .nr_segments = 1, .handle = 7, .id = 12, .sector = 20, .seg = {{2, 0, 3, 0}}},
        {.op = 3, .handle = 7, .id = 13},
        {.op = 1, .nr_segments = 1, .handle = 7, .id = 14, .sector = 63, .seg = {{3, 0, 1, 0}}}, /* past the end */
    };
    uint8_t sector[512];

    image = image < 0 ? memfd_create("image", 0) : image;
    for (uint32_t i = 0; i < 80; i++) {
        fill(sector, sizeof sector, i);
        if (pwrite(image, sector, sizeof sector, i * 512) != sizeof sector)
            exit(1);
    }
    for (uint32_t i = 0; i < 4; i++)
        fill(data[i], PAGE, 500 + i);
    memset(&vbd, 0, sizeof vbd);
    blk_attach(&vbd, raw_ring(pages[0], q, sizeof *q, sizeof *q, 4, 0), PAGE);
    start_back(vbd.ring);
    vbd.fd = image;
    vbd.handle = 7;
    vbd.writable = 1;
    vbd.nr_extents = 2;
    vbd.extents[0] = (struct blk_extent){8, 32};
    vbd.extents[1] = (struct blk_extent){44, 32};
    vbd.sectors = 64;
}

static void blk_act(void)
{
    uint32_t grefs[BLK_BATCH * 11];
    int32_t n;

    CALL(blk_take(&vbd));
    CALL(n = blk_missing(&vbd, grefs, BLK_BATCH * 11));
    for (int32_t i = 0; i < n; i++)
        if (grefs[i] < 4)
            vbd.address[grefs[i]] = (uintptr_t)data[grefs[i]];
    CALL(blk_run(&vbd));
    LOOKS_TWICE(blk_recheck(&vbd));
}

static void blk_after(void)
{
    uint8_t sector[512];

    for (uint32_t i = 0; i < 80 && pread(image, sector, sizeof sector, i * 512) == sizeof sector; i++)
        note(sector, 8);
    note(data[2], 4 * 512);
}

/* ---- the switch: rings, and the frame whose header is judged */

struct tx_request {
    uint32_t gref;
    uint16_t offset, flags, id, size;
};
struct rx_request {
    uint16_t id, pad;
    uint32_t gref;
};
struct rx_response {
    uint16_t id, offset, flags;
    int16_t status;
};
static struct nswitch sw;
static const uint8_t to_two[14 + 28] = {2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0, 0, 228, 0, 0, 0, 0, 64, 17, 0, 0,
                                        10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 0, 53, 0, 208, 0, 0};
enum { FRAME = 14 + 228, AT = 100 };

/* A frame of 242 bytes from vif 0 to vif 1, from 100 bytes into a granted page, to where only port 53 is let through. */
static void switch_setup(void)
{
    struct tx_request sent = {.gref = 3, .offset = AT, .id = 5, .size = FRAME};
    struct rx_request posted[2] = {{.id = 8, .gref = 1}, {.id = 9, .gref = 2}};

    memset(&sw, 0, sizeof sw);
    vif_attach(&sw.vifs[0], raw_ring(pages[0], &sent, 12, 12, 1, 0), raw_ring(pages[1], posted, 8, 8, 0, 0), PAGE);
    vif_attach(&sw.vifs[1], raw_ring(pages[2], &sent, 12, 12, 0, 0), raw_ring(pages[3], posted, 8, 8, 2, 0), PAGE);
    for (uint32_t i = 0; i < 2; i++) {
        struct vif *v = &sw.vifs[i];

        start_back(v->tx);
        start_back(v->rx);
        v->connected = 1;
        memcpy(v->mac, "\2\0\0\0\0", 5);
        v->mac[5] = (uint8_t)(1 + i);
        v->ip = 0x0a000001 + i;
    }
    sw.nr_rules = 1;
    sw.rules[0] = (struct rule){.src_port = {0, 65535}, .dst_port = {53, 53}, .src_vif = -1, .dst_vif = -1, .protocol = 17,
                                .action = RULE_ACCEPT};
    for (uint32_t i = 0; i < FRAME; i++)
        pages[4][AT + i] = (uint8_t)i;
    memcpy(pages[4] + AT, to_two, sizeof to_two);
    region(pages[4], 0)->judged = AT + 128;
    memset(data, 0, sizeof data);
}

static void switch_act(void)
{
    uint32_t grefs[SWITCH_RING];

    CALL(vif_take(&sw.vifs[1], 0));
    CALL(vif_take(&sw.vifs[0], 64));
    CALL(vif_missing(&sw.vifs[0], 0, grefs, SWITCH_RING));
    sw.vifs[0].readable[3] = (uintptr_t)pages[4];
    CALL(vif_missing(&sw.vifs[1], 1, grefs, SWITCH_RING));
    sw.vifs[1].writable[1] = (uintptr_t)data[1];
    CALL(switch_run(&sw, 0));
    CALL(vif_publish(&sw.vifs[0]));
    CALL(vif_publish(&sw.vifs[1]));
    LOOKS_TWICE(vif_recheck(&sw.vifs[0]));
}

static void switch_after(void)
{
    note(data[1], PAGE);
    note(&sw.rules[0].hits, 8);
}

/* ---- the network frontend, whose backend lies when it can */

static struct netfront net;

static void net_setup(void)
{
    struct rx_response got[2] = {{.id = 2, .offset = AT, .status = FRAME}, {.id = 0, .offset = 0, .status = 60}};
    const uint16_t sent[2][2] = {{0, 0}, {1, (uint16_t)-2}}; /* id, status */
    uint32_t sum = 0;

    memset(&net, 0, sizeof net);
    net_open(&net, pages[0], pages[1], PAGE);
    net.rx_pool = (uintptr_t)pages[4];
    net.tx_pool = (uintptr_t)pages[10];
    for (uint32_t i = 0; i < 3; i++)
        net.rx_posted[i] = net.tx_busy[i] = 1;
    for (uint32_t i = 3; i < NET_RING; i++)
        net.rx_posted[i] = 1; /* pages that this test does not have */
    net.nr_tx_free = 2;
    net.tx_free[0] = 3;
    net.tx_free[1] = 4;
    start_front(net.tx, 3);
    start_front(net.rx, 3);
    raw_ring(pages[0], sent, 4, 12, 0, 2);
    memcpy(pages[0] + 64 + 254 * 12, sent[0], 4);
    memcpy(pages[0] + 64 + 255 * 12, sent[1], 4);
    raw_ring(pages[1], got, 8, 8, 2, 2);
    memset(pages[6], 0, PAGE);
    memcpy(pages[6] + AT, to_two, sizeof to_two);
    for (uint32_t i = 0; i < 20; i += 2)
        sum += (uint32_t)to_two[14 + i] << 8 | to_two[15 + i];
    sum = ~((sum & 0xffff) + (sum >> 16)) & 0xffff;
    pages[6][AT + 24] = (uint8_t)(sum >> 8);
    pages[6][AT + 25] = (uint8_t)sum;
    region(pages[4], 0);
    region(pages[6], 0);
}

static void net_act(void)
{
    static uint8_t in[4 * NET_FRAME];
    static const uint8_t plain[64] = {1, 2, 3};
    uint32_t lengths[4] = {0}, received = 0, offset = 0, sent = 0, length = sizeof plain;

    memset(in, 0, sizeof in);
    CALL(net_recv(&net, in, lengths, 4, &received));
    CALL(udp_payload(in, lengths[0], &offset));
    LOOKS_TWICE(net_recheck_rx(&net));
    CALL(net_send(&net, NULL, 0, plain, &length, 1, &sent));
    CALL(net_reap(&net));
    LOOKS_TWICE(net_recheck_tx(&net));
    note(in, FRAME + 60);
    note(lengths, sizeof lengths);
    result(received << 16 | offset << 8 | sent);
}

/* ---- the hypervisor: hypercall ring, events, grants */

static struct callring ring;
static struct evt_end end_one, end_two;
static struct evt_end *ends[4] = {0, &end_one, &end_two, 0};

/* Two channels from domain 1 to 2. Who changes his own pending bits after a look of ours loses or gains his own event: the
 * exchange that follows decides, so that is no attack. */
static void two_channels(void)
{
    memset(&end_one, 0, sizeof end_one);
    memset(&end_two, 0, sizeof end_two);
    end_one.ports[5] = (struct evt_port){.state = 2, .remote_domid = 2, .remote_port = 70};
    end_one.ports[6] = (struct evt_port){.state = 2, .remote_domid = 2, .remote_port = 200};
    end_one.shared_info = pages[1];
    end_two.shared_info = pages[2];
    region(pages[1], PAGE)->mask = 0;
    region(pages[2], PAGE)->mask = 0;
}

static void callring_setup(void)
{
    uint64_t q[4][8] = {{32, 0, 4, 5}, {32, 0, 4, 5000}, {32, 0, 4, 6}, {17, 0, 6, 99, 98, 97, 96, 95}};

    memset(&ring, 0, sizeof ring);
    two_channels();
    callring_attach(&ring, raw_ring(pages[0], q, 64, 64, 4, 0));
    start_back(ring.ring);
}

static void callring_act(void)
{
    int32_t left;

    CALL(left = callring_run(&ring, ends, 1, 0, 1));
    for (int32_t i = 0; i < left; i++)
        callring_answer(&ring, (int64_t)ring.entries[ring.next][3]);
    CALL(callring_run(&ring, ends, 1, 0, 1));
    LOOKS_TWICE(callring_recheck(&ring));
}

/* Requests that wait in a ring of the guest's own, and the hypervisor's answers. */
static void callround_setup(void)
{
    uint64_t answers[3][2] = {{32, 1}, {32, 2}, {17, 3}};
    const uint32_t start = (uint32_t)NEAR_WRAP;

    ring_front_init(&front, pages[0], PAGE, 64, 16);
    start_front(&front, 3);
    raw_ring(pages[0], answers, 16, 64, 3, 3);
    front.sh->req_event = start + 100;
}

static void callround_act(void)
{
    static uint8_t entries[3 * 64];
    uint8_t in[3 * 16] = {0};
    uint32_t pushed = 3, answered = 0;

    CALL(callring_round(&front, entries, 3, &pushed, in, &answered, 0));
    note(in, sizeof in);
}

static void event_setup(void)
{
    two_channels();
    memset(pages[2] + 2048 + 8, 0x0f, 1); /* four pending, two of them masked */
    memset(pages[2] + 2560 + 8, 0x03, 1);
    pages[2][8] = 3; /* the selector */
}

static void event_act(void)
{
    uint32_t ports[8] = {0};
    uint16_t signal = 0;

    CALL(evtchn_send(ends, 1, 5, &signal));
    CALL(evtchn_unmask(&end_two, 65));
    CALL(evtchn_is_pending(&end_two, 64));
    CALL(upcall_is_pending(&end_two));
    CALL(upcall_drain(pages[2], ports, 8));
    note(ports, sizeof ports);
    result(signal);
}

static struct gnt_domain granter, taker;
static struct gnt_domain *grant_domains[0x7FF0];
enum { FRAMES = 64, OWN_FRAME = 30 }; /* the granter's, but for one */
static struct frame frames[FRAMES];
static _Alignas(4096) char machine[FRAMES * PAGE];
static struct mmu mmu = {.frames = frames, .machine = machine, .nr_frames = FRAMES};

static void grant_setup(void)
{
    uint64_t *table = (uint64_t *)pages[0];

    memset(machine, 0, sizeof machine);
    for (uint32_t i = 0; i < FRAMES; i++)
        frames[i] = (struct frame){.total = 1, .owner = i == OWN_FRAME ? 2 : 1, .parent = NO_MFN};
    for (uint32_t i = 0; i < GRANT_TABLE_FRAMES; i++)
        granter.table[i] = taker.table[i] = (char *)pages[0];
    granter.domid = 1;
    taker.domid = 2;
    granter.alive = taker.alive = 1;
    grant_domains[1] = &granter;
    grant_domains[2] = &taker;
    table[8] = 20ull << 32 | 2 << 16 | 1;
    table[9] = 21ull << 32 | 2 << 16 | 1 | 4;
    table[10] = 22ull << 32 | 2 << 16 | 2;
    region(pages[0], 0)->mask = 0xf0; /* the frame: an entry of another domain is refused, which is no news */
}

/* The attacker may well win against a first look; then what counts is what the exchange saw, which is what stands there. */
static void grant_act(void)
{
    const uint64_t *table = (const uint64_t *)pages[0];
    uint32_t got[2] = {0};
    int32_t r[3];

    trap_call(1);
    r[0] = grant_claim(&granter, 8, 2, 1, &got[0]);
    trap_call(1);
    r[1] = grant_claim(&granter, 9, 2, 0, &got[1]);
    trap_call(1);
    r[2] = grant_accept(&granter, 10, 2);
    if (!r[2])
        grant_accepted(&granter, 10, 2, 45);
    trap_end();
    for (int i = 0; i < 2; i++) {
        int used = (table[8 + i] & 8) != 0;

        result(r[i] ? attacking && r[i] == -EPERM && !used : used && got[i] == (uint32_t)(table[8 + i] >> 32));
    }
    result(r[2] ? attacking && r[2] == -EPERM && !(table[10] & 4) : table[10] == (45ull << 32 | 2 << 16 | 2 | 4 | 8));
}

struct copy_op {
    struct {
        uint64_t frame;
        uint16_t domid, offset;
        uint32_t pad;
    } source, dest;
    uint16_t len, flags;
    int16_t status;
    uint16_t pad;
};

/* What is copied is the frame that the exchange saw, and the claim is undone. */
static void copy_act(void)
{
    struct copy_op op = {{9, 1, 8, 0}, {OWN_FRAME, 0x7FF0, 16, 0}, 100, 1, 0, 0};
    const uint64_t *table = (const uint64_t *)pages[0];
    uint32_t frame;
    char *from, *to = machine + OWN_FRAME * PAGE;

    for (uint32_t i = 0; i < FRAMES; i++)
        fill(machine + i * PAGE, PAGE, i);
    trap_call(1);
    grant_copy(grant_domains, 2, &mmu, (char *)&op, 1);
    trap_end();
    frame = (uint32_t)(table[9] >> 32);
    from = frame < FRAMES ? machine + frame * PAGE + 8 : NULL;
    result(!(table[9] & 0x18) && frames[OWN_FRAME].total == 1 && !frames[OWN_FRAME].count);
    result(op.status ? attacking && whole(to, PAGE, OWN_FRAME) : from && !memcmp(to + 16, from, 100));
}

/* ---- */

static const struct trial {
    const char *name;
    void (*setup)(void), (*act)(void), (*after)(void);
    int64_t results[12]; /* of the calls when it is left alone: it did what it is there for */
} trials[] = {
    {"ring_back", back_setup, back_act, NULL, {3, 1, 1, 2, 0, 0}},
    {"ring_front", front_setup, front_act, NULL, {2, 0, 3, 0}},
    {"bytes", bytes_setup, bytes_act, NULL, {7, 13, 6}},
    {"blk", blk_setup, blk_act, blk_after, {4, 4, 1, 0}},
    {"switch", switch_setup, switch_act, switch_after, {0, 1, 1, 2, 0, 1, 1, 0}},
    {"net", net_setup, net_act, NULL, {0, 200, 0, 0, 0, 0, 2 << 16 | 42 << 8 | 1}},
    {"callring", callring_setup, callring_act, NULL, {1, 0, 0}},
    {"callring_round", callround_setup, callround_act, NULL, {0}},
    {"event", event_setup, event_act, NULL, {0, 0, 1, 0, 4, NO_DOMAIN}},
    {"grant_claim", grant_setup, grant_act, NULL, {1, 1, 1}},
    {"grant_copy", grant_setup, copy_act, NULL, {1, 1}},
};

enum mode { ALONE, WATCHED, ATTACKED };

static void run(const struct trial *t, enum mode mode)
{
    memset(pages, 0, sizeof pages);
    nr_regions = nr_out = nr_results = 0;
    memset(out, 0, sizeof out);
    t->setup();
    if (mode != ALONE)
        trap_begin(mode == ATTACKED);
    t->act();
    trap_call(1);
    trap_end();
    if (t->after)
        t->after();
    note(pages[0], 16); /* the indexes */
}

int main(int argc, char **argv)
{
    static uint8_t alone[sizeof out];

    for (const struct trial *t = trials; t < trials + sizeof trials / sizeof *trials; t++) {
        int differs;

        if (argc > 1 && strcmp(argv[1], t->name))
            continue;
        run(t, ALONE);
        if (memcmp(results, t->results, nr_results * sizeof *results)) {
            fprintf(stderr, "%s: left alone it does something else\n", t->name);
            return 1;
        }
        memcpy(alone, out, sizeof out);
        run(t, WATCHED);
        differs = memcmp(alone, out, sizeof out) != 0;
        printf("%s %u %u ", t->name, nr_reads, nr_twice);
        fflush(stdout);
        run(t, ATTACKED);
        differs |= memcmp(alone, out, sizeof out) != 0;
        printf("%d\n", differs);
        fflush(stdout);
    }
    return 0;
}
