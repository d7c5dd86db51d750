/* The network frontend against a hostile backend: what it receives lay in the page that was posted, what it sends lies in a
 * page of its own that nobody else has, no page is lost or had twice, and a lie breaks the device for good. */
#include "fuzz.h"

#include <sanitizer/asan_interface.h>

#include "net.h"

enum { PAGE = 4096, HEAD = 42, MOST_AT_ONCE = 8 };

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

static _Alignas(4096) uint8_t tx_ring[PAGE], rx_ring[PAGE];
static _Alignas(4096) uint8_t tx_pool[NET_RING][PAGE], gap[PAGE], rx_pool[NET_RING][PAGE], end[PAGE];
static struct netfront n;
static struct peer tx, rx; /* the backend's ends: `next` is what it answers next */
static uint32_t seen_tx, seen_rx; /* the requests it has seen */
static int broken;

static struct ring_front *front_of(uint64_t *state) { return (struct ring_front *)state; }

static void consistent(void)
{
    uint32_t busy = 0;
    uint8_t times[NET_RING] = {0};

    for (uint32_t i = 0; i < NET_RING; i++)
        busy += n.tx_busy[i];
    must(n.nr_tx_free + busy == NET_RING || broken);
    for (uint32_t i = 0; i < n.nr_tx_free; i++)
        must(n.tx_free[i] < NET_RING && !n.tx_busy[n.tx_free[i]] && !times[n.tx_free[i]]++);
}

/* ---- the frontend's calls */

static void receive(struct input *in)
{
    uint32_t max = below(in, MOST_AT_ONCE + 1), lengths[MOST_AT_ONCE], got = 0, at = 0, cons = front_of(n.rx)->rsp_cons;
    uint8_t *out = malloc((size_t)max * NET_FRAME);
    struct rx_response answers[MOST_AT_ONCE], *a = answers;
    uint8_t posted[NET_RING];
    int32_t r;

    for (uint32_t i = 0; i < max; i++) /* the slots are used again at once */
        memcpy(&answers[i], slot_at(&rx, cons + i), sizeof *answers);
    memcpy(posted, n.rx_posted, sizeof posted);
    r = net_recv(&n, out, lengths, max, &got);
    must(r == 0 || r == 1 || r == -EPROTO);
    must(got <= max && (!broken || (r == -EPROTO && !got)));
    broken |= r < 0;
    for (uint32_t i = 0; r >= 0 && i < got; i++, a++) {
        uint32_t offset = 0;
        int32_t payload;

        while (a < answers + max && (a->status <= 0 || a->status > NET_FRAME)) /* counted as an error, not delivered */
            a++;
        must(a < answers + max && a->id < NET_RING && posted[a->id]-- && a->offset + a->status <= PAGE);
        must((uint32_t)a->status == lengths[i] && !memcmp(out + at, rx_pool[a->id] + a->offset, lengths[i]));
        payload = udp_payload(out + at, lengths[i], &offset);
        must(payload == -EINVAL || (payload >= 0 && offset >= HEAD && offset + (uint32_t)payload <= lengths[i]));
        at += lengths[i];
    }
    free(out);
}

static void transmit(struct input *in)
{
    uint32_t count = below(in, MOST_AT_ONCE + 1), head = rarely(in, 2) ? HEAD : below(in, 2) ? 0 : below(in, 64), sent = 0;
    uint32_t lengths[MOST_AT_ONCE], bytes = 0, prod = front_of(n.tx)->req_prod_pvt, at = 0, offset;
    uint8_t header[64] = {2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, [23] = 17}, *data; /* UDP_HEAD, its lengths to be put right */
    int32_t r;

    for (uint32_t i = 0; i < count; i++)
        bytes += lengths[i] = rarely(in, 8) ? (uint32_t)number(in, 2) % (NET_FRAME + 60) : 14 + below(in, 100);
    if (count && rarely(in, 32))
        lengths[count - 1] = -below(in, 64);
    data = malloc(bytes);
    memset(data, (int)number(in, 1), bytes);
    header[38] = header[16] = 0xff;
    r = net_send(&n, header, head, data, lengths, count, &sent);
    must(r == 0 || r == 1 || r == -EINVAL || r == -EPROTO);
    must(r == -EINVAL || r == -EPROTO || !head || head == HEAD);
    must(sent <= count && (r >= 0 || !sent) && (!broken || r == -EPROTO));
    broken |= r == -EPROTO;
    for (uint32_t i = 0; i < sent; i++) {
        const struct tx_request *q = slot_at(&tx, prod + i);
        const uint8_t *frame = tx_pool[q->id];

        must(n.tx_busy[q->id] && q->gref == n.tx_refs[q->id] && q->offset == 0 && q->size == head + lengths[i]);
        must(!memcmp(frame + head, data + at, lengths[i]));
        must(!head || udp_payload(frame, q->size, &offset) == (int32_t)lengths[i]);
        at += lengths[i];
    }
    free(data);
}

