/* Either end of a ring against a hostile peer: every call must answer, copy and publish as the model below says. */
#include "fuzz.h"

#include "ringlib.h"

static const uint8_t sizes[][2] = {{112, 16}, {12, 4}, {8, 8}, {4, 16}, {64, 16}, {16, 0}};

struct model {
    int is_front;
    union {
        struct ring_front front;
        struct ring_back back;
    };
    uint32_t entries, slot, in_size, out_size;
    uint32_t cons, prod, seen, broken; /* ours: taken, published, what was seen of the peer's index */
    _Atomic uint32_t *theirs, *their_event, *mine, *my_event;
    uint8_t *page;
};

static uint32_t outstanding(const struct model *m) { return m->is_front ? m->prod - m->cons : m->cons - m->prod; }
static uint32_t may_come(const struct model *m) { return m->is_front ? outstanding(m) : m->entries - outstanding(m); }
static uint32_t may_go(const struct model *m) { return m->is_front ? m->entries - outstanding(m) : outstanding(m); }

static uint8_t *slot(const struct model *m, uint32_t index) { return m->page + 64 + index % m->entries * m->slot; }

static void take(struct model *m, uint32_t max)
{
    uint8_t *out = malloc((size_t)max * m->in_size);
    int32_t r = m->is_front ? front_take(&m->front, out, max) : back_take(&m->back, out, max);
    uint32_t n;

    if (m->seen - m->cons < max)
        m->seen = *m->theirs;
    n = m->seen - m->cons;
    if (m->broken || n > may_come(m)) {
        m->broken = 1;
        must(r == -EPROTO);
    } else {
        n = n < max ? n : max;
        must(r == (int32_t)n);
        for (uint32_t i = 0; i < n; i++)
            must(!memcmp(out + i * m->in_size, slot(m, m->cons + i), m->in_size));
        m->cons += n;
        must(outstanding(m) <= m->entries);
    }
    free(out);
}

static void publish(struct model *m, uint32_t n, uint8_t byte)
{
    uint8_t *records = malloc((size_t)n * m->out_size);
    uint32_t was = *m->mine, event = *m->their_event;
    int32_t r;

    memset(records, byte, (size_t)n * m->out_size);
    r = m->is_front ? front_publish(&m->front, records, n) : back_publish(&m->back, records, n);
    if (m->broken || n > may_go(m)) {
        must(r == (m->broken ? -EPROTO : -EAGAIN));
        must(*m->mine == was);
    } else {
        for (uint32_t i = 0; i < n; i++)
            must(!memcmp(slot(m, m->prod + i), records + i * m->out_size, m->out_size));
        must(r == ((uint32_t)(m->prod + n - event) < n));
        m->prod += n;
        must(*m->mine == m->prod);
    }
    free(records);
}

static void recheck(struct model *m)
{
    int32_t r = m->is_front ? front_recheck(&m->front) : back_recheck(&m->back);

    must(r == (m->broken || *m->theirs != m->cons));
    must(r || *m->my_event == m->cons + 1);
}

/* The peer's honest move: fill some slots that it may fill, then say so. */
static void peer_publishes(struct input *in, struct model *m)
{
    uint32_t prod = *m->theirs, allowed = may_come(m) - (prod - m->cons), n = below(in, m->entries + 1);

    if (prod - m->cons > may_come(m))
        return;
    for (n = n < allowed ? n : allowed; n; n--)
        memset(slot(m, prod++), (int)number(in, 1), m->in_size);
    *m->theirs = prod;
}

static void start(struct model *m, uint32_t bytes, uint32_t index)
{
    uint32_t request = m->is_front ? m->out_size : m->in_size, response = m->is_front ? m->in_size : m->out_size;
    struct ring_shared *sh = (struct ring_shared *)m->page;

    must(front_init(&m->front, m->page, bytes, request, response, index) == 0);
    must(front_entries(&m->front) == m->entries && front_free(&m->front) == m->entries);
    if (!m->is_front)
        must(back_attach(&m->back, m->page, bytes, request, response) == 0);
    m->theirs = m->is_front ? &sh->rsp_prod : &sh->req_prod;
    m->mine = m->is_front ? &sh->req_prod : &sh->rsp_prod;
    m->my_event = m->is_front ? &sh->rsp_event : &sh->req_event; /* where this end asks to be told */
    m->their_event = m->is_front ? &sh->req_event : &sh->rsp_event;
    m->cons = m->prod = m->seen = index;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct model m = {.is_front = (int)below(&in, 2)};
    const uint8_t *s = sizes[below(&in, sizeof sizes / sizeof *sizes)];
    uint32_t bytes;

    m.in_size = s[m.is_front];
    m.out_size = s[!m.is_front];
    m.slot = s[0] > s[1] ? s[0] : s[1];
    m.entries = 1u << below(&in, 4);
    bytes = 64 + m.entries * m.slot + below(&in, (uint8_t)m.slot);
    m.page = aligned_alloc(64, (bytes + 63) / 64 * 64);
    memset(m.page, 0, bytes);
    start(&m, bytes, start_index(&in));
    while (more(&in))
        switch (below(&in, 12)) {
        case 0:
        case 1:
        case 2:
            peer_publishes(&in, &m);
            break;
        case 3:
            if (rarely(&in, 4))
                *m.theirs = moved(&in, m.cons);
            break;
        case 4:
            poke(&in, m.page + 64, bytes - 64);
            break;
        case 5:
            *m.their_event = moved(&in, m.prod);
            break;
        case 6:
        case 7:
        case 8:
            take(&m, below(&in, m.entries + 2));
            break;
        case 9:
        case 10:
            publish(&m, below(&in, m.entries + 2), (uint8_t)number(&in, 1));
            break;
        case 11:
            recheck(&m);
        }
    free(m.page);
    return 0;
}
