/* The hypervisor's C kernels: what it does per event, per grant and per ring entry. build_hv.py hands the marked lines to
 * cffi. They take copied records and numbers that were bounded already, never a guest's pointer; what they touch of a
 * guest's memory they touch once, in C11 atomics. */
#ifndef RING1_HV_H
#define RING1_HV_H

#include <stdint.h>

/* cdef begin */
#define EVT_PORTS 1025  /* port 0 is never valid */
#define CALLRING_BATCH 32
#define GRANT_TABLE_FRAMES 8
#define NO_DOMAIN 0xFFFF

struct evt_port {
    uint16_t state, remote_domid; /* hypervisor/public/evtchn.py, State */
    uint32_t remote_port, virq;
};
struct evt_end { /* a domain as its event channels see it */
    struct evt_port ports[EVT_PORTS];
    void *shared_info;
    uint64_t sent, delivered, elided;
    uint32_t polling; /* it waits for ports, masked ones too: look at every event of it */
};
int32_t evtchn_notify(struct evt_end *to, uint32_t port);
int32_t evtchn_send(struct evt_end **ends, uint16_t domid, uint32_t port, uint16_t *signal);
int32_t evtchn_unmask(struct evt_end *end, uint32_t port);
void evtchn_clear(struct evt_end *end, uint32_t port);
int32_t evtchn_is_pending(struct evt_end *end, uint32_t port);
int32_t upcall_is_pending(struct evt_end *end);
void upcall_unblock(struct evt_end *end);

struct gnt_domain { /* a domain as grants see it */
    char *table[GRANT_TABLE_FRAMES];
    const uint32_t *p2m;
    uint32_t nr_frames, alive;
};
int32_t grant_claim(struct gnt_domain *granter, uint32_t ref, uint16_t domid, int32_t writable, uint32_t *frame);
void grant_release(struct gnt_domain *granter, uint32_t ref, int32_t clear_writing, int32_t clear_reading);
int32_t grant_accept(struct gnt_domain *taker, uint32_t ref, uint16_t domid, uint32_t *pfn);
void grant_accepted(struct gnt_domain *taker, uint32_t ref, int32_t completed);
uint32_t grant_copy(struct gnt_domain **domains, uint16_t caller, char *machine, char *ops, uint32_t count);

struct callring {
    uint64_t ring[8]; /* struct ring_back */
    uint32_t taken, next, answered, nr_signals;
    uint16_t signals[CALLRING_BATCH];
    uint64_t entries[CALLRING_BATCH][8]; /* the private copies: op, result, six words */
    uint64_t answers[CALLRING_BATCH][2]; /* op, result */
};
int32_t callring_attach(struct callring *c, void *page);
int32_t callring_run(struct callring *c, struct evt_end **ends, uint16_t domid, uint32_t spins, uint32_t max);
void callring_answer(struct callring *c, int64_t result);
int32_t callring_recheck(struct callring *c);
int32_t callring_spin(struct callring **rings, uint32_t count, uint32_t spins);

void scrub(void *at, uint64_t bytes);
int32_t current_cpu(void);
/* cdef end */

#endif