/* ---- the backend's */

static void answer_sent(struct input *in)
{
    for (uint32_t k = 1 + below(in, 8); k && seen_tx != tx.sh->req_prod && tx.next != tx.sh->req_prod; k--) {
        const struct tx_request *q = slot_at(&tx, seen_tx++);
        struct tx_response a = {q->id, (int16_t)-below(in, 2)};

        if (rarely(in, 16))
            a.id = (uint16_t)number(in, 2);
        memcpy(slot_at(&tx, tx.next), &a, sizeof a);
        tx.sh->rsp_prod = ++tx.next;
    }
}

/* The head of a datagram, right but for the lengths that it claims; `change` one byte before the checksum is made. */
static void write_udp(uint8_t *frame, uint32_t ip, uint32_t udp, uint64_t change)
{
    uint32_t sum = 0;

    memset(frame, 0, HEAD);
    memcpy(frame + 12, "\10\0\105", 3);
    frame[17] = (uint8_t)ip;
    frame[23] = 17;
    frame[39] = (uint8_t)udp;
    frame[14 + change % 28] ^= (uint8_t)(change >> 8);
    for (uint32_t i = 14; i < 34; i += 2)
        sum += (uint32_t)frame[i] << 8 | frame[i + 1];
    sum = ~((sum & 0xffff) + (sum >> 16));
    frame[24] = (uint8_t)(sum >> 8);
    frame[25] = (uint8_t)sum;
}

static void deliver(struct input *in)
{
    for (uint32_t k = 1 + below(in, 8); k && seen_rx != rx.sh->req_prod && rx.next != rx.sh->req_prod; k--) {
        const struct rx_request *q = slot_at(&rx, seen_rx++);
        struct rx_response a = {.id = q->id, .offset = (uint16_t)(below(in, 4) * 32), .status = (int16_t)(42 + below(in, 200))};
        uint8_t *frame = q->id < NET_RING ? rx_pool[q->id] + a.offset : NULL;

        if (frame) {
            write_udp(frame, 28 + below(in, 220), below(in, 228), rarely(in, 8) ? number(in, 2) : 0);
            if (rarely(in, 8))
                poke(in, frame, HEAD);
        }
        if (rarely(in, 8))
            a.status = (int16_t)number(in, 2);
        if (rarely(in, 8))
            a.offset = (uint16_t)(PAGE - (uint32_t)a.status + below(in, 2));
        if (rarely(in, 16))
            a.id = (uint16_t)number(in, 1 + below(in, 2));
        memcpy(slot_at(&rx, rx.next), &a, sizeof a);
        rx.sh->rsp_prod = ++rx.next;
    }
}

static void hostility(struct input *in)
{
    struct peer *p = rarely(in, 2) ? &tx : &rx;

    if (rarely(in, 4))
        p->sh->rsp_prod = moved(in, p->next);
    else if (rarely(in, 3))
        p->sh->req_event = moved(in, p->next);
    else
        poke(in, (char *)p->sh + 64, PAGE - 64);
}

static void open_device(struct input *in)
{
    memset(&n, 0, sizeof n);
    n.tx_pool = (uintptr_t)tx_pool;
    n.rx_pool = (uintptr_t)rx_pool;
    for (uint32_t i = 0; i < NET_RING; i++) {
        n.tx_refs[i] = 1000 + i;
        n.rx_refs[i] = 2000 + i;
    }
    must(net_open(&n, tx_ring, rx_ring, PAGE) == 0);
    tx = peer_of(tx_ring, sizeof(struct tx_request), start_index(in));
    rx = peer_of(rx_ring, sizeof(struct rx_request), start_index(in));
    front_of(n.tx)->req_prod_pvt = front_of(n.tx)->rsp_cons = front_of(n.tx)->rsp_seen = seen_tx = tx.next;
    front_of(n.rx)->req_prod_pvt = front_of(n.rx)->rsp_cons = front_of(n.rx)->rsp_seen = seen_rx = rx.next;
    must(net_post(&n) == 1);
    broken = 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};

    ASAN_POISON_MEMORY_REGION(gap, PAGE);
    ASAN_POISON_MEMORY_REGION(end, PAGE);
    open_device(&in);
    while (more(&in))
        switch (below(&in, 12)) {
        case 0:
        case 1:
        case 2:
            deliver(&in);
            break;
        case 3:
        case 4:
            answer_sent(&in);
            break;
        case 5:
            if (rarely(&in, 4))
                hostility(&in);
            break;
        case 6:
            broken |= net_reap(&n) < 0;
            consistent();
            break;
        case 7:
            net_recheck_rx(&n);
            net_recheck_tx(&n);
            break;
        case 8:
        case 9:
            transmit(&in);
            break;
        default:
            receive(&in);
        }
    consistent();
    return 0;
}
