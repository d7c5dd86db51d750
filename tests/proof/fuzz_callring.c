/* The hypercall ring against hostile guests, and the events that it sends: every entry is answered once, in order, by what its
 * private copy asked for; bits are set in the receiver's shared_info and nowhere else; who is to be signalled is one that has
 * something to look at. Then the guest's own end: what it drains is what was pending and not masked. */
#include "fuzz.h"

#include "guest.h"
#include "hv.h"

enum { DOMAINS = 3, CALLER = 1, PAGE = 4096, SEND = 4, EVENT_OP = 32 };
enum { CLOSED = 0, UNBOUND = 1, INTERDOMAIN = 2, VIRQ = 4, IPI = 5 };
enum { PENDING = 2048, MASK = 2560 }; /* in shared_info */

static _Alignas(4096) uint8_t ring[PAGE];
static _Alignas(64) struct { uint8_t page[DOMAINS][PAGE]; } shared; /* each domain's shared_info */
static struct evt_end ends_of[DOMAINS];
static struct evt_end *ends[DOMAINS + 1];
static struct callring c;

/* Ports 1 to 7 of the caller, by kind; every other port is closed. */
static const struct evt_port ports[8] = {
    [1] = {INTERDOMAIN, 2, 3, 0, 0}, [2] = {INTERDOMAIN, 2, 1024, 0, 0}, [3] = {UNBOUND, 2, 0, 0, 0},
    [4] = {VIRQ, 0, 0, 1, 0},        [5] = {IPI, 0, 0, 0, 0},            [6] = {INTERDOMAIN, 0, 70, 0, 0},
    [7] = {INTERDOMAIN, 3, 9, 0, 0}, /* who is gone */
};

static int bit(uint32_t domid, uint32_t base, uint32_t port) { return shared.page[domid][base + port / 8] >> port % 8 & 1; }

/* ---- the model of one send */

struct outcome {
    int64_t result;
    int domid; /* whose port is pending now, or -1 */
    uint32_t port;
};

static struct outcome model_send(uint64_t port)
{
    const struct evt_port *p = port < 8 ? &ports[port] : &ports[0];

    if (port == 0 || p->state == CLOSED || p->state == VIRQ)
        return (struct outcome){-EINVAL, -1, 0};
    if (p->state == IPI)
        return (struct outcome){0, CALLER, (uint32_t)port};
    if (p->state == UNBOUND || p->remote_domid >= DOMAINS)
        return (struct outcome){0, -1, 0};
    return (struct outcome){0, p->remote_domid, p->remote_port};
}

static int is_send(const uint64_t *e)
{
    return e[0] == EVENT_OP && e[2] == SEND && e[3] <= UINT32_MAX && !e[4] && !e[5] && !e[6] && !e[7];
}

/* What the C has answered since `from` of the batch, against what its copies asked for. */
static void check_answers(uint32_t from)
{
    for (uint32_t i = from; i < c.answered; i++) {
        struct outcome o = model_send(c.entries[i][3]);

        must(is_send(c.entries[i]) && c.answers[i][0] == EVENT_OP && (int64_t)c.answers[i][1] == o.result);
        must(o.domid < 0 || bit((uint32_t)o.domid, PENDING, o.port));
    }
}

/* ---- the play */

static void call(struct input *in, struct peer *guest)
{
    uint64_t e[8] = {EVENT_OP, 0, SEND, below(in, 10)};

    if (rarely(in, 6))
        e[0] = number(in, 1);
    while (rarely(in, 4))
        poke(in, e, sizeof e);
    put_request(guest, e, sizeof e);
}

