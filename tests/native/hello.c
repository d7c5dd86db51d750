/* The smallest useful kernel: prints, asks, sleeps, and ends with exit code 7. */
#include "kernel.h"

#define SLEEP_NS 1000000

/* Sleep until the timer's event: SCHEDOP_block answers with the next upcall. Returns how long it was. */
static uint64_t sleep(void)
{
    int64_t port = CALL(__HYPERVISOR_event_channel_op, EVTCHNOP_bind_virq, VIRQ_TIMER);
    uint64_t before = now_ns();

    CALL(__HYPERVISOR_set_timer_op, before + SLEEP_NS);
    while (!take_event((uint32_t)port))
        CALL(__HYPERVISOR_sched_op, SCHEDOP_block);
    return now_ns() - before;
}

int kernel_main(void)
{
    int64_t version = CALL(__HYPERVISOR_xen_version, XENVER_version);
    int64_t pages = CALL(__HYPERVISOR_memory_op, XENMEM_current_reservation, DOMID_SELF);
    char line[128], *at;

    at = put_text(line, "Hello from ");
    at = put_text(at, start_page->own.name);
    put_text(at, ", a kernel in C.\n");
    print(line);

    at = put_text(line, "ABI ");
    at = put_decimal(at, version >> 16);
    at = put_text(at, ".");
    at = put_decimal(at, version & 0xffff);
    at = put_text(at, ", ");
    at = put_decimal(at, pages);
    put_text(at, " frames");
    say(line);
    print(line);

    if (version >> 16 != RING1_ABI_MAJOR || pages != (int64_t)start_page->xen.nr_pages)
        return 1;
    if (sleep() < SLEEP_NS)
        return 2;
    print("\nGoodbye.\n");
    return 7;
}
