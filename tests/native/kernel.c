/* See kernel.h. Nothing here has an address in initialized data: the code runs RING1_KERNEL_WINDOW above where it is linked. */
#include "kernel.h"

struct ring1_start_page *start_page;
static uint32_t sequence;

/* Entered as a C function is, on the stack at the end of the reservation. */
_Noreturn void start(struct ring1_start_page *page)
{
    start_page = page;
    shut_down(SHUTDOWN_poweroff, (uint32_t)kernel_main(), "");
}

/* What answered is no hypervisor of ours. */
static _Noreturn void stop(void)
{
    for (;;)
        SYS1(SYS_exit_group, 99);
}

long system_call(long nr, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long ret;

    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return ret;
}

/* ---- hypercalls: one message out, its reply in */

static void ask(const uint8_t *message, uint32_t size)
{
    while (SYS5(SYS_mq_timedsend, RING1_FD_REQUEST, message, size, 0, 0) == -EINTR) {
    }
}

/* Until there is a reply; then its buffer is touched. A system call is no access that the hypervisor fills a page for, the
 * host mappings of our own stack may be thrown out by the very call that we wait for, and a reply that cannot be stored is
 * lost. Nothing throws them out any more once it is there. */
static void wait_for_reply(volatile uint8_t *buffer)
{
    struct { int32_t fd; int16_t events, revents; } one = {RING1_FD_REPLY, 1 /* POLLIN */, 0};

    while (SYS5(SYS_ppoll, &one, 1, 0, 0, 8) != 1)
        *(volatile int16_t *)&one.revents = 0;
    buffer[0] = buffer[RING1_MESSAGE_BYTES - 1] = 0;
}

int64_t hypercall_end(void)
{
    uint8_t reply[RING1_MESSAGE_BYTES];
    int64_t count, item[3] = {0, 0, 0}; /* sequence, status, the first result */
    uint32_t at = 0;
    long got;

    wait_for_reply(reply);
    while ((got = SYS5(SYS_mq_timedreceive, RING1_FD_REPLY, reply, sizeof reply, 0, 0)) == -EINTR) {
    }
    if (got < 0 || ring1_get(reply, (uint32_t)got, &at, &count))
        stop();
    for (int64_t i = 0; i < count && i < 3; i++)
        if (ring1_get(reply, (uint32_t)got, &at, &item[i]))
            stop();
    if (count < 2 || item[0] != sequence)
        stop();
    return item[1] ? -item[1] : item[2];
}

static int64_t trap(const uint8_t *message, uint32_t size)
{
    ask(message, size);
    return hypercall_end();
}

void hypercall_begin(uint32_t op, const uint64_t *fields, uint32_t n)
{
    uint8_t message[RING1_MESSAGE_BYTES];

    ask(message, ring1_request(message, op, ++sequence, fields, n, 0));
}

int64_t hypercall(uint32_t op, const uint64_t *fields, uint32_t n)
{
    hypercall_begin(op, fields, n);
    return hypercall_end();
}

static uint8_t at_most(const char *text)
{
    uint32_t size = length(text);

    return (uint8_t)(size < RING1_CONSOLE_BYTES ? size : RING1_CONSOLE_BYTES);
}

_Noreturn void shut_down(uint32_t reason, uint32_t code, const char *why)
{
    uint8_t message[RING1_MESSAGE_BYTES];
    uint64_t fields[] = {SCHEDOP_shutdown, reason, code};
    uint32_t size = ring1_request(message, __HYPERVISOR_sched_op, ++sequence, fields, 3, 1);

    size += ring1_put_string(message + size, 0xd9, why, at_most(why));
    for (;;)
        trap(message, size);
}

void say(const char *text)
{
    uint8_t message[RING1_MESSAGE_BYTES];
    uint64_t fields[] = {CONSOLEIO_write};
    uint32_t size = ring1_request(message, __HYPERVISOR_console_io, ++sequence, fields, 1, 1);

    trap(message, size + ring1_put_string(message + size, 0xc4, text, at_most(text)));
}

/* ---- console, events, time */

void print(const char *text)
{
    struct xencons_interface *c = HOST(RING1_VIRT_BASE + start_page->xen.console_pfn * RING1_PAGE_SIZE);
    uint32_t cons, prod;

    if (!start_page->xen.console_evtchn) {
        say(text);
        return;
    }
    prod = c->out_prod;
    cons = __atomic_load_n(&c->out_cons, __ATOMIC_ACQUIRE);
    for (; *text && prod - cons < sizeof c->out; text++)
        c->out[prod++ % sizeof c->out] = *text;
    __atomic_store_n(&c->out_prod, prod, __ATOMIC_RELEASE);
    CALL(__HYPERVISOR_event_channel_op, EVTCHNOP_send, start_page->xen.console_evtchn);
}

int take_event(uint32_t port)
{
    struct shared_info *s = HOST(RING1_SHARED_INFO);
    int found = 0;
    uint64_t sel;

    __atomic_store_n(&s->vcpu_info[0].evtchn_upcall_pending, 0, __ATOMIC_SEQ_CST);
    sel = __atomic_exchange_n(&s->vcpu_info[0].evtchn_pending_sel, 0, __ATOMIC_SEQ_CST);
    for (uint32_t word = 0; word < 64; word++) {
        uint64_t bits;

        if (!(sel >> word & 1))
            continue;
        bits = __atomic_load_n(&s->evtchn_pending[word], __ATOMIC_SEQ_CST);
        bits &= ~__atomic_load_n(&s->evtchn_mask[word], __ATOMIC_SEQ_CST);
        __atomic_fetch_and(&s->evtchn_pending[word], ~bits, __ATOMIC_SEQ_CST);
        found |= word == port / 64 && (bits >> port % 64 & 1);
    }
    return found;
}

uint64_t now_ns(void)
{
    int64_t time[2] = {0, 0};

    SYS2(SYS_clock_gettime, 1 /* CLOCK_MONOTONIC */, time);
    return (uint64_t)time[0] * 1000000000 + (uint64_t)time[1] - start_page->own.boot_ns;
}

/* ---- text */

uint32_t length(const char *text)
{
    uint32_t n = 0;

    while (text[n])
        n++;
    return n;
}

int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

const char *option(const char *key)
{
    for (const char *at = start_page->xen.cmd_line; *at; at++) {
        uint32_t n = 0;

        while (key[n] && at[n] == key[n])
            n++;
        if (!key[n])
            return at + n;
    }
    return 0;
}

char *put_text(char *at, const char *text)
{
    while (*text)
        *at++ = *text++;
    *at = 0;
    return at;
}

char *put_decimal(char *at, int64_t value)
{
    char digits[24];
    uint32_t n = 0;
    uint64_t rest = value < 0 ? -(uint64_t)value : (uint64_t)value;

    do
        digits[n++] = (char)('0' + rest % 10);
    while (rest /= 10);
    if (value < 0)
        *at++ = '-';
    while (n)
        *at++ = digits[--n];
    *at = 0;
    return at;
}

/* What a compiler calls for copies of structures, also in a freestanding program. */
void *memcpy(void *to, const void *from, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((char *)to)[i] = ((const char *)from)[i];
    return to;
}

void *memset(void *to, int value, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((char *)to)[i] = (char)value;
    return to;
}