/* One step of the C: a finished batch is published as it was answered, then the next one is begun. */
static int32_t step(struct peer *guest)
{
    struct ring_back *b = (struct ring_back *)c.ring;
    uint32_t base = b->rsp_prod_pvt, finished = c.next == c.taken ? c.answered : 0, from = c.next == c.taken ? 0 : c.answered;
    uint64_t answers[CALLRING_BATCH][2];
    int32_t left;

    memcpy(answers, c.answers, sizeof answers);
    left = callring_run(&c, ends, CALLER, 0, 1);
    must(left >= 0 || left == -EPROTO);
    must(b->rsp_prod_pvt == base + finished && guest->sh->rsp_prod == (finished ? base + finished : guest->sh->rsp_prod));
    for (uint32_t i = 0; i < finished; i++)
        must(!memcmp(slot_at(guest, base + i), answers[i], sizeof *answers));
    must(c.taken <= CALLRING_BATCH && c.next <= c.taken && (c.answered == c.next || !c.answered));
    must(c.nr_signals <= CALLRING_BATCH);
    check_answers(from);
    return left;
}

/* As the hypervisor's Python does it: it signals whom it is told to, and answers itself what is no event send. Returns
 * whether the ring is sound. */
static int drain(struct input *in, struct peer *guest)
{
    for (int turns = 0; turns < 8; turns++) {
        uint32_t old = c.nr_signals;
        int32_t left = step(guest);

        for (uint32_t i = old; i < c.nr_signals; i++)
            must(c.signals[i] < DOMAINS && shared.page[c.signals[i]][0] == 1);
        if (below(in, 2)) /* ... at once, or later: they are bounded all the same */
            c.nr_signals = 0;
        if (left < 0)
            return 0;
        if (left > 0) {
            must((uint32_t)left == c.taken - c.next && !is_send(c.entries[c.next]));
            callring_answer(&c, (int64_t)c.entries[c.next][0]);
        } else if (!c.taken)
            break;
    }
    return 1;
}

/* A guest writes its own bitmaps, or anything at all in its page. */
static void meddle(struct input *in, uint8_t *page)
{
    static const uint32_t places[] = {0, 1, 8, PENDING, PENDING + 8, MASK, MASK + 8};

    if (rarely(in, 4))
        poke(in, page, PAGE);
    else
        page[places[below(in, 7)] + below(in, 2)] = (uint8_t)number(in, 1);
}

static void guest_drains(struct input *in, uint32_t domid)
{
    uint8_t before[PAGE], *page = shared.page[domid];
    uint32_t out[64], max = below(in, 4) ? below(in, 65) : below(in, 4);
    int32_t n;

    memcpy(before, page, PAGE);
    n = upcall_drain(page, out, max);
    must(n >= 0 && n <= (int32_t)max);
    for (int32_t i = 0; i < n; i++) {
        must(out[i] < 4096 && before[PENDING + out[i] / 8] >> out[i] % 8 & 1 && !bit(domid, PENDING, out[i]));
        must(!(before[MASK + out[i] / 8] >> out[i] % 8 & 1));
    }
    for (uint32_t byte = 0; byte < 512; byte++) /* what the selector led to and did not fit leads there again */
        if (page[PENDING + byte] & ~page[MASK + byte] && before[8 + byte / 64] >> byte / 8 % 8 & 1)
            must(page[8 + byte / 64] >> byte / 8 % 8 & 1 && page[0]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct peer guest = peer_of(ring, 64, start_index(&in));
    int alive = 1;

    memset(&shared, 0, sizeof shared);
    for (uint32_t i = 0; i < DOMAINS; i++) {
        ends[i] = &ends_of[i];
        ends_of[i].shared_info = shared.page[i];
        ends_of[i].polling = 0;
    }
    memcpy(ends_of[CALLER].ports, ports, sizeof ports);
    memset(&c, 0, sizeof c);
    must(callring_attach(&c, ring) == 0);
    while (more(&in))
        switch (below(&in, 8)) {
        default:
            call(&in, &guest);
            break;
        case 3:
            if (rarely(&in, 4))
                mischief(&in, &guest);
            break;
        case 4:
            meddle(&in, shared.page[below(&in, DOMAINS)]);
            break;
        case 5:
            guest_drains(&in, below(&in, DOMAINS));
            break;
        case 6:
            if (alive && c.next == c.taken)
                callring_recheck(&c);
            evtchn_unmask(&ends_of[2], below(&in, 128));
            break;
        case 7:
            alive = alive && drain(&in, &guest);
        }
    return 0;
}
