/* Records that say which they are in every byte, so that half of one, or another one, is seen. At least 8 bytes. */
#ifndef PROOF_RECORD_H
#define PROOF_RECORD_H

#include <stdint.h>
#include <string.h>

static inline void fill(void *record, uint32_t size, uint32_t number)
{
    memset(record, (int)(1 + number % 251), size);
    memcpy(record, &number, sizeof number);
}

static inline int whole(const void *record, uint32_t size, uint32_t number)
{
    const uint8_t *bytes = record;
    uint32_t written;

    memcpy(&written, record, sizeof written);
    if (written != number)
        return 0;
    for (uint32_t i = sizeof number; i < size; i++)
        if (bytes[i] != 1 + number % 251)
            return 0;
    return 1;
}

#endif
