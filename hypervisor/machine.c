/* What is done to whole frames. */
#include "hv.h"

#include <string.h>

void scrub(void *at, uint64_t bytes) { memset(at, 0, bytes); }
