/* The gate's C interface, read by the compiler; build_gate.py hands the same lines to cffi. */
#ifndef RING1_GATE_H
#define RING1_GATE_H

#include <stdint.h>

#define GATE_COMMAND_BYTES 56  /* u64 call number, six u64 arguments */
#define GATE_COMMAND_HEADER 64 /* u32 number of commands, padding */
#define GATE_TABLE 0x1000      /* u32 table 0, 1, 2, ..: the answers */

/* The monitor's code (gate.c), wherever it stands; its labels are local. */
#define MONITOR_LOOP \
    "1: mov $45,%eax\n mov %r13,%rdi\n xor %esi,%esi\n xor %edx,%edx\n mov $0x20,%r10d\n" /* recvfrom(MSG_TRUNC) */ \
    "   xor %r8d,%r8d\n xor %r9d,%r9d\n syscall\n" \
    "   test %rax,%rax\n jle 9f\n" /* 0: the hypervisor hung up */ \
    "   lea 64(%r12),%rbx\n mov (%r12),%ebp\n" \
    "2: test %ebp,%ebp\n jz 8f\n" \
    "   mov (%rbx),%rax\n mov 8(%rbx),%rdi\n mov 16(%rbx),%rsi\n mov 24(%rbx),%rdx\n" \
    "   mov 32(%rbx),%r10\n mov 40(%rbx),%r8\n mov 48(%rbx),%r9\n syscall\n" \
    "   add $56,%rbx\n dec %ebp\n cmp $-4095,%rax\n jb 2b\n" \
    "   neg %rax\n lea 4(%rax),%rdx\n jmp 3f\n" \
    "8: mov $4,%edx\n" \
    "3: lea 0x1000(%r12,%rbp,4),%rsi\n" /* the table entry that says %ebp */ \
    "   mov $44,%eax\n mov %r13,%rdi\n mov $0x4000,%r10d\n xor %r8d,%r8d\n xor %r9d,%r9d\n syscall\n" /* MSG_NOSIGNAL */ \
    "   jmp 1b\n" \
    "9: mov $60,%eax\n xor %edi,%edi\n syscall\n"

#define SYS_landlock_create_ruleset_ 444
#define SYS_landlock_restrict_self_ 446

/* Nothing leaves this module: a call between its files is direct, so that the fault handler never meets the dynamic linker. */
#pragma GCC visibility push(hidden)
/* cdef begin */
#define SPACE_FILTER 96
#define SPACE_ORDER_BYTES 824
struct space_order { /* what the zygote of application spaces is told: one message, with the descriptors of a space */
    int32_t parent, uid; /* the hypervisor's pid; -1: keep */
    char name[16];
    uint32_t landlock_bytes, nr_filter; /* 0: none */
    uint64_t landlock[3];
    uint64_t filter[SPACE_FILTER]; /* struct sock_filter */
};
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
long stub_code(char *page);
long landlock_rules(long abi, uint64_t *rules);
void enter_kernel(uint64_t entry, uint64_t start_info);
long traps_install(uint64_t begin, uint64_t bytes, long sock);
/* cdef end */
#pragma GCC visibility pop

#endif
