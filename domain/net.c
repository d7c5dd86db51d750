/* Frames between a guest's buffers and pages granted to the network backend. The backend is not trusted: every id is
 * checked against what is in flight, every length against the page; a lie breaks the device (-EPROTO) and nothing else. */
#include "net.h"

#include <errno.h>
#include <string.h>

#include "ring.h"

#define PAGE 4096u
#define UDP_HEAD 42u /* Ethernet, IPv4, UDP */

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
_Static_assert(sizeof(struct tx_request) == 12 && sizeof(struct rx_request) == 8, "netif");
_Static_assert(sizeof(struct ring_front) <= 64, "the room that netfront has for it");

static struct ring_front *tx_of(struct netfront *n) { return (struct ring_front *)n->tx; }
static struct ring_front *rx_of(struct netfront *n) { return (struct ring_front *)n->rx; }

int32_t net_open(struct netfront *n, void *tx_page, void *rx_page, uint64_t bytes)
{
    int r = ring_front_init(tx_of(n), tx_page, bytes, sizeof(struct tx_request), sizeof(struct tx_response));

    if (r || (r = ring_front_init(rx_of(n), rx_page, bytes, sizeof(struct rx_request), sizeof(struct rx_response))))
        return r;
    for (uint32_t i = 0; i < NET_RING; i++)
        n->tx_free[i] = (uint16_t)i;
    n->nr_tx_free = NET_RING;
    return 0;
}

/* Post every buffer that is not out. 1: notify, 0, -EPROTO. */
int32_t net_post(struct netfront *n)
{
    struct rx_request fresh[NET_RING];
    uint32_t count = 0, room = ring_front_free(rx_of(n));
    int32_t r;

    for (uint32_t i = 0; i < NET_RING && count < room; i++)
        if (!n->rx_posted[i])
            fresh[count++] = (struct rx_request){.id = (uint16_t)i, .gref = n->rx_refs[i]};
    r = ring_front_publish(rx_of(n), fresh, count);
    for (uint32_t i = 0; r >= 0 && i < count; i++)
        n->rx_posted[fresh[i].id] = 1;
    return r;
}

/* Take back pages whose frames were answered; how many, or -EPROTO. */
int32_t net_reap(struct netfront *n)
{
    struct tx_response done[NET_RING];
    int32_t count = n->broken ? -EPROTO : ring_front_take(tx_of(n), done, NET_RING);

    if (count < 0)
        n->broken = 1;
    for (int32_t i = 0; i < count; i++) {
        if (done[i].id >= NET_RING || !n->tx_busy[done[i].id]) {
            n->broken = 1;
            return -EPROTO;
        }
        n->tx_busy[done[i].id] = 0;
        n->tx_free[n->nr_tx_free++] = done[i].id;
        n->tx_dropped += done[i].status != 0;
    }
    return count;
}

