/* What shared.c keeps: the control page that both ends have mapped, and the state of one end, which is its own. */
#ifndef RINGLIB_SHARED_H
#define RINGLIB_SHARED_H

#include "ringlib.h"

enum { FRONT = 0, BACK = 1 };
enum { CONTROL_BYTES = 4096 };

/* A side's line of the control page. Python writes pid and born (when that process started), by pwrite. */
struct end {
    _Atomic uint32_t bell;   /* counted up by the other side; what this side sleeps on */
    _Atomic uint32_t closed;
    _Atomic uint32_t cpu;    /* where this side last waited, plus 1 */
    uint32_t pid;
    uint64_t born;
    _Atomic uint32_t door;   /* not 0: this side waits at that socket (knock) and not on its bell */
    _Atomic uint32_t kept;   /* of the back: requests up to this index are kept, while answers are written over them */
    uint8_t pad[32];
};
struct control {
    uint32_t magic, request_size, response_size, ring_pages, payload_pages, pad[11];
    struct end end[2];
};
_Static_assert(sizeof(struct end) == 64 && offsetof(struct end, pid) == 12 && offsetof(struct end, born) == 16, "control.py");
_Static_assert(offsetof(struct end, door) == 24 && offsetof(struct control, end) == 64, "control.py");

/* Of one end since it was opened, in the order of shared.py's Statistics. */
struct counts {
    uint64_t records_sent, batches_sent, records_taken, batches_taken, notifications, sleeps, spins, spins_won, high_water;
};
_Static_assert(sizeof(struct counts) == SHARED_COUNTS * sizeof(uint64_t), "Statistics");

struct shared {
    struct control *control; /* NULL: closed by us */
    void *kept;              /* requests, while answers are written over them; NULL: one way, nothing is */
    uint64_t bytes;
    uint32_t side, in_size, out_size, nr_ents, cpu, gone;
    int32_t knocker;         /* the socket to knock with; -1 before it is needed */
    struct spin spin;
    struct counts counts;
    union {
        struct ring_front front;
        struct ring_back back;
    };
};
_Static_assert(sizeof(struct shared) <= SHARED_STATE, "the room that Python makes");

#endif
