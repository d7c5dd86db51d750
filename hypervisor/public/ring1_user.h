/* Applications: the cell by which a program and its kernel hand over, and where it lies. ABI.md section 8. Both sides' C halves
 * use it. The program may write every byte: the kernel copies once, and believes only what it has checked. */
#ifndef RING1_USER_H
#define RING1_USER_H

#include "ring1.h"

#define RING1_USER_START 0x10000ull          /* the host maps nothing below */
#define RING1_USER_GATE 0x7FFC000000ull      /* the only page from which the host takes a system call */
#define RING1_USER_CALL 0x7FFC000E00ull      /* in it: where a program hands over without the host, as from a system call */
#define RING1_USER_CONTROL 0x7FFC020000ull   /* the cell, registers of a direct call, then the stack of signals */
#define RING1_CONTROL_PAGES 8
#define RING1_CONTROL_BYTES 32768
#define RING1_MAX_USERS 128                  /* spaces of a domain */
#define RING1_TURN_KERNEL 0
#define RING1_TURN_PROGRAM 1
#define RING1_TURN_DEAD 2                    /* the hypervisor's word: there is no program any more */
#define RING1_TURN_FRAME 3                   /* to a direct call: come back with all registers, by an exception */
#define RING1_ARCH_X86_64 0xC000003Eu        /* AUDIT_ARCH_X86_64 */
#define RING1_X32_BIT 0x40000000u

#define RING1_OP_user 49                     /* __HYPERVISOR_arch_1 of Xen */
#define RING1_USER_interrupt 0               /* u64 root */
#define RING1_USER_destroy 1                 /* u64 root */

struct ring1_cell {
    uint32_t turn;     /* the futex of both sides */
    uint32_t signal;   /* of the host: why the program came back; 0: a direct call */
    uint64_t number;   /* of a system call */
    uint32_t arch;     /* and the table it is of */
    uint32_t error;    /* of an exception */
    uint64_t address;
    uint64_t vector;
    uint64_t frame;    /* where the host put the registers */
    uint64_t fs_base;
    uint64_t gs_base;
};
RING1_SIZE(ring1_cell, 64); RING1_AT(ring1_cell, turn, 0); RING1_AT(ring1_cell, signal, 4); RING1_AT(ring1_cell, number, 8);
RING1_AT(ring1_cell, arch, 16); RING1_AT(ring1_cell, error, 20); RING1_AT(ring1_cell, address, 24);
RING1_AT(ring1_cell, vector, 32); RING1_AT(ring1_cell, frame, 40); RING1_AT(ring1_cell, fs_base, 48);
RING1_AT(ring1_cell, gs_base, 56);

struct ring1_call { /* at RING1_USER_CONTROL + 64, of a direct call; the first of Linux's struct user_regs_struct */
    uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, rsp;
};
#define RING1_CALL_AT 64
#define RING1_WAITS_AT 192 /* u32, the kernel's: whether it waits for the turn and is to be woken */
RING1_SIZE(ring1_call, 128); RING1_AT(ring1_call, r15, 0); RING1_AT(ring1_call, r14, 8); RING1_AT(ring1_call, r13, 16);
RING1_AT(ring1_call, r12, 24); RING1_AT(ring1_call, rbp, 32); RING1_AT(ring1_call, rbx, 40); RING1_AT(ring1_call, r11, 48);
RING1_AT(ring1_call, r10, 56); RING1_AT(ring1_call, r9, 64); RING1_AT(ring1_call, r8, 72); RING1_AT(ring1_call, rax, 80);
RING1_AT(ring1_call, rcx, 88); RING1_AT(ring1_call, rdx, 96); RING1_AT(ring1_call, rsi, 104); RING1_AT(ring1_call, rdi, 112);
RING1_AT(ring1_call, rsp, 120);

#endif
