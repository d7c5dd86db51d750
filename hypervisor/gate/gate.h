/* The gate's C interface, read by the compiler; build_gate.py hands the same lines to cffi. */
#ifndef RING1_GATE_H
#define RING1_GATE_H

#include <stdint.h>

#define GATE_COMMAND_BYTES 56  /* u64 call number, six u64 arguments */
#define GATE_COMMAND_HEADER 64 /* u32 number of commands, padding */
#define GATE_TABLE 0x1000      /* u32 table 0, 1, 2, ..: the answers */

/* cdef begin */
long raw6(long nr, long a, long b, long c, long d, long e, long f);
long monitor_code(char *page, long size);
long monitor_spawn(uint64_t code, uint64_t commands, long sock);
long fork_to_parent(void);
void brk_heap_only(void);
long open_signalfd(int sig, int fd);
long install_filter(const void *program, int count);
long landlock_abi(void);
long landlock_all(long abi);
long keep_capabilities(uint64_t keep);
void enter_kernel(uint64_t entry, uint64_t start_info);

/* shared_info and the grant table, seen by the hypervisor: shared.c */
int32_t evtchn_set_pending(void *shared_info, uint32_t port);
int32_t evtchn_unmask(void *shared_info, uint32_t port);
void evtchn_clear(void *shared_info, uint32_t port);
int32_t upcall_is_pending(void *shared_info);
void upcall_unblock(void *shared_info);
int32_t grant_claim(void *table, uint32_t ref, uint16_t domid, int32_t writable, uint32_t *frame);
void grant_release(void *table, uint32_t ref, int32_t clear_writing, int32_t clear_reading);
void scrub(void *at, uint64_t bytes);
/* cdef end */

#endif
