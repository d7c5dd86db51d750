/* The switch against hostile guests: what is delivered, where, and what of it is allowed, is as the model says; nothing but
 * posted buffers is written, nothing but granted frames is read. */
#include "fuzz.h"

#include <sanitizer/asan_interface.h>

#include "switch.h"

enum { VIFS = 3, FRAMES = 4, GRANTED = 3, MOST = 1514, LEAST = 14, PAGE = 4096 };
static const uint32_t slots[VIFS] = {0, 1, SWITCH_VIFS - 1}; /* of the switch */

struct tx_request {
    uint32_t gref;
    uint16_t offset, flags, id, size;
};
struct tx_response {
    uint16_t id;
    int16_t status;
};
struct rx_request {
    uint16_t id, pad;
    uint32_t gref;
};
struct rx_response {
    uint16_t id, offset, flags;
    int16_t status;
};

/* A guest: its rings, the frames it sends from and the ones it receives into (the last of each is not granted), with pages
 * between them that nobody may touch. */
static struct guest {
    _Alignas(4096) uint8_t tx_ring[PAGE], rx_ring[PAGE], gap[PAGE];
    uint8_t sent[FRAMES][2][PAGE], received[FRAMES][2][PAGE];
    struct peer tx, rx;
    uint32_t ip;
    uint16_t ids;
    uint64_t stats[7];
} guests[VIFS];
static struct nswitch sw;

static uint8_t marker(uint32_t i) { return (uint8_t)(0xa0 + i); }

static void write16(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}
static void write32(uint8_t *p, uint32_t v)
{
    write16(p, v >> 16);
    write16(p + 2, v);
}
static uint32_t read16(const uint8_t *p) { return (uint32_t)p[0] << 8 | p[1]; }
static uint32_t read32(const uint8_t *p) { return read16(p) << 16 | read16(p + 2); }

/* ---- the model: what of frame `f`, seen where it was delivered, may go from one vif to another */

static int model_allows(const uint8_t *f, uint32_t size, uint32_t from, uint32_t to)
{
    const struct guest *g = &guests[from];
    uint32_t type = read16(f + 12), header, length, protocol, ports = 0;
    const uint8_t *ip = f + 14;

    if (f[11] != from + 1 || memcmp(f + 6, "\2\0\0\0\0", 5))
        return 0;
    if (type == 0x806)
        return !g->ip || (size >= 42 && !memcmp(f + 6, f + 22, 6) && read32(f + 28) == g->ip);
    if (type != 0x800 || size < 34 || ip[0] >> 4 != 4 || (g->ip && read32(ip + 12) != g->ip))
        return 0;
    header = (ip[0] & 15u) * 4;
    length = read16(ip + 2);
    if (header < 20 || length < header || length + 14 > size)
        return 0;
    protocol = ip[9];
    if ((protocol == 6 || protocol == 17) && length >= header + 8 && (read16(ip + 6) & 0x1fff) == 0)
        ports = 1;
    for (uint32_t i = 0; i < sw.nr_rules; i++) {
        const struct rule *r = &sw.rules[i];
        int all_ports = !r->src_port[0] && r->src_port[1] == 0xffff && !r->dst_port[0] && r->dst_port[1] == 0xffff;
        uint32_t source = ports ? read16(ip + header) : 0, target = ports ? read16(ip + header + 2) : 0;

        if ((r->src_vif < 0 ? r->src_vif == -1 : r->src_vif == (int)slots[from]) &&
            (r->dst_vif < 0 ? r->dst_vif == -1 : r->dst_vif == (int)slots[to]) &&
            (read32(ip + 12) & r->src_mask) == (r->src & r->src_mask) && (read32(ip + 16) & r->dst_mask) == (r->dst & r->dst_mask) &&
            (!r->protocol || r->protocol == protocol) &&
            (all_ports || (ports && source >= r->src_port[0] && source <= r->src_port[1] && target >= r->dst_port[0] &&
                           target <= r->dst_port[1])))
            return r->action == RULE_ACCEPT;
    }
    return (int)sw.accept_by_default;
}

/* ---- what guests do */

static void build(struct input *in, uint32_t from, uint8_t *f)
{
    static const uint16_t ports[4] = {53, 80, 7000, 0};
    uint32_t to = below(in, VIFS + 2), options = rarely(in, 8) ? 4 : 0, type = below(in, 8), size;

    memset(f, 0x11, MOST);
    memcpy(f, to == VIFS ? "\377\377\377\377\377\377" : "\2\0\0\0\0\11", 6);
    if (to < VIFS)
        f[5] = (uint8_t)(to + 1);
    memcpy(f + 6, "\2\0\0\0\0", 5);
    f[11] = (uint8_t)(from + 1);
    write16(f + 12, type == 7 ? 0x806 : 0x800);
    if (type == 7) {
        memcpy(f + 22, f + 6, 6);
        write32(f + 28, guests[from].ip);
        return;
    }
    f[14] = (uint8_t)(rarely(in, 16) ? 0x40 + below(in, 16) : 0x45 + options / 4);
    size = 28 + options + below(in, 200);
    write16(f + 16, size);
    write16(f + 20, rarely(in, 8) ? 100 : 0);
    f[23] = type < 4 ? 17 : type < 6 ? 6 : 1;
    write32(f + 26, 0x0a000001 + from);
    write32(f + 30, 0x0a000001 + to % VIFS);
    write16(f + 34 + options, ports[below(in, 4)]);
    write16(f + 36 + options, ports[below(in, 4)]);
}

