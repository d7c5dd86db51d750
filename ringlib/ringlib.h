/* What Python sees of the C: the rings by value, byte rings, futex waits. build_ring.py hands this to cffi. */
#ifndef RINGLIB_RINGLIB_H
#define RINGLIB_RINGLIB_H

#include "ring.h"

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

int32_t bytes_write(void *buffer, void *cons, void *prod, uint32_t size, const void *data, uint32_t n);
int32_t bytes_read(void *buffer, void *cons, void *prod, uint32_t size, void *out, uint32_t n);

uint32_t word_load(void *word);
void word_store(void *word, uint32_t value);
uint32_t word_add(void *word, uint32_t value);
int32_t word_wait(void *word, uint32_t seen, int64_t timeout_ns, uint32_t spins);
void word_wake(void *word);
/* cdef end */

#endif
