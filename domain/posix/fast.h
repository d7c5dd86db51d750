/* The kernel's own area in a program's address space, below everything that a program may map: what a patched call site leads to.
 *
 *   RING1_FAST_TABLE  read-only, the same frames in every program: addresses; a site is `jmp *slot`. Slot 0 is the gate's entry
 *   RING1_FAST_DATA   read-write, a frame of each program's: struct fast_data
 *   RING1_FAST_CODE   read-execute, the same frames in every program: the section `fast` of fast.c, then thunks, one a site
 *   RING1_FAST_FILES  the bytes of regular files that the kernel has lent, one window a descriptor
 *
 * The program may write all of struct fast_data: the kernel takes a position back as any number that lseek could have set, and
 * believes nothing else. */
#ifndef RING1_FAST_H
#define RING1_FAST_H

#include <stddef.h>
#include <stdint.h>

#define RING1_FAST_TABLE 0x60000ull
#define RING1_FAST_DATA 0x70000ull
#define RING1_FAST_CODE 0x80000ull
#define RING1_FAST_END 0x100000ull
#define RING1_FAST_FILES 0x7FF8000000ull
#define RING1_FAST_FILE_BYTES 0x100000ull /* of one window */
#define RING1_FAST_WINDOWS 64             /* descriptors 0 to 63 have one */
#define FAST_READ 1u
#define FAST_WRITE 2u
#define FAST_SLOW (-4096) /* of a result: it is the kernel's to serve */
#define FAST_MOST 65536u /* bytes that one call copies; more is the kernel's to do */

struct fast_window { /* of one descriptor; size 0: the kernel has its file */
    uint64_t size, position;
    uint32_t access, dirty; /* FAST_READ, FAST_WRITE; whether it was written */
    uint64_t reserved;
};
struct fast_data {
    uint32_t pid, tid, ppid, uid, euid, gid, egid, reserved;
    /* of the call in progress, by fast_enter: what the program's registers were, and what the call comes to */
    uint64_t rax, rcx, rdi, rsi, rdx, r10, r8, r9, rsp, rbx, rbp, r12, r13, r14, r15, result;
    struct fast_window windows[RING1_FAST_WINDOWS];
    uint8_t stack[1888];
};
_Static_assert(sizeof(struct fast_window) == 32 && offsetof(struct fast_window, position) == 8, "struct fast_window");
_Static_assert(offsetof(struct fast_data, rax) == 32 && offsetof(struct fast_data, result) == 152, "struct fast_data");
_Static_assert(offsetof(struct fast_data, windows) == 160 && sizeof(struct fast_data) == 4096, "struct fast_data");

struct fast_result { /* in rax and rdx */
    int64_t value;
    uint64_t position; /* of the window, from now on */
};

/* cdef begin */
struct fast_image {
    uint64_t bytes;
    uint32_t enter, saved, committed, end; /* offsets of the stages of a call in C: fast.c */
};
void fast_image(struct fast_image *out, void *code, uint64_t room);
int64_t fast_try(void *windows, void *files, uint64_t number, uint64_t fd, void *buffer, uint64_t count, uint64_t offset,
                 uint64_t *position);
/* cdef end */
#endif
