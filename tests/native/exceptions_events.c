/* The event callback: an upcall that interrupts, where it may. */
#include "exceptions.h"

static struct vcpu_info *vcpu(void) { return &((struct shared_info *)HOST(RING1_SHARED_INFO))->vcpu_info[0]; }
static void mask(uint8_t on) { __atomic_store_n(&vcpu()->evtchn_upcall_mask, on, __ATOMIC_SEQ_CST); }
static void send(uint64_t port) { CALL(__HYPERVISOR_event_channel_op, EVTCHNOP_send, port); }
static void signal_ourselves(void) { SYS2(SYS_kill, SYS1(SYS_getpid, 0), RING1_UPCALL_SIGNAL); }

static uint64_t ready(int with_callback)
{
    uint64_t set = 1ull << (RING1_UPCALL_SIGNAL - 1);

    if (with_callback && CALL(__HYPERVISOR_set_callbacks, (uint64_t)(uintptr_t)event_handler, 0))
        word("SETUP");
    SYS4(SYS_rt_sigprocmask, 1 /* SIG_UNBLOCK */, &set, 0, 8);
    return (uint64_t)CALL(__HYPERVISOR_event_channel_op, EVTCHNOP_bind_ipi);
}

static void wait_for(uint64_t count)
{
    uint64_t end = now_ns() + 10000000000ull;

    while (__atomic_load_n(&events, __ATOMIC_SEQ_CST) < count && now_ns() < end) {
    }
    note((int64_t)events);
}

/* It comes while the answer to a call is waited for, or while we spin; the signal was sent before the answer to the next call. */
static void callback(void)
{
    uint64_t port = ready(1);

    for (uint64_t i = 1; i <= 3; i++) {
        send(port);
        wait_for(i);
        note((int64_t)event_saved), note((int64_t)event_masked), note(vcpu()->evtchn_upcall_mask);
        note(vcpu()->evtchn_upcall_pending);
    }
}

static void masked(void)
{
    uint64_t port = ready(1);

    mask(1);
    send(port);
    CALL(__HYPERVISOR_sched_op, SCHEDOP_yield);
    note((int64_t)events), note(vcpu()->evtchn_upcall_pending);
    signal_ourselves(); /* by hand: still masked */
    note((int64_t)events);
    mask(0); /* a store: nobody sees it. We look */
    note((int64_t)events), note(vcpu()->evtchn_upcall_pending);
    signal_ourselves(); /* now it would be right, and is */
    note((int64_t)events), note(vcpu()->evtchn_upcall_pending);
    signal_ourselves(); /* and now there is nothing */
    note((int64_t)events);
}

/* Unblocked, and nobody is registered: the signal is lost, and costs nothing. Then somebody is. */
static void nobody(void)
{
    uint64_t port = ready(0);

    send(port);
    signal_ourselves();
    note((int64_t)events), note(vcpu()->evtchn_upcall_pending);
    note(take_event((uint32_t)port));
    note(CALL(__HYPERVISOR_set_callbacks, (uint64_t)(uintptr_t)event_handler, 0));
    send(port);
    wait_for(1);
    note(CALL(__HYPERVISOR_set_callbacks, 0, 0));
    send(port);
    CALL(__HYPERVISOR_sched_op, SCHEDOP_yield);
    note((int64_t)events);
}

static void on_bad_stack(void)
{
    uint64_t port = ready(1);
    long pid = SYS1(SYS_getpid, 0);

    mask(1);
    send(port);
    mask(0);
    __asm__ volatile("mov $0x1000,%%esp\n syscall" : : "a"(62L), "D"(pid), "S"((long)RING1_UPCALL_SIGNAL) : "rcx", "r11", "memory");
}

int case_events(const char *name)
{
    CASE("events", callback())
    CASE("events-masked", masked())
    CASE("events-nobody", nobody())
    CASE("events-stack", on_bad_stack())
    return 0;
}
