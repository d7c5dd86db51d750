/* System calls that a program makes without leaving its process: the code page of the kernel's area, and its tests' door.
 *
 * The section `fast` is copied into frames that every program has read-execute; it runs as the program, with the program's
 * rights, so there is nothing that it could check on behalf of anybody. It has no library, no data and no relocation, leaves
 * vector registers and segment bases alone, and does not use the program's stack: below it is a red zone.
 *
 * A call here can be taken back. Whenever a program is stopped in it, the kernel (low.py) looks at how far it came:
 *
 *     fast_enter      the program's registers go to struct fast_data: until `saved` they are as they were
 *     fast_saved      the work, which may be done twice: bytes are copied, nothing else changes
 *     one store       the new position: the call has happened
 *     fast_committed  registers come back from struct fast_data
 *
 * Before the store it puts the program back to its call site, after it behind. So no thread is ever found in the middle, one
 * frame serves all threads of a program, and nobody who hides here keeps the CPU. */
#pragma GCC target("general-regs-only")
#pragma GCC optimize("no-stack-protector,no-tree-loop-distribute-patterns,no-jump-tables")
#include "fast.h"

#include <string.h>

#define FAST __attribute__((section("fast"), used, visibility("hidden")))
enum { READ = 0, WRITE = 1, LSEEK = 8, PREAD = 17, PWRITE = 18, SEEK_FROM_START = 0, SEEK_FROM_HERE = 1, SEEK_FROM_END = 2 };

static inline __attribute__((always_inline)) void copy(void *to, const void *from, uint64_t count)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

static inline __attribute__((always_inline)) struct fast_result seek(struct fast_window w, uint64_t offset, uint32_t whence)
{
    uint64_t place = offset;

    if (whence == SEEK_FROM_HERE)
        place += w.position;
    else if (whence == SEEK_FROM_END)
        place += w.size;
    else if (whence != SEEK_FROM_START)
        return (struct fast_result){FAST_SLOW, 0};
    if ((int64_t)place < 0 || (int64_t)w.position < 0)
        return (struct fast_result){FAST_SLOW, 0};
    return (struct fast_result){(int64_t)place, place};
}

/* One call on a file that is lent; FAST_SLOW: whatever is not plainly within it. Until it returns only bytes have changed. */
static inline __attribute__((always_inline)) struct fast_result serve(struct fast_window *windows, char *files, uint32_t number,
                                                                      uint32_t fd, char *buffer, uint64_t count, uint64_t offset)
{
    const struct fast_result slow = {FAST_SLOW, 0};
    uint64_t place;
    struct fast_window w;

    if (fd >= RING1_FAST_WINDOWS)
        return slow;
    w = windows[fd];
    if (!w.size)
        return slow;
    if (number == LSEEK)
        return seek(w, (uint64_t)buffer, (uint32_t)count);
    place = number == READ || number == WRITE ? w.position : offset;
    if (place > w.size || count > FAST_MOST)
        return slow;
    files += fd * RING1_FAST_FILE_BYTES + place;
    if (number == READ || number == PREAD) {
        if (!(w.access & FAST_READ))
            return slow;
        if (count > w.size - place)
            count = w.size - place;
        copy(buffer, files, count);
    } else {
        if (!(w.access & FAST_WRITE) || count > w.size - place)
            return slow;
        windows[fd].dirty |= count > 0;
        copy(files, buffer, count);
    }
    return (struct fast_result){(int64_t)count, number == READ || number == WRITE ? place + count : w.position};
}

FAST struct fast_result fast_serve(uint32_t fd, char *buffer, uint64_t count, uint64_t offset, uint32_t number);
FAST struct fast_result fast_serve(uint32_t fd, char *buffer, uint64_t count, uint64_t offset, uint32_t number)
{
    struct fast_data *data = (struct fast_data *)RING1_FAST_DATA;

    return serve(data->windows, (char *)RING1_FAST_FILES, number, fd, buffer, count, offset);
}

/* rax: the number; rcx: where to go on; the rest as the program has it. */
void fast_enter(void);
extern const char fast_saved[], fast_committed[], fast_end[];
extern const char __start_fast[], __stop_fast[];
__asm__(".pushsection fast,\"ax\",@progbits\n"
        ".hidden fast_enter\n.globl fast_enter\n.hidden fast_saved\n.globl fast_saved\n"
        ".hidden fast_committed\n.globl fast_committed\n.hidden fast_end\n.globl fast_end\n"
        "fast_enter:\n"
        "   mov %rax,0x70020\n mov %rcx,0x70028\n mov %rdi,0x70030\n mov %rsi,0x70038\n mov %rdx,0x70040\n"
        "   mov %r10,0x70048\n mov %r8,0x70050\n mov %r9,0x70058\n mov %rsp,0x70060\n"
        "   mov %rbx,0x70068\n mov %rbp,0x70070\n mov %r12,0x70078\n mov %r13,0x70080\n mov %r14,0x70088\n"
        "   mov %r15,0x70090\n"
        "fast_saved:\n"
        "   mov $0x71000,%esp\n"
        "   cld\n"
        "   mov %r10,%rcx\n mov %eax,%r8d\n"
        "   call fast_serve\n"
        "   cmp $-4096,%rax\n"
        "   je 1f\n"
        "   mov %rax,0x70098\n"
        "   mov 0x70030,%edi\n shl $5,%rdi\n"
        "   mov %rdx,0x700a8(%rdi)\n"
        "fast_committed:\n"
        "   mov 0x70028,%rcx\n mov 0x70030,%rdi\n mov 0x70038,%rsi\n mov 0x70040,%rdx\n"
        "   mov 0x70048,%r10\n mov 0x70050,%r8\n mov 0x70058,%r9\n mov 0x70060,%rsp\n"
        "   jmp *%rcx\n"
        "fast_end:\n"
        "1: mov 0x70020,%rax\n mov 0x70028,%rcx\n mov 0x70030,%rdi\n mov 0x70038,%rsi\n mov 0x70040,%rdx\n"
        "   mov 0x70048,%r10\n mov 0x70050,%r8\n mov 0x70058,%r9\n mov 0x70060,%rsp\n"
        "   jmp *0x60000\n"
        ".popsection\n");
_Static_assert(RING1_FAST_DATA == 0x70000 && RING1_FAST_TABLE == 0x60000 && FAST_SLOW == -4096, "above");
_Static_assert(offsetof(struct fast_data, windows) + offsetof(struct fast_window, position) == 0xA8, "above");

/* The code as it goes into frames, at RING1_FAST_CODE. Nothing is copied where there is no room for it. */
void fast_image(struct fast_image *out, void *code, uint64_t room)
{
    const char *start = __start_fast;

    out->bytes = (uint64_t)(__stop_fast - start);
    out->enter = (uint32_t)((const char *)fast_enter - start);
    out->saved = (uint32_t)(fast_saved - start);
    out->committed = (uint32_t)(fast_committed - start);
    out->end = (uint32_t)(fast_end - start);
    if (out->bytes <= room)
        memcpy(code, start, out->bytes);
}

/* The same C for tests, over any memory. */
int64_t fast_try(void *windows, void *files, uint64_t number, uint64_t fd, void *buffer, uint64_t count, uint64_t offset,
                 uint64_t *position)
{
    struct fast_result result = serve(windows, files, (uint32_t)number, (uint32_t)fd, buffer, count, offset);

    *position = result.position;
    return result.value;
}
