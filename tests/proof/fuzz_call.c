/* The hypercall ring, event sends and grant copies, by a guest that writes whatever it likes into its ring, its shared_info
 * and its grant table. What must hold: no access outside the frames (the sanitizer's), every answer in its place, only ports
 * that may send have an effect, and a copy moves what a model of it moves or nothing. */
#include <errno.h>

#include "fuzz.h"
#include "hv.h"

enum { PAGE = 4096, FRAMES = 16, DOMAINS = 3, PORTS = 6, DATA = 12 };

struct copy_ptr {
    uint64_t frame;
    uint16_t domid, offset;
    uint32_t pad;
};
struct copy_op {
    struct copy_ptr source, dest;
    uint16_t len, flags;
    int16_t status;
    uint16_t pad;
};

static char machine[DOMAINS * FRAMES * PAGE] __attribute__((aligned(4096)));
static char page[PAGE] __attribute__((aligned(4096)));
static uint32_t p2m[DOMAINS][FRAMES];
static struct evt_end end_of[DOMAINS], *ends[0x7ff0];
static struct gnt_domain gnt_of[DOMAINS], *gnts[0x7ff0];
static struct callring calls;

static char *frame(uint32_t domid, uint32_t pfn) { return machine + (uint64_t)p2m[domid][pfn] * PAGE; }

static void set_up(struct input *in)
{
    memset(machine, 0, sizeof machine);
    memset(page, 0, sizeof page);
    memset(&calls, 0, sizeof calls);
    for (uint32_t d = 0; d < DOMAINS; d++) {
        for (uint32_t pfn = 0; pfn < FRAMES; pfn++)
            p2m[d][pfn] = pfn * DOMAINS + d;
        memset(&end_of[d], 0, sizeof end_of[d]);
        end_of[d].shared_info = frame(d, 0);
        for (uint32_t i = 0; i < 8; i++)
            gnt_of[d].table[i] = frame(d, 4 + i);
        gnt_of[d].p2m = p2m[d];
        gnt_of[d].nr_frames = FRAMES;
        gnt_of[d].alive = 1;
        ends[d] = &end_of[d];
        gnts[d] = &gnt_of[d];
        for (uint32_t port = 1; port <= PORTS; port++) {
            static const uint16_t states[] = {0, 1, 2, 4, 5};

            end_of[d].ports[port].state = states[below(in, 5)];
            end_of[d].ports[port].remote_domid = (uint16_t)((d + 1) % DOMAINS);
            end_of[d].ports[port].remote_port = 1 + below(in, PORTS);
        }
    }
    if (rarely(in, 4))
        p2m[1][DATA + 1] = UINT32_MAX; /* a hole */
    must(callring_attach(&calls, page) == 0);
}

/* The guest writes entries, and says how many. */
static void push(struct input *in, uint32_t *prod)
{
    uint32_t n = below(in, 8);

    for (uint32_t i = 0; i < n; i++) {
        uint64_t *e = (uint64_t *)(void *)(page + 64 + ((*prod + i) & 31) * 64);

        e[0] = rarely(in, 8) ? number(in, 8) : 32;
        e[2] = rarely(in, 8) ? number(in, 1) : 4;
        e[3] = rarely(in, 4) ? number(in, 5) : below(in, PORTS + 2);
        for (int w = 4; w < 8; w++)
            e[w] = rarely(in, 40) ? number(in, 1) : 0;
    }
    *prod = rarely(in, 16) ? moved(in, *prod) : *prod + n;
    memcpy(page, prod, 4);
}

static void serve(struct input *in)
{
    for (int turns = 0; turns < 8; turns++) {
        uint64_t sent = end_of[1].sent;
        int32_t left = callring_run(&calls, ends, 1, 0, 4);

        for (uint32_t i = 0; i < calls.nr_signals; i++)
            must(calls.signals[i] < DOMAINS);
        calls.nr_signals = 0;
        must(end_of[1].sent - sent <= 4 * CALLRING_BATCH);
        if (left < 0)
            return;
        if (left == 0) {
            if (!calls.taken)
                return;
            continue;
        }
        must(calls.next + (uint32_t)left == calls.taken);
        callring_answer(&calls, (int64_t)number(in, 1));
    }
}

static int may_read(uint32_t domid, uint64_t pfn) { return pfn < FRAMES && p2m[domid][pfn] != UINT32_MAX; }

static void copy(struct input *in)
{
    struct copy_op op = {0};
    static char before[sizeof machine];

    op.source = (struct copy_ptr){rarely(in, 8) ? number(in, 8) : below(in, FRAMES), below(in, 4), (uint16_t)number(in, 2), 0};
    op.dest = (struct copy_ptr){rarely(in, 8) ? number(in, 8) : below(in, FRAMES), below(in, 4), (uint16_t)number(in, 2), 0};
    op.source.offset %= below(in, 2) ? PAGE : UINT16_MAX;
    op.dest.offset %= below(in, 2) ? PAGE : UINT16_MAX;
    op.len = (uint16_t)number(in, 2) % (below(in, 2) ? 200 : UINT16_MAX);
    op.flags = (uint16_t)below(in, 5);
    if (below(in, 2))
        op.source.domid = op.dest.domid = 0x7ff0;
    memcpy(before, machine, sizeof machine);
    grant_copy(gnts, 1, machine, (char *)&op, 1);
    if (op.status != 0) {
        must(!memcmp(before, machine, sizeof machine));
        return;
    }
    must(op.source.offset + op.len <= PAGE && op.dest.offset + op.len <= PAGE && op.flags <= 3);
    if (op.flags == 0) {
        must(may_read(1, op.source.frame) && may_read(1, op.dest.frame));
        memmove(before + (uint64_t)p2m[1][op.dest.frame] * PAGE + op.dest.offset,
                before + (uint64_t)p2m[1][op.source.frame] * PAGE + op.source.offset, op.len);
        must(!memcmp(before, machine, sizeof machine));
    }
}

/* An entry of some domain's table: half of the time a good one. */
static void grant(struct input *in)
{
    uint16_t flags = (uint16_t)(below(in, 2) ? 1 : number(in, 1)), domid = (uint16_t)below(in, DOMAINS);
    uint32_t owner = below(in, DOMAINS), pfn = rarely(in, 8) ? (uint32_t)number(in, 4) : below(in, FRAMES);
    uint64_t entry = flags | (uint64_t)domid << 16 | (uint64_t)pfn << 32;

    memcpy(frame(owner, 4) + below(in, FRAMES) * 8, &entry, 8);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    uint32_t prod = 0;

    set_up(&in);
    while (more(&in))
        switch (below(&in, 8)) {
        case 0:
            copy(&in);
            break;
        case 1:
            grant(&in);
            break;
        case 2:
            poke(&in, frame(1, 0), PAGE);
            break;
        case 3:
            serve(&in);
            break;
        default:
            push(&in, &prod);
        }
    serve(&in);
    return 0;
}
