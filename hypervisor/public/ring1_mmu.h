/* ring1's contract for C, page tables and exceptions. As ring1.h, which it needs; ABI.md section 7. */
#ifndef RING1_MMU_H
#define RING1_MMU_H

#include "ring1.h"

/* ---- page tables: three levels of 512 entries */

#define RING1_PTE_PRESENT 0x1
#define RING1_PTE_RW 0x2
#define RING1_PTE_US 0x4
#define RING1_PTE_A 0x20
#define RING1_PTE_D 0x40
#define RING1_PTE_G 0x100
#define RING1_PTE_NX 0x8000000000000000
#define RING1_MFN_MASK 0xffffffffff000
#define RING1_ENTRIES 512
#define RING1_L1_SHIFT 12                  /* bit of the address at which the slot of a level begins */
#define RING1_L2_SHIFT 21
#define RING1_L3_SHIFT 30

enum {                                     /* the low three bits of mmu_update.ptr */
    MMU_NORMAL_PT_UPDATE = 0,
    MMU_MACHPHYS_UPDATE = 1,
    MMU_PT_UPDATE_PRESERVE_AD = 2,
};
enum {
    MMUEXT_PIN_L1_TABLE = 0,
    MMUEXT_PIN_L2_TABLE = 1,
    MMUEXT_PIN_L3_TABLE = 2,
    MMUEXT_UNPIN_TABLE = 4,
    MMUEXT_NEW_BASEPTR = 5,
    MMUEXT_TLB_FLUSH_LOCAL = 6,
    MMUEXT_INVLPG_LOCAL = 7,
    MMUEXT_NEW_USER_BASEPTR = 15,
    MMUEXT_CLEAR_PAGE = 16,
    MMUEXT_COPY_PAGE = 17,
};
enum {                                     /* types of a frame */
    RING1_PAGE_NONE = 0,
    RING1_PAGE_L1 = 1,
    RING1_PAGE_L2 = 2,
    RING1_PAGE_L3 = 3,
    RING1_PAGE_SEG_DESC = 5,
    RING1_PAGE_WRITABLE = 7,
};

struct mmu_update {
    uint64_t ptr;                          /* machine address of the entry, and a command */
    uint64_t val;
};
RING1_SIZE(mmu_update, 16); RING1_AT(mmu_update, ptr, 0); RING1_AT(mmu_update, val, 8);

struct mmuext_op {
    uint32_t cmd, pad;
    uint64_t arg1, arg2;                   /* an mfn or a guest-virtual address; COPY_PAGE: the mfn of the source */
};
RING1_SIZE(mmuext_op, 24); RING1_AT(mmuext_op, cmd, 0); RING1_AT(mmuext_op, arg1, 8); RING1_AT(mmuext_op, arg2, 16);

/* ---- descriptor tables */

#define RING1_DESCRIPTORS 512              /* of a frame */
#define RING1_GDT_FRAMES 14
#define RING1_GDT_ENTRIES 7168

/* ---- exceptions */

