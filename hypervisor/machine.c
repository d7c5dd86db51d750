/* What is done to whole frames, and where we run. */
#define _GNU_SOURCE
#include "hv.h"

#include <sched.h>
#include <string.h>

void scrub(void *at, uint64_t bytes) { memset(at, 0, bytes); }

void copy_page(void *to, const void *from) { memmove(to, from, 4096); }

int32_t current_cpu(void) { return sched_getcpu(); }
