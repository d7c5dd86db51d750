/* The device protocols for C: the records of hypervisor/public/io, as a frontend and a backend see them.
 *
 * Freestanding, like ring1.h. ABI.md has the rules and the store's keys. A shared ring's header and both its records lie in
 * memory that the other side writes: copy a record out once, check the copy. */
#ifndef RING1_IO_H
#define RING1_IO_H

#include "../ring1.h"

/* ---- io/ring.h: one page, this header, then slots; a slot is as large as the larger record, their number a power of two */

struct ring1_sring {
    uint32_t req_prod;                     /* frontend */
    uint32_t req_event;                    /* backend: "notify me when req_prod reaches this" */
    uint32_t rsp_prod;                     /* backend */
    uint32_t rsp_event;                    /* frontend */
    uint8_t pad[48];
};
RING1_SIZE(ring1_sring, 64);
RING1_AT(ring1_sring, req_prod, 0); RING1_AT(ring1_sring, req_event, 4); RING1_AT(ring1_sring, rsp_prod, 8);
RING1_AT(ring1_sring, rsp_event, 12);

/* ---- blkif: 32 slots of 112 bytes */

#define BLKIF_SECTOR 512
#define BLKIF_SECTORS_PER_PAGE 8
#define BLKIF_MAX_SEGMENTS 11
#define BLKIF_MAX_SECTORS 88               /* of one request */
#define BLKIF_INFO_READONLY 4              /* a bit of the backend's key `info` */
#define BLKIF_XVDA 51712                   /* xvdb is 16 on */

enum {
    BLKIF_OP_READ = 0,
    BLKIF_OP_WRITE = 1,
    BLKIF_OP_FLUSH = 3,
};
enum {
    BLKIF_RSP_OKAY = 0,
    BLKIF_RSP_ERROR = -1,
    BLKIF_RSP_EOPNOTSUPP = -2,
};
struct blkif_segment {
    uint32_t gref;
    uint8_t first_sect, last_sect;         /* inclusive, 0..7 */
    uint8_t pad[2];
};
RING1_SIZE(blkif_segment, 8);
RING1_AT(blkif_segment, gref, 0); RING1_AT(blkif_segment, first_sect, 4); RING1_AT(blkif_segment, last_sect, 5);

struct blkif_request {
    uint8_t operation, nr_segments;
    uint16_t handle;
    uint32_t pad;
    uint64_t id;                           /* the frontend's, given back */
    uint64_t sector_number;                /* of the VBD */
    struct blkif_segment seg[BLKIF_MAX_SEGMENTS];
};
RING1_SIZE(blkif_request, 112);
RING1_AT(blkif_request, operation, 0); RING1_AT(blkif_request, nr_segments, 1); RING1_AT(blkif_request, handle, 2);
RING1_AT(blkif_request, id, 8); RING1_AT(blkif_request, sector_number, 16); RING1_AT(blkif_request, seg, 24);

struct blkif_response {
    uint64_t id;
    uint8_t operation, pad;
    int16_t status;
    uint32_t pad1;
};
RING1_SIZE(blkif_response, 16);
RING1_AT(blkif_response, id, 0); RING1_AT(blkif_response, operation, 8); RING1_AT(blkif_response, status, 10);

/* ---- netif: a transmit and a receive ring of 256 slots of 12 and of 8 bytes */

#define NETIF_MIN_FRAME 14
#define NETIF_MAX_FRAME 1514
#define NETIF_MTU 1500

enum {
    NETIF_RSP_OKAY = 0,
    NETIF_RSP_ERROR = -1,
    NETIF_RSP_DROPPED = -2,
};
struct netif_tx_request {
    uint32_t gref;
    uint16_t offset, flags, id, size;
};
RING1_SIZE(netif_tx_request, 12);
RING1_AT(netif_tx_request, gref, 0); RING1_AT(netif_tx_request, offset, 4); RING1_AT(netif_tx_request, flags, 6);
RING1_AT(netif_tx_request, id, 8); RING1_AT(netif_tx_request, size, 10);

struct netif_tx_response {
    uint16_t id;
    int16_t status;
};
RING1_SIZE(netif_tx_response, 4);
RING1_AT(netif_tx_response, id, 0); RING1_AT(netif_tx_response, status, 2);