enum {                                     /* what the processor raises */
    RING1_VECTOR_DIVIDE_ERROR = 0,
    RING1_VECTOR_DEBUG = 1,
    RING1_VECTOR_NMI = 2,                  /* never a guest's, nor DOUBLE_FAULT and MACHINE_CHECK */
    RING1_VECTOR_BREAKPOINT = 3,
    RING1_VECTOR_OVERFLOW = 4,
    RING1_VECTOR_BOUNDS = 5,
    RING1_VECTOR_INVALID_OPCODE = 6,
    RING1_VECTOR_DEVICE_NOT_AVAILABLE = 7,
    RING1_VECTOR_DOUBLE_FAULT = 8,
    RING1_VECTOR_INVALID_TSS = 10,
    RING1_VECTOR_SEGMENT_NOT_PRESENT = 11,
    RING1_VECTOR_STACK = 12,
    RING1_VECTOR_GENERAL_PROTECTION = 13,
    RING1_VECTOR_PAGE_FAULT = 14,
    RING1_VECTOR_X87 = 16,
    RING1_VECTOR_ALIGNMENT_CHECK = 17,
    RING1_VECTOR_MACHINE_CHECK = 18,
    RING1_VECTOR_SIMD = 19,
    RING1_VECTOR_SYSTEM_CALL = 128,        /* the one that may be fast: from applications to the kernel, without us */
};
#define RING1_PF_PRESENT 1                 /* bits of the error code, as the guest's own tables have it */
#define RING1_PF_WRITE 2
#define RING1_PF_USER 4
#define RING1_PF_FETCH 16
#define RING1_PF_STORE (1ull << 32)        /* of a message on RING1_FD_FAULT alone, as the next two */
#define RING1_PF_DELIVERY (1ull << 33)
#define RING1_PF_UNHANDLED (1ull << 34)
#define RING1_RETRY 0                      /* verdicts of the hypervisor on a fault: run it again, */
#define RING1_SKIP 2                       /* or it was done as a request, or */
#define RING1_BOUNCE 1                     /* enter the handler, */
#define RING1_RED_ZONE 128                 /* this far below the interrupted stack, and aligned to 16, */
#define RING1_FRAME_BYTES 48               /* with a frame of this size, 8 less without an error code */
#define RING1_TI_DPL 3                     /* bits of trap_info.flags */
#define RING1_TI_MASK_EVENTS 4
#define RING1_TI_FAST 8                    /* of RING1_VECTOR_SYSTEM_CALL, and of no other */
#define RING1_TI_SHIFT 56                  /* the lowest of them in a word of ring1_traps */
#define RING1_EVENT 256                    /* which word of ring1_traps, and what a message is of: the event callback, */
#define RING1_FAILSAFE 257                 /* the failsafe callback, */
#define RING1_KERNEL_SP 258
#define RING1_SENT 512                     /* of a message: a signal that the domain sent itself */

enum {
    VMASST_CMD_enable = 0,
    VMASST_CMD_disable = 1,
};
enum {
    VMASST_TYPE_writable_pagetables = 2,
};

struct ring1_traps {                       /* the page RING1_TRAP_TABLE: a word is flags << RING1_TI_SHIFT | address, 0 is none */
    uint64_t trap[RING1_MAX_TRAPS];        /* by vector */
    uint64_t event, failsafe;
    uint64_t kernel_sp;                    /* host address */
};
RING1_SIZE(ring1_traps, 2072); RING1_AT(ring1_traps, trap, 0); RING1_AT(ring1_traps, event, 2048);
RING1_AT(ring1_traps, failsafe, 2056); RING1_AT(ring1_traps, kernel_sp, 2064);

struct trap_info {
    uint8_t vector, flags;
    uint16_t cs;
    uint32_t pad;
    uint64_t address;                      /* of the kernel's process; 0 ends the array */
};
RING1_SIZE(trap_info, 16); RING1_AT(trap_info, vector, 0); RING1_AT(trap_info, flags, 1); RING1_AT(trap_info, cs, 2);
RING1_AT(trap_info, address, 8);

struct ring1_exception_frame {             /* what a handler finds on its stack, from rip on where there is no error code; iretq
                                              takes it from rip on. Byte 4 of cs: evtchn_upcall_mask before the entry */
    uint64_t error, rip, cs, rflags, rsp, ss;
};
RING1_SIZE(ring1_exception_frame, 48); RING1_AT(ring1_exception_frame, error, 0); RING1_AT(ring1_exception_frame, rip, 8);
RING1_AT(ring1_exception_frame, cs, 16); RING1_AT(ring1_exception_frame, rflags, 24);
RING1_AT(ring1_exception_frame, rsp, 32); RING1_AT(ring1_exception_frame, ss, 40);

#endif