static void send_frame(struct input *in, uint32_t from)
{
    struct guest *g = &guests[from];
    struct tx_request r = {.gref = below(in, GRANTED), .id = g->ids++};
    uint8_t *frame;

    r.size = (uint16_t)(60 + below(in, 200) + (rarely(in, 8) ? MOST - 259 : 0));
    r.offset = rarely(in, 4) ? (uint16_t)(PAGE - r.size) : (uint16_t)(below(in, 64) * 32);
    frame = g->sent[r.gref][0] + r.offset;
    if (r.offset + MOST <= PAGE)
        build(in, from, frame);
    if (rarely(in, 3))
        poke(in, frame, 42);
    if (rarely(in, 8))
        poke(in, &r, sizeof r);
    if (rarely(in, 12))
        r.size = MOST + 1;
    put_request(&g->tx, &r, sizeof r);
}

static void post(struct input *in, uint32_t to)
{
    struct guest *g = &guests[to];

    for (uint32_t n = 1 + below(in, 4); n; n--) {
        struct rx_request r = {.id = g->ids++, .gref = below(in, GRANTED)};

        if (rarely(in, 6))
            poke(in, &r, sizeof r);
        put_request(&g->rx, &r, sizeof r);
    }
}

/* ---- a turn of the driver domain, and what came of it */

static uint32_t named[VIFS][2][64], nr_named[VIFS][2]; /* references this play named: they are forgotten at its end */

static void map_missing(uint32_t i)
{
    struct vif *v = &sw.vifs[slots[i]];

    for (int buffers = 0; buffers < 2; buffers++) {
        uint32_t grefs[SWITCH_RING], *kept = named[i][buffers];
        uint64_t *table = buffers ? v->writable : v->readable;
        int32_t n = vif_missing(v, buffers, grefs, 8);

        for (int32_t k = 0; k < n; k++) {
            if (grefs[k] < GRANTED)
                table[grefs[k]] = (uintptr_t)(buffers ? guests[i].received : guests[i].sent)[grefs[k]][0];
            if (nr_named[i][buffers] < 64)
                kept[nr_named[i][buffers]++] = grefs[k];
            else
                table[grefs[k]] = 0;
        }
    }
}

/* Every answer to vif `to` since `before`: a frame of `from`'s that may be there, in the buffer that was posted. */
static void check_delivery(uint32_t from, uint32_t to, uint32_t before, const struct rx_request *posted)
{
    struct vif *v = &sw.vifs[slots[to]];
    const struct rx_response *answers = (const struct rx_response *)v->answers;

    for (uint32_t i = before; i < v->answered; i++) {
        const struct rx_response *a = &answers[i];
        const uint8_t *f = posted[i - before].gref < GRANTED ? guests[to].received[posted[i - before].gref][0] : NULL;
        int last = 1, most = 0; /* several frames may have come into one buffer: the last is there to be seen */

        must(a->id == posted[i - before].id && a->status != 0 && a->status <= MOST);
        for (uint32_t k = before; k < v->answered; k++)
            if (posted[k - before].gref == posted[i - before].gref) {
                last = k <= i;
                most = answers[k].status > most ? answers[k].status : most;
            }
        if (a->status < 0) {
            must(!f || !v->writable[posted[i - before].gref] || v->writable[posted[i - before].gref] == 1);
            continue;
        }
        must(f && a->status >= LEAST && a->offset == 0 && a->flags == 0);
        if (last) {
            must(f[0] & 1 || f[5] == to + 1);
            must(model_allows(f, (uint32_t)a->status, from, to));
            must(f[most] == marker(to));
        }
    }
}

