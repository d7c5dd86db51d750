/* The switch: takes transmit requests, judges a private copy of each header, delivers that copy and the payload into a
 * buffer that the receiver posted. No buffer: the frame drops and is counted. Nothing here waits, nothing grows. */
#include "switch.h"

#include <errno.h>
#include <string.h>

#include "ring.h"

#define HEADER 128u
#define MIN_FRAME 14u
#define MAX_FRAME 1514u
#define ARP_FRAME 60u /* the shortest frame of a wire: ARP and its padding; a longer one would carry data past the rules */
#define PAGE 4096u

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
_Static_assert(sizeof(struct tx_request) == 12 && sizeof(struct tx_response) == 4, "netif_tx");
_Static_assert(sizeof(struct rx_request) == 8 && sizeof(struct rx_response) == 8, "netif_rx");
_Static_assert(sizeof(struct ring_back) <= 64, "the room that vif has for it");

enum { OKAY = 0, ERROR = -1, DROPPED = -2 };
enum { TX_BYTES, RX_BYTES, TX_PACKETS, BATCHES, NOTIFIES, DROPS, RX_PACKETS };

static struct ring_back *tx_of(struct vif *v) { return (struct ring_back *)v->tx; }
static struct ring_back *rx_of(struct vif *v) { return (struct ring_back *)v->rx; }
static uint16_t be16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static uint32_t be32(const uint8_t *p) { return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3]; }

int32_t vif_attach(struct vif *v, void *tx, void *rx, uint64_t bytes)
{
    int r = ring_back_attach(tx_of(v), tx, bytes, sizeof(struct tx_request), sizeof(struct tx_response));

    return r ? r : ring_back_attach(rx_of(v), rx, bytes, sizeof(struct rx_request), sizeof(struct rx_response));
}

/* Copy what the guest published: at most `max` frames to send, and every buffer it posted. Frames taken, or -EPROTO. */
int32_t vif_take(struct vif *v, uint32_t max)
{
    struct rx_request fresh[SWITCH_RING];
    int32_t n = ring_back_take(rx_of(v), fresh, SWITCH_RING - v->posted);

    if (n < 0)
        return n;
    for (int32_t i = 0; i < n; i++)
        ((struct rx_request *)v->buffers)[(v->first + v->posted++) % SWITCH_RING] = fresh[i];
    n = ring_back_take(tx_of(v), v->batch, max < SWITCH_RING ? max : SWITCH_RING);
    v->taken = n > 0 ? (uint32_t)n : 0;
    return n;
}

static uint32_t name(uint64_t *address, uint32_t gref, uint32_t *grefs, uint32_t n)
{
    if (gref >= VIF_GREFS || address[gref])
        return n;
    address[gref] = 1; /* named once; the caller puts the address, or leaves it refused */
    grefs[n] = gref;
    return n + 1;
}

/* Grants that are not mapped yet: of frames taken, or of buffers posted. */
int32_t vif_missing(struct vif *v, int32_t buffers, uint32_t *grefs, uint32_t max)
{
    uint32_t n = 0;

    for (uint32_t i = 0; !buffers && i < v->taken && n < max; i++)
        n = name(v->readable, ((struct tx_request *)v->batch)[i].gref, grefs, n);
    for (uint32_t i = 0; buffers && i < v->posted && n < max; i++)
        n = name(v->writable, ((struct rx_request *)v->buffers)[(v->first + i) % SWITCH_RING].gref, grefs, n);
    return (int32_t)n;
}

/* ---- the firewall-router: what it judges is the private copy, which is what is delivered */

struct key {
    uint32_t src, dst;
    uint16_t src_port, dst_port;
    uint8_t protocol, has_ports;
};

/* 0 where the header is not a whole IPv4 header. A fragment but the first has no ports: it matches no rule that names
 * some, and neither does a first one too short to carry them. */
static int parse(const uint8_t *h, uint32_t copied, uint32_t size, struct key *k)
{
    uint32_t ihl, total;

    if (copied < 34 || h[14] >> 4 != 4)
        return 0;
    ihl = (uint32_t)(h[14] & 15) * 4;
    total = be16(h + 16);
    if (ihl < 20 || 14 + ihl > copied || total < ihl || 14 + total > size)
        return 0;
    *k = (struct key){.src = be32(h + 26), .dst = be32(h + 30), .protocol = h[23]};
    if ((k->protocol == 6 || k->protocol == 17) && !(be16(h + 20) & 0x1fff) && total >= ihl + 8 && copied >= 14 + ihl + 8) {
        k->has_ports = 1;
        k->src_port = be16(h + 14 + ihl);
        k->dst_port = be16(h + 14 + ihl + 2);
    }
    return 1;
}

static int any_port(const uint16_t range[2]) { return range[0] == 0 && range[1] == 65535; }
static int in(const uint16_t range[2], uint16_t port) { return range[0] <= port && port <= range[1]; }

static int matches(const struct rule *r, const struct key *k, int32_t from, int32_t to)
{
    if ((r->src_vif != -1 && r->src_vif != from) || (r->dst_vif != -1 && r->dst_vif != to))
        return 0;
    if (((k->src ^ r->src) & r->src_mask) || ((k->dst ^ r->dst) & r->dst_mask))
        return 0;
    if (r->protocol && r->protocol != k->protocol)
        return 0;
    if (any_port(r->src_port) && any_port(r->dst_port))
        return 1;
    return k->has_ports && in(r->src_port, k->src_port) && in(r->dst_port, k->dst_port);
}

