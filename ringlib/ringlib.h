/* What Python sees of the C: the two ends of a ring, byte rings, SharedRing. build_ring.py hands this to cffi. */
#ifndef RINGLIB_RINGLIB_H
#define RINGLIB_RINGLIB_H

#include "ring.h"
#include "spin.h"

/* cdef begin */
int32_t front_init(void *front, void *page, uint64_t bytes, uint32_t req_size, uint32_t rsp_size, uint32_t start);
int32_t back_attach(void *back, void *page, uint64_t bytes, uint32_t req_size, uint32_t rsp_size);
uint32_t front_free(void *front);
uint32_t front_entries(void *front);
uint32_t front_outstanding(void *front);
int32_t front_publish(void *front, const void *requests, uint32_t n);
int32_t front_take(void *front, void *out, uint32_t max);
int32_t front_recheck(void *front);
uint32_t back_entries(void *back);
uint32_t back_unanswered(void *back);
int32_t back_take(void *back, void *out, uint32_t max);
int32_t back_publish(void *back, const void *responses, uint32_t n);
int32_t back_recheck(void *back);

uint32_t bytes_used(void *cons, void *prod);
int32_t bytes_write(void *buffer, void *cons, void *prod, uint32_t size, const void *data, uint32_t n);
int32_t bytes_read(void *buffer, void *cons, void *prod, uint32_t size, void *out, uint32_t n);

#define SHARED_STATE 192
#define SHARED_COUNTS 9
int32_t shared_open(void *state, void *base, uint64_t bytes, uint64_t ring, uint32_t side, uint32_t request_size,
                    uint32_t response_size);
void shared_close(void *state, int32_t tell);
int32_t shared_publish(void *state, const void *records, uint64_t bytes, int64_t spin_ns);
int32_t shared_take(void *state, void *out, uint32_t max, int64_t spin_ns);
int32_t shared_sleep(void *state, uint32_t want, int64_t ns);
int32_t shared_ask(void *state, uint32_t want, uint32_t door, int64_t spin_ns);
int32_t shared_pending(void *state);
void shared_statistics(void *state, uint64_t *out);
/* cdef end */

#endif