static uint16_t fold(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

static uint64_t sum16(const uint8_t *p, uint32_t n)
{
    uint64_t sum = 0;

    for (; n > 1; p += 2, n -= 2)
        sum += (uint64_t)p[0] << 8 | p[1];
    return n ? sum + ((uint64_t)p[0] << 8) : sum;
}

static void put16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

/* Lengths and checksums of an Ethernet + IPv4 + UDP frame whose addresses and ports are in place. */
static void finish_udp(uint8_t *f, uint32_t size)
{
    uint32_t udp = size - 34;

    put16(f + 16, (uint16_t)(size - 14));
    put16(f + 24, 0);
    put16(f + 24, (uint16_t)~fold(sum16(f + 14, 20)));
    put16(f + 38, (uint16_t)udp);
    put16(f + 40, 0);
    {
        uint16_t sum = (uint16_t)~fold(sum16(f + 26, 8) + 17 + udp + sum16(f + 34, udp));

        put16(f + 40, sum ? sum : 0xffff);
    }
}

/* Send `count` frames: with head_size 0 each is lengths[i] bytes of data; with UDP_HEAD each is that header, whose lengths and
 * checksums are filled in, and then lengths[i] bytes of data. What fits is sent: *sent says how many. 1: notify, 0, -EPROTO;
 * -EINVAL: another head, or a frame that is too long or too short, and nothing was sent. */
int32_t net_send(struct netfront *n, const void *head, uint32_t head_size, const void *data, const uint32_t *lengths,
                 uint32_t count, uint32_t *sent)
{
    struct tx_request out[NET_RING];
    const uint8_t *from = data;
    uint32_t room, k;

    *sent = 0;
    if (net_reap(n) < 0)
        return -EPROTO;
    room = ring_front_free(tx_of(n));
    room = room < n->nr_tx_free ? room : n->nr_tx_free;
    if (count > room)
        count = room;
    if (head_size && head_size != UDP_HEAD)
        return -EINVAL;
    for (k = 0; k < count; k++)
        if (lengths[k] > NET_FRAME - head_size || head_size + lengths[k] < 14)
            return -EINVAL;
    for (k = 0; k < count; k++) {
        uint16_t id = n->tx_free[--n->nr_tx_free];
        uint8_t *page = (uint8_t *)(uintptr_t)(n->tx_pool + (uint64_t)id * PAGE);
        uint32_t size = head_size + lengths[k];

        memcpy(page, head, head_size);
        memcpy(page + head_size, from, lengths[k]);
        if (head_size)
            finish_udp(page, size);
        from += lengths[k];
        n->tx_busy[id] = 1;
        n->tx_bytes += size;
        out[k] = (struct tx_request){n->tx_refs[id], 0, 0, id, (uint16_t)size};
    }
    n->tx_frames += count;
    *sent = count;
    return count ? ring_front_publish(tx_of(n), out, count) : 0;
}

/* Copy at most `max` frames out, one after the other, and post their buffers again. 1: notify, 0, -EPROTO. */
int32_t net_recv(struct netfront *n, void *out, uint32_t *lengths, uint32_t max, uint32_t *received)
{
    struct rx_response got[NET_RING];
    uint8_t *to = out;
    int32_t count;

    *received = 0;
    count = n->broken ? -EPROTO : ring_front_take(rx_of(n), got, max < NET_RING ? max : NET_RING);
    if (count < 0) {
        n->broken = 1;
        return -EPROTO;
    }
    for (int32_t i = 0; i < count; i++) {
        const struct rx_response *r = &got[i];

        if (r->id >= NET_RING || !n->rx_posted[r->id] || (r->status > 0 && (uint32_t)r->offset + (uint32_t)r->status > PAGE)) {
            n->broken = 1;
            *received = 0; /* a broken device gave nothing */
            return -EPROTO;
        }
        n->rx_posted[r->id] = 0;
        if (r->status <= 0 || r->status > NET_FRAME) {
            n->rx_errors++;
            continue;
        }
        memcpy(to, (const char *)(uintptr_t)(n->rx_pool + (uint64_t)r->id * PAGE) + r->offset, (size_t)r->status);
        to += r->status;
        lengths[(*received)++] = (uint32_t)r->status;
        n->rx_bytes += (uint64_t)r->status;
    }
    n->rx_frames += *received;
    return count ? net_post(n) : 0;
}

/* Before sleeping for frames, or for room to send: ask to be told, look again. 1: do not sleep. */
int32_t net_recheck_rx(struct netfront *n) { return ring_front_recheck(rx_of(n)); }
int32_t net_recheck_tx(struct netfront *n) { return ring_front_recheck(tx_of(n)); }

/* Size of the UDP payload of a whole, unfragmented frame with right checksums, and where it begins; -EINVAL otherwise. */
int32_t udp_payload(const void *frame, uint32_t size, uint32_t *offset)
{
    const uint8_t *f = frame;
    uint32_t ihl, total, udp;

    if (size < 42 || f[12] != 8 || f[13] != 0 || f[14] >> 4 != 4 || f[23] != 17)
        return -EINVAL;
    ihl = (uint32_t)(f[14] & 15) * 4;
    total = (uint32_t)f[16] << 8 | f[17];
    if (ihl < 20 || 14 + total > size || total < ihl + 8 || ((f[20] & 0x3f) | f[21]) || fold(sum16(f + 14, ihl)) != 0xffff)
        return -EINVAL;
    udp = (uint32_t)f[14 + ihl + 4] << 8 | f[14 + ihl + 5];
    if (udp < 8 || ihl + udp > total)
        return -EINVAL;
    if ((f[14 + ihl + 6] | f[14 + ihl + 7]) && fold(sum16(f + 26, 8) + 17 + udp + sum16(f + 14 + ihl, udp)) != 0xffff)
        return -EINVAL;
    *offset = 14 + ihl + 8;
    return (int32_t)(udp - 8);
}
