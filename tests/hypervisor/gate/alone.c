/* The cases of tests/native/exceptions_*.c in a process of their own, with an entry code that may have been changed. In the
 * hypervisor's place there is this file: calls are functions, which check nothing, and a second thread answers page faults.
 *
 *     alone CASE    prints what the kernel says, and "ends VALUE" or "double VALUE" for the entry code's last words */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "entry.h"
#include "kernel.h"

#define TRAPS ((struct ring1_traps *)HOST(RING1_TRAP_TABLE))
#define SHARED ((struct shared_info *)HOST(RING1_SHARED_INFO))
#define CHECK(what) ((what) ? (void)0 : failed(#what))

static struct ring1_start_page own_start_page;
struct ring1_start_page *start_page = &own_start_page;
static char pages[8 * RING1_PAGE_SIZE] __attribute__((aligned(RING1_PAGE_SIZE)));
static const char *case_name;
static int ours;

static _Noreturn void failed(const char *what)
{
    fprintf(stderr, "%s\n", what);
    _exit(1);
}

long raw6(long nr, long a, long b, long c, long d, long e, long f) { return system_call(nr, a, b, c, d, e, f); }

long system_call(long nr, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long ret;

    __asm__ volatile("syscall" : "=a"(ret) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return ret;
}

/* ---- page faults */

static void *hypervisor(void *unused)
{
    struct fault fault;

    (void)unused;
    while (recv(ours, &fault, sizeof fault, 0) == sizeof fault) {
        struct verdict verdict = {RING1_BOUNCE, (uint32_t)fault.error, TRAPS->trap[RING1_VECTOR_PAGE_FAULT]};

        if (fault.error & (RING1_PF_UNHANDLED | RING1_PF_DELIVERY)) {
            printf("%s %lu\n", fault.error & RING1_PF_DELIVERY ? "double" : "ends", fault.value);
            _exit(0);
        }
        send(ours, &verdict, sizeof verdict, 0);
    }
    return 0;
}

/* ---- calls */

static void set_traps(const struct trap_info *list)
{
    if (list == HOST(0))
        memset(TRAPS->trap, 0, sizeof TRAPS->trap);
    else
        for (; list->address; list++)
            TRAPS->trap[list->vector] = (uint64_t)list->flags << RING1_TI_SHIFT | list->address;
}

static void send_to_ourselves(void)
{
    struct vcpu_info *v = &SHARED->vcpu_info[0];

    __atomic_fetch_or(&SHARED->evtchn_pending[0], 2, __ATOMIC_SEQ_CST);
    __atomic_fetch_or(&v->evtchn_pending_sel, 1, __ATOMIC_SEQ_CST);
    if (!__atomic_exchange_n(&v->evtchn_upcall_pending, 1, __ATOMIC_SEQ_CST) &&
        !__atomic_load_n(&v->evtchn_upcall_mask, __ATOMIC_SEQ_CST))
        kill(getpid(), RING1_UPCALL_SIGNAL);
}

int64_t hypercall(uint32_t op, const uint64_t *fields, uint32_t n)
{
    (void)n;
    if (op == __HYPERVISOR_set_trap_table)
        set_traps(HOST(fields[0]));
    else if (op == __HYPERVISOR_set_callbacks)
        TRAPS->event = fields[0] ? (uint64_t)RING1_TI_MASK_EVENTS << RING1_TI_SHIFT | fields[0] : 0, TRAPS->failsafe = fields[1];
    else if (op == __HYPERVISOR_stack_switch)
        TRAPS->kernel_sp = fields[1];
    else if (op == __HYPERVISOR_event_channel_op && fields[0] == EVTCHNOP_bind_ipi)
        return 1;
    else if (op == __HYPERVISOR_event_channel_op)
        send_to_ourselves();
    return 0;
}

void hypercall_begin(uint32_t op, const uint64_t *fields, uint32_t n) { hypercall(op, fields, n); }
int64_t hypercall_end(void) { return 0; }
void say(const char *text) { puts(text); }
void print(const char *text) { puts(text); }
uint64_t now_ns(void) { return 0; }

int take_event(uint32_t port)
{
    __atomic_store_n(&SHARED->vcpu_info[0].evtchn_upcall_pending, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&SHARED->vcpu_info[0].evtchn_pending_sel, 0, __ATOMIC_SEQ_CST);
    return (int)(__atomic_exchange_n(&SHARED->evtchn_pending[0], 0, __ATOMIC_SEQ_CST) >> port & 1);
}

/* ---- text */

uint32_t length(const char *text) { return (uint32_t)strlen(text); }
int same(const char *a, const char *b) { return !strcmp(a, b); }
const char *option(const char *key) { return same(key, "case=") ? case_name : 0; }
char *put_text(char *at, const char *text) { return stpcpy(at, text); }
char *put_decimal(char *at, int64_t value) { return at + sprintf(at, "%ld", value); }

static void own_page(uint64_t va)
{
    CHECK(mmap(HOST(va), RING1_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) ==
          HOST(va));
}

int main(int argc, char **argv)
{
    const struct rlimit no_core = {0, 0};
    pthread_t thread;
    sigset_t upcall;
    int pair[2];

    CHECK(argc == 2);
    case_name = argv[1];
    setvbuf(stdout, 0, _IOLBF, 0);
    setrlimit(RLIMIT_CORE, &no_core);
    own_page(RING1_TRAP_TABLE), own_page(RING1_SHARED_INFO);
    own_start_page.xen.pt_base = VIRT(pages), own_start_page.xen.nr_pt_frames = 1;
    CHECK(!mprotect(pages, RING1_PAGE_SIZE, PROT_READ));
    sigemptyset(&upcall), sigaddset(&upcall, RING1_UPCALL_SIGNAL);
    sigprocmask(SIG_BLOCK, &upcall, 0);
    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
    ours = pair[0];
    CHECK(!pthread_create(&thread, 0, hypervisor, 0));
    CHECK(!traps_install(RING1_KERNEL_WINDOW, RING1_NR_WINDOWS * RING1_SPACE_BYTES, pair[1]));
    return kernel_main();
}
