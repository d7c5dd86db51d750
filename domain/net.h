/* The network frontend's data path, a batch a call. build_net.py hands the marked lines to cffi. */
#ifndef RING1_NET_H
#define RING1_NET_H

#include <stdint.h>

/* cdef begin */
#define NET_RING 256
#define NET_FRAME 1514

struct netfront {
    uint64_t tx[8], rx[8];             /* struct ring_front */
    uint64_t tx_pool, rx_pool;         /* host addresses, a page an entry */
    uint32_t tx_refs[NET_RING], rx_refs[NET_RING];
    uint16_t tx_free[NET_RING];
    uint8_t tx_busy[NET_RING], rx_posted[NET_RING];
    uint32_t nr_tx_free, broken;
    uint64_t tx_frames, tx_bytes, tx_dropped, rx_frames, rx_bytes, rx_errors;
};

int32_t net_open(struct netfront *n, void *tx_page, void *rx_page, uint64_t bytes);
int32_t net_post(struct netfront *n);
int32_t net_reap(struct netfront *n);
int32_t net_send(struct netfront *n, const void *head, uint32_t head_size, const void *data, const uint32_t *lengths,
                 uint32_t count, uint32_t *sent);
int32_t net_recv(struct netfront *n, void *out, uint32_t *lengths, uint32_t max, uint32_t *received);
int32_t net_recheck_rx(struct netfront *n);
int32_t net_recheck_tx(struct netfront *n);
int32_t udp_payload(const void *frame, uint32_t size, uint32_t *offset);
/* cdef end */

#endif
