/* What the fuzz targets share. An input is a play: bytes that say, one after the other, what the honest part of a peer does,
 * what the hostile part changes, and when our code is called; so that a mutated input is still a play, with a well-formed ring
 * in it most of the time. Each target holds our code to a model of its own; must() ends the process where they differ.
 *
 * fuzz_x.c is linked with libFuzzer, or, where clang is missing, with generate.c. */
#ifndef PROOF_FUZZ_H
#define PROOF_FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ring.h"

struct input {
    const uint8_t *at, *end;
};

#define must(holds) ((holds) ? (void)0 : failed(#holds, __FILE__, __LINE__))

static inline void failed(const char *what, const char *file, int line)
{
    fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
    abort();
}

static inline int more(const struct input *in) { return in->at < in->end; }

/* The next bytes as a number; nothing is left: zeros. */
static inline uint64_t number(struct input *in, uint32_t bytes)
{
    uint64_t n = 0;

    while (bytes--)
        n = n << 8 | (more(in) ? *in->at++ : 0);
    return n;
}

/* 0 ... n - 1 */
static inline uint32_t below(struct input *in, uint32_t n) { return (uint32_t)number(in, 1) % n; }

/* One time in `n`. */
static inline int rarely(struct input *in, uint32_t n) { return below(in, n) == n - 1; }

/* Where the indexes begin to count: half of the time just before they wrap. */
static inline uint32_t start_index(struct input *in)
{
    uint32_t n = (uint32_t)number(in, 1);

    return n & 1 ? UINT32_MAX - n / 8 : n / 2;
}

/* An index that its owner may have moved: a little, or anywhere. */
static inline uint32_t moved(struct input *in, uint32_t index)
{
    return rarely(in, 4) ? (uint32_t)number(in, 4) : index + (uint32_t)(int8_t)number(in, 1);
}

static inline void poke(struct input *in, void *page, uint32_t bytes)
{
    uint32_t at = (uint32_t)number(in, 2) % bytes;

    ((uint8_t *)page)[at] = (uint8_t)number(in, 1);
}

/* The peer's end of a ring in `page`, as raw as the peer pleases. */
struct peer {
    struct ring_shared *sh;
    uint32_t entries, slot;
    uint32_t next; /* what an honest producer would fill next */
};

static inline struct peer peer_of(void *page, uint32_t slot, uint32_t start)
{
    struct peer p = {page, ring_entries(4096, slot), slot, start};

    memset(page, 0, 64);
    p.sh->req_prod = p.sh->rsp_prod = start;
    p.sh->req_event = p.sh->rsp_event = start + 1;
    return p;
}

static inline void *slot_at(const struct peer *p, uint32_t index)
{
    return (char *)p->sh + 64 + (index % p->entries) * p->slot;
}

/* Where a honest frontend has room: what is published and not answered fits the ring. */
static inline uint32_t room(const struct peer *p) { return p->entries - (p->next - p->sh->rsp_prod); }

static inline void put_request(struct peer *p, const void *request, uint32_t size)
{
    if (room(p) == 0 || room(p) > p->entries)
        return;
    memcpy(slot_at(p, p->next), request, size);
    p->sh->req_prod = ++p->next;
}

/* What a hostile peer does to a ring: a byte of it, the producer's index, the index it wants to be told of. */
static inline void mischief(struct input *in, struct peer *p)
{
    switch (below(in, 4)) {
    case 0:
        p->sh->req_prod = moved(in, p->next);
        break;
    case 1:
        p->sh->rsp_event = moved(in, p->sh->rsp_prod);
        break;
    default:
        poke(in, p->sh, 4096);
    }
}

#endif