/* RULE_ACCEPT or RULE_DROP: the first rule that matches, else the default. Frames that are neither IPv4 nor ARP drop. */
int32_t firewall_judge(struct nswitch *sw, const void *header, uint32_t copied, uint32_t size, int32_t from, int32_t to)
{
    const uint8_t *h = header;
    struct key k = {0};
    uint16_t type = copied >= MIN_FRAME ? be16(h + 12) : 0;

    if (type == 0x0806 && size <= ARP_FRAME)
        return RULE_ACCEPT; /* no room for more than the message; its sender was checked against spoofing */
    if (type != 0x0800 || !parse(h, copied, size, &k)) {
        sw->malformed++;
        return RULE_DROP;
    }
    for (uint32_t i = 0; i < sw->nr_rules; i++)
        if (matches(&sw->rules[i], &k, from, to)) {
            sw->rules[i].hits++;
            return sw->rules[i].action;
        }
    sw->default_hits++;
    return sw->accept_by_default ? RULE_ACCEPT : RULE_DROP;
}

static int spoofed(const struct vif *v, const uint8_t *h, uint32_t copied)
{
    uint16_t type = be16(h + 12);

    if (memcmp(h + 6, v->mac, 6))
        return 1;
    if (!v->ip)
        return 0;
    if (type == 0x0800)
        return copied < 34 || be32(h + 26) != v->ip;
    if (type == 0x0806)
        return copied < 42 || memcmp(h + 22, v->mac, 6) || be32(h + 28) != v->ip;
    return 0;
}

/* ---- delivery */

static int deliver(struct nswitch *sw, struct vif *to, const uint8_t *header, uint32_t copied, const uint8_t *rest, uint32_t size)
{
    struct rx_request buffer;
    struct rx_response *answer = (struct rx_response *)to->answers + to->answered;
    uint64_t at;

    if (!to->posted || to->answered >= SWITCH_RING) {
        sw->no_buffer++;
        return 0;
    }
    buffer = ((struct rx_request *)to->buffers)[to->first];
    to->first = (to->first + 1) % SWITCH_RING;
    to->posted--;
    to->answered++;
    at = buffer.gref < VIF_GREFS ? to->writable[buffer.gref] : 0;
    if (at <= 1) {
        *answer = (struct rx_response){.id = buffer.id, .status = ERROR};
        return 0;
    }
    memcpy((void *)(uintptr_t)at, header, copied);
    if (size > copied)
        memcpy((char *)(uintptr_t)at + copied, rest, size - copied);
    *answer = (struct rx_response){.id = buffer.id, .status = (int16_t)size};
    if (to->stats) {
        to->stats[RX_BYTES] += size;
        to->stats[RX_PACKETS]++;
    }
    return 1;
}

static int16_t forward(struct nswitch *sw, uint32_t from, const struct tx_request *r)
{
    struct vif *v = &sw->vifs[from];
    uint8_t header[HEADER];
    const uint8_t *frame;
    uint32_t copied = r->size < HEADER ? r->size : HEADER;
    int found = 0;

    if (r->gref >= VIF_GREFS || v->readable[r->gref] <= 1 || r->size < MIN_FRAME || r->size > MAX_FRAME ||
        r->offset > PAGE - r->size || (r->flags & ~3u))
        return ERROR;
    frame = (const uint8_t *)(uintptr_t)v->readable[r->gref] + r->offset;
    memcpy(header, frame, copied);
    if (spoofed(v, header, copied)) {
        sw->spoofed++;
        return DROPPED;
    }
    for (uint32_t to = 0; to < SWITCH_VIFS; to++) {
        struct vif *d = &sw->vifs[to];
        int mine = !(header[0] & 1) && !memcmp(header, d->mac, 6);

        if (!d->connected || d->broken || to == from || !(mine || header[0] & 1))
            continue;
        found = 1;
        if (firewall_judge(sw, header, copied, r->size, (int32_t)from, (int32_t)to) == RULE_ACCEPT)
            deliver(sw, d, header, copied, frame + copied, r->size);
        else if (mine)
            return DROPPED;
        if (mine)
            break;
    }
    if (!found) {
        sw->unknown_destination++;
        return DROPPED;
    }
    if (v->stats) {
        v->stats[TX_BYTES] += r->size;
        v->stats[TX_PACKETS]++;
    }
    return OKAY;
}

/* Forward the frames that were taken of slot `from`, and answer them; the receivers' answers wait for vif_publish. */
int32_t switch_run(struct nswitch *sw, uint32_t from)
{
    struct vif *v = &sw->vifs[from];
    struct tx_response answer[SWITCH_RING];
    uint32_t drops = 0;
    int32_t r;

    for (uint32_t i = 0; i < v->taken; i++) {
        const struct tx_request *q = (struct tx_request *)v->batch + i;

        answer[i] = (struct tx_response){q->id, forward(sw, from, q)};
        drops += answer[i].status != OKAY;
    }
    r = ring_back_publish(tx_of(v), answer, v->taken);
    if (v->stats) {
        v->stats[BATCHES]++;
        v->stats[DROPS] += drops;
    }
    v->taken = 0;
    if (r == 1)
        v->notify = 1;
    return r < 0 ? r : 0;
}

/* Publish what this vif received; 1: notify it (for this or for its own frames' answers), -EPROTO. */
int32_t vif_publish(struct vif *v)
{
    int32_t r = 0, notify;

    if (v->answered) {
        r = ring_back_publish(rx_of(v), v->answers, v->answered);
        v->answered = 0;
    }
    if (r < 0)
        return r;
    notify = r == 1 || v->notify;
    v->notify = 0;
    if (v->stats)
        v->stats[NOTIFIES] += (uint64_t)notify;
    return notify;
}

/* Buffers alone are no work: they are taken with the next frame, and their poster is never asked to signal. */
int32_t vif_recheck(struct vif *v)
{
    return ring_back_recheck(tx_of(v));
}
