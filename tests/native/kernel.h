/* What the kernels of these tests are made of, written from ABI.md alone: system calls, hypercalls, console, events, time. */
#ifndef KERNEL_H
#define KERNEL_H

#include "io/ring1_io.h"
#include "ring1_message.h"

enum { /* Linux's, x86-64 */
    SYS_read = 0,
    SYS_clock_gettime = 228,
    SYS_exit_group = 231,
    SYS_mq_timedsend = 242,
    SYS_mq_timedreceive = 243,
    SYS_ppoll = 271,
};
enum { EPERM = 1, EINTR = 4, ENOSYS = 38 };

#define HOST(va) ((void *)(uintptr_t)(RING1_KERNEL_WINDOW + (va))) /* where this process sees a guest-virtual address */
#define VIRT(p) ((uint64_t)(uintptr_t)(p) - RING1_KERNEL_WINDOW)   /* and the other way */

extern struct ring1_start_page *start_page;

/* The kernel proper; its value is the domain's exit code. */
int kernel_main(void);

long system_call(long nr, long a, long b, long c, long d, long e, long f);
#define SYS1(nr, a) system_call(nr, (long)(a), 0, 0, 0, 0, 0)
#define SYS2(nr, a, b) system_call(nr, (long)(a), (long)(b), 0, 0, 0, 0)
#define SYS3(nr, a, b, c) system_call(nr, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define SYS4(nr, a, b, c, d) system_call(nr, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define SYS5(nr, a, b, c, d, e) system_call(nr, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)
#define SYS6(nr, a, b, c, d, e, f) system_call(nr, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

/* A hypercall of integers, the sub-operation first: its first result, 0 where it has none, or minus the status. */
int64_t hypercall(uint32_t op, const uint64_t *fields, uint32_t n);
#define CALL(op, ...) hypercall(op, (const uint64_t[]){__VA_ARGS__}, sizeof((const uint64_t[]){__VA_ARGS__}) / sizeof(uint64_t))
/* The two halves of one: it is on its way, and is waited for. Nothing else may be called between them. */
void hypercall_begin(uint32_t op, const uint64_t *fields, uint32_t n);
int64_t hypercall_end(void);
_Noreturn void shut_down(uint32_t reason, uint32_t code, const char *why);

void say(const char *text);   /* one line into the hypervisor's log */
void print(const char *text); /* on the console; what it has no room for is dropped */

/* The event was pending on `port`: it is taken. Events of other ports are taken with it, and nobody looks at them here. */
int take_event(uint32_t port);
uint64_t now_ns(void); /* system time */

uint32_t length(const char *text);
int same(const char *a, const char *b);
const char *option(const char *key); /* what follows "key=" on the command line; 0: it is not there */
char *put_text(char *at, const char *text); /* each returns the end, where a 0 byte stands */
char *put_decimal(char *at, int64_t value);

#endif
