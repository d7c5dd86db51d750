/* Both ends of three rings made by Xen's own macros (libxen-dev), for test_ring_xen.py; an end is 64 bytes of Python's. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __XEN_TOOLS__ 1 /* the latest of the interface's versions */
#define xen_mb() __sync_synchronize()
#define xen_rmb() __sync_synchronize()
#define xen_wmb() __sync_synchronize()
#include <xen/xen.h>
#include <xen/grant_table.h>
#include <xen/io/blkif.h>
#include <xen/io/netif.h>

_Static_assert(sizeof(struct blkif_front_ring) <= 64 && sizeof(struct blkif_back_ring) <= 64, "Python allots 64 bytes");

/* `start`: the index at which counting begins, as of a ring that has been in use. */
#define ENDS(name)                                                                                                       \
    uint32_t name##_request(void) { return sizeof(struct name##_request); }                                              \
    uint32_t name##_response(void) { return sizeof(struct name##_response); }                                            \
    uint32_t name##_front(void *end, void *page, uint32_t bytes, uint32_t start)                                         \
    {                                                                                                                    \
        struct name##_front_ring *f = end;                                                                               \
        struct name##_sring *s = page;                                                                                   \
                                                                                                                         \
        SHARED_RING_INIT(s);                                                                                             \
        s->req_prod = s->rsp_prod = start;                                                                               \
        s->req_event = s->rsp_event = start + 1;                                                                         \
        FRONT_RING_ATTACH(f, s, start, bytes);                                                                           \
        return RING_SIZE(f);                                                                                             \
    }                                                                                                                    \
    uint32_t name##_back(void *end, void *page, uint32_t bytes)                                                          \
    {                                                                                                                    \
        struct name##_back_ring *b = end;                                                                                \
        struct name##_sring *s = page;                                                                                   \
                                                                                                                         \
        BACK_RING_ATTACH(b, s, s->rsp_prod, bytes);                                                                      \
        return RING_SIZE(b);                                                                                             \
    }                                                                                                                    \
    int32_t name##_front_publish(void *end, const char *requests, uint32_t n)                                            \
    {                                                                                                                    \
        struct name##_front_ring *f = end;                                                                               \
        int notify;                                                                                                      \
                                                                                                                         \
        for (uint32_t i = 0; i < n && !RING_FULL(f); i++, f->req_prod_pvt++)                                             \
            memcpy(RING_GET_REQUEST(f, f->req_prod_pvt), requests + i * name##_request(), name##_request());             \
        RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(f, notify);                                                                  \
        return notify;                                                                                                   \
    }                                                                                                                    \
    int32_t name##_front_take(void *end, char *out, uint32_t max)                                                        \
    {                                                                                                                    \
        struct name##_front_ring *f = end;                                                                               \
        uint32_t n = 0;                                                                                                  \
                                                                                                                         \
        for (; n < max && RING_HAS_UNCONSUMED_RESPONSES(f); n++, f->rsp_cons++)                                          \
            memcpy(out + n * name##_response(), RING_GET_RESPONSE(f, f->rsp_cons), name##_response());                   \
        return (int32_t)n;                                                                                               \
    }                                                                                                                    \
    int32_t name##_front_recheck(void *end)                                                                              \
    {                                                                                                                    \
        struct name##_front_ring *f = end;                                                                               \
        int work;                                                                                                        \
                                                                                                                         \
        RING_FINAL_CHECK_FOR_RESPONSES(f, work);                                                                         \
        return work != 0;                                                                                                \
    }                                                                                                                    \
    int32_t name##_back_take(void *end, char *out, uint32_t max)                                                         \
    {                                                                                                                    \
        struct name##_back_ring *b = end;                                                                                \
        uint32_t n = 0;                                                                                                  \
                                                                                                                         \
        for (; n < max && RING_HAS_UNCONSUMED_REQUESTS(b); n++, b->req_cons++)                                           \
            memcpy(out + n * name##_request(), RING_GET_REQUEST(b, b->req_cons), name##_request());                      \
        return (int32_t)n;                                                                                               \
    }                                                                                                                    \
    int32_t name##_back_publish(void *end, const char *responses, uint32_t n)                                            \
    {                                                                                                                    \
        struct name##_back_ring *b = end;                                                                                \
        int notify;                                                                                                      \
                                                                                                                         \
        for (uint32_t i = 0; i < n; i++, b->rsp_prod_pvt++)                                                              \
            memcpy(RING_GET_RESPONSE(b, b->rsp_prod_pvt), responses + i * name##_response(), name##_response());         \
        RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(b, notify);                                                                 \
        return notify;                                                                                                   \
    }                                                                                                                    \
    int32_t name##_back_recheck(void *end)                                                                               \
    {                                                                                                                    \
        struct name##_back_ring *b = end;                                                                                \
        int work;                                                                                                        \
                                                                                                                         \
        RING_FINAL_CHECK_FOR_REQUESTS(b, work);                                                                          \
        return work != 0;                                                                                                \
    }

ENDS(blkif)
ENDS(netif_tx)
ENDS(netif_rx)
