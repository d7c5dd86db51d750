/* Hypercalls as messages, for C: as much of msgpack as a request is written in and a reply is read from.
 *
 * Freestanding, like ring1.h. Nothing is allocated: a request is put together in a buffer of RING1_MESSAGE_BYTES, each
 * ring1_put function returning the bytes it wrote; a reply is read item by item, never past its end. */
#ifndef RING1_MESSAGE_H
#define RING1_MESSAGE_H

#include <stdint.h>

static inline uint32_t ring1_put_head(uint8_t *at, uint8_t kind, uint64_t value, uint32_t bytes)
{
    at[0] = kind;
    for (uint32_t i = 0; i < bytes; i++)
        at[1 + i] = (uint8_t)(value >> 8 * (bytes - 1 - i));
    return 1 + bytes;
}

static inline uint32_t ring1_put_uint(uint8_t *at, uint64_t value) /* at most 9 bytes */
{
    if (value < 0x80)
        return ring1_put_head(at, (uint8_t)value, 0, 0);
    return value >> 32 ? ring1_put_head(at, 0xcf, value, 8) : ring1_put_head(at, 0xce, value, 4);
}

/* `kind`: 0xc4 for bytes, 0xd9 for text; size + 2 bytes are written. */
static inline uint32_t ring1_put_string(uint8_t *at, uint8_t kind, const void *data, uint8_t size)
{
    for (uint32_t i = 0; i < size; i++)
        at[2 + i] = ((const uint8_t *)data)[i];
    return ring1_put_head(at, kind, size, 1) + size;
}

/* [op, sequence, n integers]; the sub-operation, where the call has one, is the first of them. `more` fields of text or
 * bytes follow by ring1_put_string. n + more <= 13, so that at most 136 bytes are written here. */
static inline uint32_t ring1_request(uint8_t *at, uint32_t op, uint32_t sequence, const uint64_t *fields, uint32_t n,
                                     uint32_t more)
{
    uint32_t size = ring1_put_head(at, (uint8_t)(0x90 + 2 + n + more), 0, 0);

    size += ring1_put_uint(at + size, op);
    size += ring1_put_uint(at + size, sequence);
    for (uint32_t i = 0; i < n; i++)
        size += ring1_put_uint(at + size, fields[i]);
    return size;
}

/* The item of a reply at message[*at], which moves behind it: the value of an integer, the count of an array, the length of
 * a text, which then stands at message + *at - length. 0, or -1 where the message ends or holds what no reply has. */
static inline int32_t ring1_get(const uint8_t *message, uint32_t size, uint32_t *at, int64_t *value)
{
    uint32_t kind = *at < size ? message[(*at)++] : 0xc1, bytes; /* 0xc1 is nothing */
    uint64_t raw = 0;

    if (kind < 0x80 || kind >= 0xe0) { /* -32..127 */
        *value = (int8_t)kind;
        return 0;
    }
    if (kind < 0xc0) { /* array of up to 15; text of up to 31 bytes; maps do not occur */
        *value = kind & (kind < 0xa0 ? 15 : 31);
        *at += kind < 0xa0 ? 0 : (uint32_t)*value;
        return kind < 0x90 || *at > size ? -1 : 0;
    }
    bytes = kind >= 0xcc && kind <= 0xd3 ? 1u << (kind & 3) : kind == 0xd9 ? 1 : kind == 0xdc ? 2 : 9; /* 9: nothing */
    if (bytes > 8 || size - *at < bytes)
        return -1;
    for (uint32_t i = 0; i < bytes; i++)
        raw = raw << 8 | message[(*at)++];
    *value = kind >= 0xd0 && kind <= 0xd3 ? (int64_t)(raw << (64 - 8 * bytes)) >> (64 - 8 * bytes) : (int64_t)raw;
    *at += kind == 0xd9 ? (uint32_t)raw : 0;
    return *at > size ? -1 : 0;
}

#endif
