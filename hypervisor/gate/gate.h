/* The gate's C interface, read by the compiler; build_gate.py hands the same lines to cffi. */
#ifndef RING1_GATE_H
#define RING1_GATE_H

#include <stdint.h>

#define GATE_COMMAND_BYTES 56  /* u64 call number, six u64 arguments */
#define GATE_COMMAND_HEADER 64 /* u32 number of commands, padding */
#define GATE_TABLE 0x1000      /* u32 table 0, 1, 2, ..: the answers */

/* Nothing leaves this module: a call between its files is direct, so that the fault handler never meets the dynamic linker. */
#pragma GCC visibility push(hidden)
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
long fault_install(uint64_t begin, uint64_t bytes, long sock);
long traps_install(const uint64_t *table, uint8_t *upcall_mask);
/* cdef end */
#pragma GCC visibility pop

#endif