struct netif_rx_request {
    uint16_t id, pad;
    uint32_t gref;
};
RING1_SIZE(netif_rx_request, 8);
RING1_AT(netif_rx_request, id, 0); RING1_AT(netif_rx_request, gref, 4);

struct netif_rx_response {
    uint16_t id, offset, flags;
    int16_t status;                        /* > 0: bytes */
};
RING1_SIZE(netif_rx_response, 8);
RING1_AT(netif_rx_response, id, 0); RING1_AT(netif_rx_response, offset, 2); RING1_AT(netif_rx_response, flags, 4);
RING1_AT(netif_rx_response, status, 6);

/* ---- the two pages of byte rings: indexes run free, the byte of index i is [i % size] */

struct xencons_interface {
    char in[1024], out[2048];
    uint32_t in_cons, in_prod, out_cons, out_prod;
};
RING1_SIZE(xencons_interface, 3088);
RING1_AT(xencons_interface, in, 0); RING1_AT(xencons_interface, out, 1024); RING1_AT(xencons_interface, in_cons, 3072);
RING1_AT(xencons_interface, in_prod, 3076); RING1_AT(xencons_interface, out_cons, 3080);
RING1_AT(xencons_interface, out_prod, 3084);

#define XENSTORE_RING_BYTES 1024
#define XENSTORE_PAYLOAD_MAX 4096
#define XENSTORE_ABS_PATH_MAX 3072
#define XENSTORE_REL_PATH_MAX 2048

struct xenstore_domain_interface {
    char req[XENSTORE_RING_BYTES], rsp[XENSTORE_RING_BYTES];
    uint32_t req_cons, req_prod, rsp_cons, rsp_prod;
};
RING1_SIZE(xenstore_domain_interface, 2064);
RING1_AT(xenstore_domain_interface, req, 0); RING1_AT(xenstore_domain_interface, rsp, 1024);
RING1_AT(xenstore_domain_interface, req_cons, 2048); RING1_AT(xenstore_domain_interface, req_prod, 2052);
RING1_AT(xenstore_domain_interface, rsp_cons, 2056); RING1_AT(xenstore_domain_interface, rsp_prod, 2060);

struct xsd_sockmsg {
    uint32_t type, req_id, tx_id, len;
};
RING1_SIZE(xsd_sockmsg, 16);
RING1_AT(xsd_sockmsg, type, 0); RING1_AT(xsd_sockmsg, req_id, 4); RING1_AT(xsd_sockmsg, tx_id, 8);
RING1_AT(xsd_sockmsg, len, 12);

enum {
    XS_DIRECTORY = 1,
    XS_READ = 2,
    XS_GET_PERMS = 3,
    XS_WATCH = 4,
    XS_UNWATCH = 5,
    XS_TRANSACTION_START = 6,
    XS_TRANSACTION_END = 7,
    XS_GET_DOMAIN_PATH = 10,
    XS_WRITE = 11,
    XS_MKDIR = 12,
    XS_RM = 13,
    XS_SET_PERMS = 14,
    XS_WATCH_EVENT = 15,
    XS_ERROR = 16,
};
enum {
    XenbusStateUnknown = 0,
    XenbusStateInitialising = 1,
    XenbusStateInitWait = 2,
    XenbusStateInitialised = 3,
    XenbusStateConnected = 4,
    XenbusStateClosing = 5,
    XenbusStateClosed = 6,
};

/* ---- a driver domain's page of statistics */

#define RING1_STATS_NR_ROWS 64

enum {
    RING1_STATS_VBD = 1,
    RING1_STATS_VIF = 2,
};
struct ring1_stats_row {
    uint16_t domid;                        /* of the frontend */
    uint16_t kind;                         /* 0: the row is free */
    uint32_t handle;
    uint64_t counter[7];
};
RING1_SIZE(ring1_stats_row, 64);
RING1_AT(ring1_stats_row, domid, 0); RING1_AT(ring1_stats_row, kind, 2); RING1_AT(ring1_stats_row, handle, 4);
RING1_AT(ring1_stats_row, counter, 8);

#endif
