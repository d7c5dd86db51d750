/* The hypervisor's C kernels: what it does per event, per grant and per ring entry. build_hv.py hands the marked lines to
 * cffi. They take copied records and numbers that were bounded already, never a guest's pointer; what they touch of a
 * guest's memory they touch once, in C11 atomics. */
#ifndef RING1_HV_H
#define RING1_HV_H

#include <stdint.h>

#include "spin.h"

/* cdef begin */
#define EVT_PORTS 1025  /* port 0 is never valid */
#define CALLRING_BATCH 32
#define GRANT_TABLE_FRAMES 8
#define NO_DOMAIN 0xFFFF
#define EVT_LATE 0x8000 /* beside a domid: its signal is held back until `late` */
#define EVT_BURST 64    /* signals that one end of a channel may cost the other at once */

struct evt_port {
    uint16_t state, remote_domid; /* hypervisor/public/evtchn.py, State */
    uint32_t remote_port, virq;
    int64_t due; /* when its next signal is paid for, CLOCK_MONOTONIC */
};
struct evt_end { /* a domain as its event channels see it */
    struct evt_port ports[EVT_PORTS];
    void *shared_info;
    uint64_t sent, delivered, elided;
    uint32_t polling; /* it waits for ports, masked ones too: look at every event of it */
    int64_t pace_ns;  /* between signals that it sends by one port; 0: as many as it likes */
    int64_t late;     /* a signal to it is held back until then; 0: none is */
};
int32_t evtchn_notify(struct evt_end *to, uint32_t port);
int32_t evtchn_send(struct evt_end **ends, uint16_t domid, uint32_t port, uint16_t *signal);
int64_t evtchn_pace(struct evt_port *port, int64_t pace_ns, int64_t now);
int32_t evtchn_release(struct evt_end *end);
int32_t evtchn_unmask(struct evt_end *end, uint32_t port);
void evtchn_clear(struct evt_end *end, uint32_t port);
int32_t evtchn_is_pending(struct evt_end *end, uint32_t port);
int32_t upcall_is_pending(struct evt_end *end);
void upcall_unblock(struct evt_end *end);

/* ---- frames and page tables; rules in frames.py and public/mmu.py */
#define NO_MFN 0xFFFFFFFF
#define NO_OWNER 0xFFFF
#define TABLE_ENTRIES 512
#define FRAME_NONE 0
#define FRAME_L1 1
#define FRAME_L2 2
#define FRAME_L3 3
#define FRAME_SEG_DESC 5
#define FRAME_WRITABLE 7

struct frame {
    uint32_t total, count;  /* references; those of its type among them */
    uint32_t parent;        /* of a table: the table whose entry `slot` names it, or NO_MFN */
    uint16_t slot, owner;
    uint16_t done;          /* of a table: how many of its entries hold references, from the first on */
    uint8_t type, pinned;
    uint16_t window;        /* of a root: the window that shows it, plus one; from NR_WINDOWS on they are applications' */
    uint16_t spare;
};
struct mmu {
    struct frame *frames;
    uint64_t (*mapped)[8];  /* of an L1: which entries a host mapping may stand for */
    char *machine;
    uint64_t *m2p;
    uint32_t nr_frames;
};
void frame_disown(struct mmu *m, uint32_t first, uint32_t n);
void frame_own(struct mmu *m, const uint32_t *mfns, uint32_t n, uint16_t domid);
uint32_t frame_list(struct mmu *m, uint16_t domid, uint32_t first, uint32_t end, uint32_t *mfns, uint32_t room);
void frame_reset(struct mmu *m, const uint32_t *mfns, uint32_t n);
#define FRAME_TYPES 8
#define FRAME_MAPPED 6 /* in the place of a type that there is not */
void frame_census(struct mmu *m, uint32_t (*counts)[FRAME_TYPES], uint32_t domids);
int32_t frame_get(struct mmu *m, uint32_t mfn, uint32_t writable);
int32_t frame_put(struct mmu *m, uint32_t mfn, uint32_t writable);

/* Validation, or its undoing, on its way through at most three levels: bounded steps, all state here. */
struct table_walk {
    uint32_t stack[3], depth;
    int32_t error;
    uint32_t down;
};
int32_t table_get(struct mmu *m, struct table_walk *w, uint32_t mfn, uint32_t type, uint16_t domid, uint32_t parent,
                  uint32_t slot);
void table_put(struct mmu *m, struct table_walk *w, uint32_t mfn, uint32_t hooked);
int32_t table_step(struct mmu *m, struct table_walk *w, uint32_t tables);