static void turn(uint32_t from)
{
    struct vif *v = &sw.vifs[slots[from]];
    struct rx_request posted[VIFS][SWITCH_RING];
    uint32_t before[VIFS], base = ((struct ring_back *)v->tx)->rsp_prod_pvt;
    struct tx_request batch[SWITCH_RING];
    int32_t n;

    if (!v->connected)
        return;
    n = vif_take(v, 64);
    if (n < 0)
        v->connected = 0;
    if (n <= 0)
        return;
    memcpy(batch, v->batch, (size_t)n * sizeof *batch);
    for (uint32_t to = 0; to < VIFS; to++) {
        struct vif *d = &sw.vifs[slots[to]];

        if (to != from && d->connected && vif_take(d, 0) < 0)
            d->connected = 0;
        map_missing(to);
        before[to] = d->answered;
        for (uint32_t k = 0; k < d->posted; k++)
            posted[to][k] = ((struct rx_request *)d->buffers)[(d->first + k) % SWITCH_RING];
        for (uint32_t k = 0; k < GRANTED; k++)
            memset(guests[to].received[k][0], marker(to), MOST + 1);
    }
    must(switch_run(&sw, slots[from]) == 0);
    for (int32_t i = 0; i < n; i++) {
        const struct tx_response *a = slot_at(&guests[from].tx, base + (uint32_t)i);

        must(a->id == batch[i].id && a->status <= 0 && a->status >= -2);
    }
    for (uint32_t to = 0; to < VIFS; to++) {
        must(to != from || sw.vifs[slots[to]].answered == before[to]);
        check_delivery(from, to, before[to], posted[to]);
    }
}

/* ---- */

static void rules(struct input *in)
{
    sw.accept_by_default = below(in, 2);
    sw.nr_rules = below(in, 5);
    for (struct rule *r = sw.rules; r < sw.rules + sw.nr_rules; r++) {
        uint32_t n = (uint32_t)number(in, 2);

        *r = (struct rule){.src = 0x0a000001 + n % 4, .src_mask = n & 4 ? 0xffffffff : 0, .dst = 0x0a000001 + n / 8 % 4};
        r->dst_mask = n & 32 ? 0xffffff00 : 0;
        r->dst_port[0] = n & 64 ? 53 : 0;
        r->dst_port[1] = n & 64 ? 80 : 0xffff;
        r->src_port[1] = n & 128 ? 7000 : 0xffff;
        r->protocol = (uint8_t[]){0, 0, 17, 6}[n / 256 % 4];
        r->src_vif = n & 1024 ? (int16_t)slots[n / 2048 % 3] : -1;
        r->dst_vif = n & 8192 ? -2 : -1;
        r->action = n & 16384 ? RULE_ACCEPT : RULE_DROP;
    }
}

static void once(void)
{
    for (uint32_t i = 0; i < VIFS; i++) {
        struct guest *g = &guests[i];

        ASAN_POISON_MEMORY_REGION(g->gap, PAGE);
        for (uint32_t k = 0; k < FRAMES; k++) {
            ASAN_POISON_MEMORY_REGION(g->sent[k][k < GRANTED], PAGE); /* the page behind, or one that is not granted */
            ASAN_POISON_MEMORY_REGION(g->received[k][k < GRANTED], PAGE);
        }
    }
}

static void connect(struct input *in, uint32_t i)
{
    struct guest *g = &guests[i];
    struct vif *v = &sw.vifs[slots[i]];

    for (int buffers = 0; buffers < 2; buffers++)
        while (nr_named[i][buffers])
            (buffers ? v->writable : v->readable)[named[i][buffers][--nr_named[i][buffers]]] = 0;
    memset(v, 0, offsetof(struct vif, readable));
    g->tx = peer_of(g->tx_ring, sizeof(struct tx_request), start_index(in));
    g->rx = peer_of(g->rx_ring, sizeof(struct rx_request), start_index(in));
    must(vif_attach(v, g->tx_ring, g->rx_ring, PAGE) == 0);
    g->ip = rarely(in, 4) ? 0 : 0x0a000001 + i;
    g->ids = 0;
    for (uint32_t k = 0; k < GRANTED; k++)
        memset(g->sent[k][0], 0x22, PAGE);
    v->connected = 1;
    v->ip = g->ip;
    v->stats = g->stats;
    memcpy(v->mac, "\2\0\0\0\0", 5);
    v->mac[5] = (uint8_t)(i + 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    static int poisoned;

    if (!poisoned++)
        once();
    for (uint32_t i = 0; i < VIFS; i++)
        connect(&in, i);
    rules(&in);
    while (more(&in)) {
        uint32_t i = below(&in, VIFS);

        switch (below(&in, 12)) {
        default:
            send_frame(&in, i);
            break;
        case 5:
        case 6:
        case 7:
            post(&in, i);
            break;
        case 8:
            if (rarely(&in, 4))
                mischief(&in, rarely(&in, 2) ? &guests[i].tx : &guests[i].rx);
            break;
        case 9:
        case 10:
            turn(i);
            break;
        case 11:
            if (sw.vifs[slots[i]].connected)
                must(vif_publish(&sw.vifs[slots[i]]) >= 0);
            vif_recheck(&sw.vifs[slots[i]]);
        }
    }
    turn(0);
    return 0;
}
