/* The virtual switch and firewall-router. build_net.py hands the marked lines to cffi. */
#ifndef RING1_SWITCH_H
#define RING1_SWITCH_H

#include <stdint.h>

/* cdef begin */
#define SWITCH_VIFS 64
#define SWITCH_RULES 1024
#define SWITCH_RING 256
#define VIF_GREFS 4096
#define RULE_DROP 0
#define RULE_ACCEPT 1

struct rule {
    uint32_t src, src_mask, dst, dst_mask;
    uint16_t src_port[2], dst_port[2]; /* inclusive; 0..65535 is any */
    int16_t src_vif, dst_vif;          /* slot, -1 any, -2 none such */
    uint8_t protocol, action;          /* protocol 0: any */
    uint16_t pad;
    uint64_t hits;
};
struct vif {
    uint64_t tx[8], rx[8]; /* struct ring_back */
    uint32_t connected, broken;
    uint16_t domid, handle;
    uint8_t mac[6], pad[2];
    uint32_t ip;             /* network order as a number; 0: any */
    uint32_t taken, posted, first, answered, notify;
    uint64_t *stats;         /* seven counters of the statistics row */
    uint64_t readable[VIF_GREFS]; /* addresses of mapped grants, 0 unknown, 1 refused: of frames to send, mapped */
    uint64_t writable[VIF_GREFS]; /* read-only, and of buffers; one reference may be both, and is mapped twice then */
    unsigned char batch[3072];    /* SWITCH_RING tx requests of 12 bytes */
    unsigned char buffers[2048];  /* SWITCH_RING posted rx requests, a queue */
    unsigned char answers[2048];  /* rx responses not yet published */
};
struct nswitch {
    uint32_t nr_rules, accept_by_default;
    uint64_t default_hits, spoofed, unknown_destination, no_buffer, malformed;
    struct rule rules[SWITCH_RULES];
    struct vif vifs[SWITCH_VIFS];
};

int32_t vif_attach(struct vif *vif, void *tx, void *rx, uint64_t bytes);
int32_t vif_take(struct vif *vif, uint32_t max);
int32_t vif_missing(struct vif *vif, int32_t buffers, uint32_t *grefs, uint32_t max);
int32_t switch_run(struct nswitch *sw, uint32_t from);
int32_t vif_publish(struct vif *vif);
int32_t vif_recheck(struct vif *vif);
int32_t firewall_judge(struct nswitch *sw, const void *header, uint32_t copied, uint32_t size, int32_t from, int32_t to);
/* cdef end */

#endif
