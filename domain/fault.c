/* The guest's handler of page faults, and the two accesses that survive them.
 *
 * As in Linux (copy_from_user): the handler looks at which instruction faulted. If it is an accessor's, it goes on behind it
 * with the error code as the result. There is nothing to set up before an access and nothing to undo after it, and no word
 * that says that one is under way. A fault of any other instruction is a mistake of this kernel's and ends it with a reason. */
#define _GNU_SOURCE
#include "guest.h"

#include <stddef.h>
#include <string.h>

struct frame { /* hypervisor/public/traps.py */
    uint64_t error, rip, cs, rflags, rsp, ss;
};
_Static_assert(sizeof(struct frame) == 48, "traps.FRAME_BYTES");
_Static_assert(offsetof(struct frame, rip) == 8, "page_fault looks at 16(%rsp) after a push");

/* What is sent when this kernel ends: a request that Python has packed, with room for three numbers in hexadecimal. */
static struct {
    int32_t request, reply;
    uint32_t size, cr2_at, error_at, rip_at;
    const volatile uint64_t *cr2;
    char message[256];
} last_words;

extern const char page_fault[];

/* int64_t gva_copy(void *to, const void *from, uint64_t size): 0, or GVA_FAULT and the error code.
 *
 * int64_t gva_store(void *to, uint64_t value): the same, of one store, which the hypervisor can do in our place (vm_assist).
 *
 * `rep movsb` has its registers right when it faults. The result is in rax, which neither uses itself. */
__asm__(".text\n"
        ".globl gva_copy\n.hidden page_fault\n.globl page_fault\n"
        "gva_copy: mov %rdx,%rcx\n"
        "   xor %eax,%eax\n"
        ".Laccess: rep movsb\n"
        ".Ldone: ret\n"
        ".globl gva_store\n"
        "gva_store: xor %eax,%eax\n"
        ".Lstore: mov %rsi,(%rdi)\n"
        "   ret\n"
        "page_fault: push %rax\n"
        "   lea .Laccess(%rip),%rax\n"
        "   cmp %rax,16(%rsp)\n"
        "   je 2f\n"
        "   lea .Lstore(%rip),%rax\n"
        "   cmp %rax,16(%rsp)\n"
        "   jne 1f\n"
        "2: lea .Ldone(%rip),%rax\n"
        "   mov %rax,16(%rsp)\n"
        "   mov 8(%rsp),%eax\n"
        "   or $0x100,%eax\n" /* GVA_FAULT */
        "   add $16,%rsp\n"
        "   iretq\n"
        "1: lea 8(%rsp),%rdi\n"
        "   and $-16,%rsp\n"
        "   call page_fault_ends\n");
_Static_assert(GVA_FAULT == 0x100, "in the assembler above");

static void hexadecimal(char *at, int digits, uint64_t value)
{
    while (digits--) {
        at[digits] = "0123456789abcdef"[value & 15];
        value >>= 4;
    }
}

/* Whatever Python was doing stays half done: nothing but the last hypercall is made. */
__attribute__((used, noreturn)) void page_fault_ends(const struct frame *frame)
{
    char answer[256];

    hexadecimal(last_words.message + last_words.cr2_at, 16, *last_words.cr2);
    hexadecimal(last_words.message + last_words.error_at, 2, frame->error);
    hexadecimal(last_words.message + last_words.rip_at, 16, frame->rip);
    hypercall_trap(last_words.request, last_words.reply, last_words.message, last_words.size, answer, sizeof answer);
    hypercall_answer(last_words.reply, answer, sizeof answer); /* the first may be that of an event that was posted */
    __builtin_trap();
}

/* The handler's address, for SetTrapTable. `message`: at most 256 bytes; the offsets are of 16, 2 and 16 digits in it. */
uint64_t fault_handler(int32_t request, int32_t reply, const void *message, uint32_t size, uint32_t cr2_at, uint32_t error_at,
                       uint32_t rip_at, const void *cr2)
{
    if (size > sizeof last_words.message)
        return 0;
    last_words.request = request, last_words.reply = reply, last_words.size = size, last_words.cr2 = cr2;
    last_words.cr2_at = cr2_at, last_words.error_at = error_at, last_words.rip_at = rip_at;
    memcpy(last_words.message, message, size);
    return (uint64_t)(uintptr_t)page_fault;
}