struct host_change { /* `pages` from `at` on (an offset from the first window): show frames from `mfn` on, or NO_MFN: nothing */
    uint64_t at;
    uint32_t pages, mfn, writable, executable;
};
#define NR_WINDOWS 16
uint32_t host_run(const struct host_change *changes, uint32_t n);
void host_commands(const struct host_change *changes, uint32_t n, uint64_t base, int32_t rw, int32_t ro, void *out);
#define JOB_REQUESTS 512
#define FILL_CHANGES 64 /* host mappings made for one fault */
#define JOB_FLUSH 1 /* let the host mappings follow, commit, and come back */
#define JOB_UPPER 2 /* request `next` changes a table above L1: that is not done here */
struct mmu_job {
    uint64_t requests[JOB_REQUESTS][2];
    uint32_t count, next;
    uint32_t unsettled; /* host mappings may exist that no bit speaks of: they are being taken away */
    uint32_t nr_changes, nr_drops;
    uint32_t room; /* changes before a JOB_FLUSH, at most JOB_REQUESTS */
    struct host_change changes[JOB_REQUESTS];
    uint64_t drops[JOB_REQUESTS]; /* L1 entries whose references fall once the host mappings have followed */
    uint16_t domid;
};
int32_t mmu_update(struct mmu *m, struct mmu_job *job);
void mmu_commit(struct mmu *m, struct mmu_job *job);
int32_t mmu_upper_entry(struct mmu *m, uint32_t table, uint32_t slot, uint64_t value);
uint32_t mmu_walk(struct mmu *m, uint32_t root, uint64_t va, uint32_t write);
uint32_t mmu_allows(struct mmu *m, uint32_t root, uint64_t va, uint32_t access);
uint32_t mmu_l1(struct mmu *m, uint32_t root, uint64_t va);
uint32_t mmu_fill(struct mmu *m, uint32_t root, uint64_t va, uint32_t access, struct host_change *out);
uint32_t mmu_show(struct mmu *m, uint32_t table, uint32_t *slot, struct host_change *out, uint32_t room);
void mmu_unmark_one(struct mmu *m, uint32_t l1, uint32_t slot);
void mmu_unmark(struct mmu *m, uint32_t table);
uint32_t mmu_is_mapped(struct mmu *m, uint32_t l1, uint32_t slot);
int64_t mmu_offset(struct mmu *m, uint32_t table);
uint32_t mmu_next(struct mmu *m, uint32_t table, uint32_t slot);
uint64_t mmu_entry(struct mmu *m, uint32_t table, uint32_t slot);
void mmu_store(struct mmu *m, uint32_t table, uint32_t slot, uint64_t value);
int32_t guest_read(struct mmu *m, uint32_t root, uint64_t va, uint32_t size, void *out);
int32_t guest_write(struct mmu *m, uint32_t root, uint64_t va, uint32_t size, const void *data);
int32_t descriptor_is_safe(uint64_t descriptor);

struct gnt_domain { /* a domain as grants see it */
    char *table[GRANT_TABLE_FRAMES];
    uint32_t alive;
    uint16_t domid;
};
int32_t grant_claim(struct gnt_domain *granter, uint32_t ref, uint16_t domid, int32_t writable, uint32_t *frame);
void grant_release(struct gnt_domain *granter, uint32_t ref, int32_t clear_writing, int32_t clear_reading);
int32_t grant_accept(struct gnt_domain *taker, uint32_t ref, uint16_t domid);
void grant_accepted(struct gnt_domain *taker, uint32_t ref, uint16_t domid, uint32_t mfn);
uint32_t grant_copy(struct gnt_domain **domains, uint16_t caller, struct mmu *m, char *ops, uint32_t count);

struct callring {
    uint64_t ring[8]; /* struct ring_back */
    uint32_t taken, next, answered, nr_signals;
    uint16_t signals[CALLRING_BATCH];
    uint64_t entries[CALLRING_BATCH][8]; /* the private copies: op, result, six words */
    uint64_t answers[CALLRING_BATCH][2]; /* op, result */
    struct spin spin;
};
int32_t callring_attach(struct callring *c, void *page);
int32_t callring_run(struct callring *c, struct evt_end **ends, uint16_t domid, int64_t spin_ns, uint32_t max);
void callring_answer(struct callring *c, int64_t result);
int32_t callring_recheck(struct callring *c);
int32_t callring_worth(struct callring *c, struct spin *spin);
int32_t callring_spin(struct callring **rings, uint32_t count, struct spin *spin);

struct clock_pair {
    uint64_t tsc, ns;
};
void clock_sample(struct clock_pair *out);
struct clock_line { /* ns + (((the counter - tsc) << shift) * mul >> 32) */
    uint64_t tsc, ns;
    uint32_t mul;
    int8_t shift;
    uint8_t stable;
};
uint64_t clock_at(const struct clock_line *line, uint64_t tsc);
void clock_tell(void *shared_info, struct clock_line *line, uint32_t mul, int8_t shift);
void clock_tell_wall(void *shared_info, uint64_t sec, uint32_t nsec);
void scrub(void *at, uint64_t bytes);
void copy_page(void *to, const void *from);
int32_t current_cpu(void);
int32_t short_slices(int64_t ns);
void cell_dead(void *cell);
/* cdef end */

#endif
