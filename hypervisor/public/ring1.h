/* ring1's contract for C: the numbers and records of hypervisor/public.
 *
 * For freestanding programs: needs the compiler's <stddef.h> and <stdint.h> and nothing else. ABI.md says what everything
 * means and who writes what; ring1_mmu.h has page tables, ring1_message.h writes hypercalls down, io/ring1_io.h has the
 * devices. Names are Xen's where Xen has the thing, RING1_ where it is ours. tests/contracts/test_header.py compares
 * every value here with the Python, and ABI.md with both.
 *
 * x86-64, little-endian. What the other side may be changing is read by __atomic_load_n, once; only the copy is believed. */
#ifndef RING1_H
#define RING1_H

#include <stddef.h>
#include <stdint.h>

#define RING1_SIZE(name, size) _Static_assert(sizeof(struct name) == (size), "size of " #name)
#define RING1_AT(name, field, at) _Static_assert(offsetof(struct name, field) == (at), "offset of " #name "." #field)

#define RING1_ABI_MAJOR 0
#define RING1_ABI_MINOR 1

/* ---- where everything lies: guest-virtual addresses; va is seen at host address RING1_KERNEL_WINDOW + va */

#define RING1_PAGE_SIZE 4096
#define RING1_PAGE_SHIFT 12
#define RING1_SPACE_BYTES 0x8000000000
#define RING1_KERNEL_WINDOW 0x200000000000
#define RING1_NR_WINDOWS 16                /* side by side, one for each root that is loaded; the first is the boot root's */
#define RING1_VIRT_BASE 0x100000           /* the reservation at start: frame pfn at VIRT_BASE + pfn * 4096 */
#define RING1_GRANT_BASE 0x4000000000      /* from here to HYPERVISOR_VIRT_START a domain maps what it was granted */
#define RING1_HYPERVISOR_VIRT_START 0x7ffc000000 /* the top 64 MB */
#define RING1_MONITOR_CODE 0x7ffc000000
#define RING1_COMMANDS 0x7ffc001000
#define RING1_COMMAND_PAGES 4
#define RING1_TRAP_TABLE 0x7ffc004000      /* struct ring1_traps, read-only: what the entry code of exceptions goes by */
#define RING1_M2P 0x7ffc100000             /* u64 pfn of every machine frame, read-only */
#define RING1_M2P_BYTES 0x3e00000          /* at most */
#define RING1_SHARED_INFO 0x7ffffff000     /* the last page, read-write */

#define RING1_SHARED_INFO_PFN 0
#define RING1_START_INFO_PFN 1
#define RING1_STORE_PFN 2
#define RING1_CONSOLE_PFN 3
#define RING1_GRANT_PFN 4
#define RING1_GRANT_FRAMES 8
#define RING1_GRANT_ENTRIES 4096
#define RING1_KERNEL_PFN 12                /* the first frame that is the kernel's own */

#define RING1_FD_REQUEST 8                 /* POSIX queue: hypercalls out */
#define RING1_FD_REPLY 9                   /* POSIX queue: replies in */
#define RING1_FD_UPCALL 10                 /* signalfd of RING1_UPCALL_SIGNAL */
#define RING1_FD_DESCRIPTORS 11            /* driver domains only */
#define RING1_FD_FAULT 12                  /* page faults; the entry code's */
#define RING1_UPCALL_SIGNAL 12             /* SIGUSR2, blocked for good */

/* ---- limits */

#define RING1_MESSAGE_BYTES 256
#define RING1_MESSAGES 2
#define RING1_NR_EVENT_CHANNELS 4096
#define RING1_MAX_PORTS 1024
#define RING1_MAX_MAPTRACK 8192
#define RING1_MAX_BATCH 512
#define RING1_NAME_BYTES 32
#define RING1_CONSOLE_BYTES 200
#define RING1_MAX_ORDER 9
#define RING1_MAX_EXCHANGE 512
#define RING1_MAX_TRAPS 256
#define RING1_MAX_WEIGHT 65535
#define RING1_MAX_CAP 100 /* percent of one CPU */
#define RING1_MAX_WARP_US 1000000
#define RING1_MIN_PERIOD_NS 1000000
#define RING1_TIME_STABLE 1                /* vcpu_time_info.flags: the record holds on every CPU */
#define RING1_INVALID_PFN 0xffffffffffffffff

#define DOMID_FIRST_RESERVED 0x7ff0
#define DOMID_SELF 0x7ff0
#define DOMID_INVALID 0x7ff4

#define VIRQ_TIMER 0
#define VIRQ_DEBUG 1
#define VIRQ_CONSOLE 2                     /* dom0 */
#define VIRQ_DOM_EXC 3                     /* dom0 */
#define RING1_NR_VIRQS 24

enum {                                     /* statuses of a reply; 0 is success */
    XEN_EPERM = 1,
    XEN_ENOENT = 2,
    XEN_ESRCH = 3,
    XEN_E2BIG = 7,
    XEN_EAGAIN = 11,
    XEN_ENOMEM = 12,
    XEN_EFAULT = 14,
    XEN_EBUSY = 16,
    XEN_EEXIST = 17,
    XEN_EINVAL = 22,
    XEN_ENOSPC = 28,
    XEN_ENOSYS = 38,
};

/* ---- hypercalls: the number, then the sub-operation (its first field), then the fields */

#define __HYPERVISOR_set_trap_table 0      /* no sub-operation: u64 address */
#define __HYPERVISOR_mmu_update 1          /* no sub-operation: u64 address, u32 count, u64 done, u16 domid -> how many */
#define __HYPERVISOR_set_gdt 2             /* no sub-operation: u64 address, u32 entries */
#define __HYPERVISOR_stack_switch 3        /* no sub-operation: u16 ss, u64 sp */
#define __HYPERVISOR_set_callbacks 4       /* no sub-operation: u64 event, u64 failsafe */
#define __HYPERVISOR_update_descriptor 10  /* no sub-operation: u64 address, u64 descriptor */
#define __HYPERVISOR_update_va_mapping 14  /* no sub-operation: u64 va, u64 value, u64 flags */
#define __HYPERVISOR_mmuext_op 26          /* no sub-operation: u64 address, u32 count, u64 done, u16 domid -> how many */

#define __HYPERVISOR_platform_op 7
#define XENPF_settime64 62                 /* u64 sec, u32 nsec, u64 system_time; dom0's */

#define __HYPERVISOR_memory_op 12
#define XENMEM_increase_reservation 0      /* u64 address, u32 count, u32 order -> how many were done */
#define XENMEM_decrease_reservation 1      /* u64 address, u32 count, u32 order -> how many were done */
#define XENMEM_current_reservation 3       /* u16 domid -> frames */
#define XENMEM_maximum_reservation 4       /* u16 domid -> frames */
#define XENMEM_populate_physmap 6          /* u64 address, u32 count, u32 order -> how many were done */
#define XENMEM_exchange 11                 /* u64 in_address, u32 in_count, u32 in_order, the same of out -> how many */
#define XENMEM_machphys_mapping 12         /* -> start, end, max_mfn */

#define __HYPERVISOR_vcpu_op 24
#define VCPUOP_get_runstate_info 4         /* -> state, running, runnable, blocked, offline */
#define VCPUOP_set_periodic_timer 6        /* u64 period_ns */
#define VCPUOP_stop_periodic_timer 7
#define RING1_VCPUOP_set_virtual_timer 1000 /* u64 deadline_ns */

#define __HYPERVISOR_multicall 13          /* no sub-operation: u64 address, u32 count */
#define __HYPERVISOR_set_timer_op 15       /* no sub-operation: u64 deadline_ns */

#define __HYPERVISOR_xen_version 17
#define XENVER_version 0                   /* -> major << 16 | minor */
#define XENVER_extraversion 1              /* -> text */
#define XENVER_pagesize 7                  /* -> bytes */

#define __HYPERVISOR_console_io 18
#define CONSOLEIO_write 0                  /* bytes data */

#define __HYPERVISOR_vm_assist 21          /* no sub-operation: u32 cmd, u32 type */
#define __HYPERVISOR_grant_table_op 20
#define GNTTABOP_map_grant_ref 0           /* u64 address, u32 count -> how many with status 0 */
#define GNTTABOP_unmap_grant_ref 1         /* u64 address, u32 count -> how many with status 0 */
#define GNTTABOP_setup_table 2             /* u16 domid, u32 nr_frames, u64 address */
#define GNTTABOP_transfer 4                /* u64 address, u32 count -> how many with status 0 */
#define GNTTABOP_copy 5                    /* u64 address, u32 count -> how many with status 0 */
#define GNTTABOP_query_size 6              /* u16 domid -> nr_frames, max_nr_frames */

#define __HYPERVISOR_sched_op 29
#define SCHEDOP_yield 0
#define SCHEDOP_block 1
#define SCHEDOP_shutdown 2                 /* u32 reason, u32 code, text why; no reply */
#define SCHEDOP_poll 3                     /* u64 address, u32 count, u64 timeout_ns */

#define __HYPERVISOR_event_channel_op 32
#define EVTCHNOP_bind_interdomain 0        /* u16 remote_domid, u32 remote_port -> port */
#define EVTCHNOP_bind_virq 1               /* u32 virq -> port */
#define EVTCHNOP_close 3                   /* u32 port */
#define EVTCHNOP_send 4                    /* u32 port */
#define EVTCHNOP_status 5                  /* u16 domid, u32 port -> state, remote_domid, remote_port, virq */
#define EVTCHNOP_alloc_unbound 6           /* u16 domid, u16 remote_domid -> port */
#define EVTCHNOP_bind_ipi 7                /* -> port */
#define EVTCHNOP_unmask 9                  /* u32 port */
#define EVTCHNOP_reset 10

#define __HYPERVISOR_sysctl 35             /* dom0's */
#define XEN_SYSCTL_readconsole 1           /* u64 address, u32 size -> length */
#define XEN_SYSCTL_physinfo 3              /* u64 address, u32 size -> length */
#define XEN_SYSCTL_getdomaininfolist 6     /* u64 address, u32 size -> length */
#define RING1_SYSCTL_ledger 1000           /* u64 address, u32 size -> length */
#define RING1_SYSCTL_process_memory 1001   /* u16 domid -> KiB */

#define __HYPERVISOR_domctl 36             /* dom0's */
#define XEN_DOMCTL_createdomain 1          /* text name, u32 nr_frames, u32 flags, u32 nr_descriptors, text entry -> domid */
#define XEN_DOMCTL_destroydomain 2         /* u16 domid */
#define XEN_DOMCTL_pausedomain 3           /* u16 domid */
#define XEN_DOMCTL_unpausedomain 4         /* u16 domid */
#define XEN_DOMCTL_getdomaininfo 5         /* u16 domid -> 16 values */
#define XEN_DOMCTL_getmemlist 6            /* u16 domid, u32 first, u32 count, u64 address -> how many */
#define XEN_DOMCTL_max_mem 11              /* u16 domid, u32 max_frames */
#define XEN_DOMCTL_getvcpuinfo 14          /* u16 domid -> state, scheduled, cpu, pinned, ns running, runnable, blocked, offline */
#define XEN_DOMCTL_scheduler_op 16         /* u16 domid, u32 cmd, u32 weight, u32 cap, u32 warp_us, u32 warp_limit_us,
                                              u32 unwarp_us -> the five that hold */
#define RING1_DOMCTL_map_foreign 1000      /* u16 domid, u32 pfn, u32 count, u64 address */
#define RING1_DOMCTL_unmap_foreign 1001    /* u64 address, u32 count */
#define RING1_DOMCTL_launch_info 1002      /* u16 domid, u64 root, u64 entry */

#define RING1_OP_callring 48               /* __HYPERVISOR_arch_0 of Xen */
#define RING1_CALLRING_setup 0             /* u64 address */
#define RING1_CALLRING_kick 1              /* the doorbell: replies when everything in the ring was answered */

enum {
    EVTCHNSTAT_closed = 0,
    EVTCHNSTAT_unbound = 1,
    EVTCHNSTAT_interdomain = 2,
    EVTCHNSTAT_virq = 4,
    EVTCHNSTAT_ipi = 5,
};
enum {
    SHUTDOWN_poweroff = 0,
    SHUTDOWN_reboot = 1,
    SHUTDOWN_suspend = 2,
    SHUTDOWN_crash = 3,
    SHUTDOWN_watchdog = 4,
};
enum {
    RING1_CREATE_NONE = 0,
    RING1_CREATE_NATIVE = 1,
    RING1_CREATE_DRIVER = 2,
    RING1_CREATE_DEBUG = 4,
    RING1_CREATE_UNFILTERED = 8,
};

enum {
    XEN_DOMCTL_SCHEDOP_putinfo = 0,
    XEN_DOMCTL_SCHEDOP_getinfo = 1,
    RUNSTATE_running = 0,
    RUNSTATE_runnable = 1,
    RUNSTATE_blocked = 2,
    RUNSTATE_offline = 3,
};

struct multicall_entry {
    uint64_t op;
    int64_t result;                        /* OUT: the value, or minus a status */
    uint64_t args[6];                      /* the sub-operation where there is one, the fields, zeros */
};
RING1_SIZE(multicall_entry, 64); RING1_AT(multicall_entry, op, 0); RING1_AT(multicall_entry, result, 8);
RING1_AT(multicall_entry, args, 16);

/* The hypercall ring: io/ring.h with requests of multicall_entry and these responses, in order. */
#define RING1_CALLRING_NR_ENTRIES 32

struct ring1_callring_answer {
    uint64_t op;
    int64_t result;
};
RING1_SIZE(ring1_callring_answer, 16); RING1_AT(ring1_callring_answer, op, 0); RING1_AT(ring1_callring_answer, result, 8);

/* ---- start of day: the page that the kernel is entered with */

#define RING1_MAGIC "ring1-0.1-x86_64"
#define RING1_CMDLINE_BYTES 1024
#define RING1_EXTENSION 2048
#define SIF_PRIVILEGED 1
#define SIF_INITDOMAIN 2

struct start_info {
    char magic[32];
    uint64_t nr_pages;
    uint64_t shared_info;                  /* guest-virtual */
    uint32_t flags;                        /* SIF_* */
    uint64_t store_pfn;
    uint32_t store_evtchn;
    uint64_t console_pfn;
    uint32_t console_evtchn;
    uint64_t pt_base, nr_pt_frames;        /* the boot page tables, guest-virtual, the root first; what follows is free */
    uint64_t mfn_list;                     /* u64 mfn of every pfn, guest-virtual */
    uint64_t mod_start, mod_len;           /* guest-virtual; 0 for a native kernel */
    char cmd_line[RING1_CMDLINE_BYTES];
    uint64_t first_p2m_pfn, nr_p2m_frames; /* 0 */
};
RING1_SIZE(start_info, 1168); RING1_AT(start_info, magic, 0); RING1_AT(start_info, nr_pages, 32);
RING1_AT(start_info, shared_info, 40); RING1_AT(start_info, flags, 48); RING1_AT(start_info, store_pfn, 56);
RING1_AT(start_info, store_evtchn, 64); RING1_AT(start_info, console_pfn, 72); RING1_AT(start_info, console_evtchn, 80);
RING1_AT(start_info, pt_base, 88); RING1_AT(start_info, nr_pt_frames, 96); RING1_AT(start_info, mfn_list, 104);
RING1_AT(start_info, mod_start, 112); RING1_AT(start_info, mod_len, 120); RING1_AT(start_info, cmd_line, 128);
RING1_AT(start_info, first_p2m_pfn, 1152); RING1_AT(start_info, nr_p2m_frames, 1160);

struct ring1_start_info {                  /* ring1's own part, at RING1_EXTENSION of the same page */
    uint64_t virt_base;                    /* RING1_VIRT_BASE */
    uint64_t window;                       /* host address of guest-virtual 0 */
    uint32_t domid;
    int32_t request_mqd, reply_mqd, upcall_fd;
    int32_t descriptors_fd;                /* -1 where there is none */
    uint32_t pad;
    uint64_t boot_ns;                      /* CLOCK_MONOTONIC at which the hypervisor booted */
    uint64_t grant_table;                  /* guest-virtual */
    uint64_t shared_info;                  /* as above */
    uint32_t nr_grant_entries, pad1;
    char name[64];
    char entry[64];                        /* "" for a native kernel */
    uint64_t max_pages;                    /* pfns that the boot tables and mfn_list have room for */
};
RING1_SIZE(ring1_start_info, 208); RING1_AT(ring1_start_info, virt_base, 0); RING1_AT(ring1_start_info, window, 8);
RING1_AT(ring1_start_info, domid, 16); RING1_AT(ring1_start_info, request_mqd, 20);
RING1_AT(ring1_start_info, reply_mqd, 24); RING1_AT(ring1_start_info, upcall_fd, 28);
RING1_AT(ring1_start_info, descriptors_fd, 32); RING1_AT(ring1_start_info, boot_ns, 40);
RING1_AT(ring1_start_info, grant_table, 48); RING1_AT(ring1_start_info, shared_info, 56);
RING1_AT(ring1_start_info, nr_grant_entries, 64); RING1_AT(ring1_start_info, name, 72);
RING1_AT(ring1_start_info, entry, 136); RING1_AT(ring1_start_info, max_pages, 200);

struct ring1_start_page {
    struct start_info xen;
    uint8_t pad[RING1_EXTENSION - sizeof(struct start_info)];
    struct ring1_start_info own;
};
RING1_SIZE(ring1_start_page, 2256); RING1_AT(ring1_start_page, own, RING1_EXTENSION);

/* ---- shared_info: the page that the hypervisor and the kernel both write, at RING1_SHARED_INFO and in frame 0 */

struct vcpu_time_info {                    /* an odd version: it is being written */
    uint32_t version, pad0;
    uint64_t tsc_timestamp, system_time;
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags, pad1[2];
};
RING1_SIZE(vcpu_time_info, 32); RING1_AT(vcpu_time_info, version, 0); RING1_AT(vcpu_time_info, tsc_timestamp, 8);
RING1_AT(vcpu_time_info, system_time, 16); RING1_AT(vcpu_time_info, tsc_to_system_mul, 24);
RING1_AT(vcpu_time_info, tsc_shift, 28); RING1_AT(vcpu_time_info, flags, 29);

struct vcpu_info {
    uint8_t evtchn_upcall_pending;         /* the hypervisor sets it, the kernel clears it */
    uint8_t evtchn_upcall_mask;            /* the kernel's; SCHEDOP_block clears it */
    uint8_t pad[2];
    uint32_t hv_cpu;                       /* the host CPU, plus 1, from which it last set evtchn_upcall_pending: a hint */
    uint64_t evtchn_pending_sel;           /* a bit for each word of evtchn_pending */
    uint64_t cr2, arch_pad;                /* of the last page fault that was bounced: an offset from KERNEL_WINDOW */
    struct vcpu_time_info time;
};
RING1_SIZE(vcpu_info, 64); RING1_AT(vcpu_info, evtchn_upcall_pending, 0); RING1_AT(vcpu_info, evtchn_upcall_mask, 1);
RING1_AT(vcpu_info, hv_cpu, 4); RING1_AT(vcpu_info, evtchn_pending_sel, 8);
RING1_AT(vcpu_info, cr2, 16); RING1_AT(vcpu_info, arch_pad, 24); RING1_AT(vcpu_info, time, 32);

struct shared_info {
    struct vcpu_info vcpu_info[32];        /* a domain has one virtual CPU: the first */
    uint64_t evtchn_pending[64];           /* port p is bit p % 64 of word p / 64 */
    uint64_t evtchn_mask[64];
    uint32_t wc_version, wc_sec, wc_nsec, wc_sec_hi; /* Unix time of system time 0 */
    uint64_t arch[6];
    uint64_t window;                       /* ring1's own: host address of guest-virtual 0 in the current space */
};
RING1_SIZE(shared_info, 3144); RING1_AT(shared_info, vcpu_info, 0); RING1_AT(shared_info, evtchn_pending, 2048);
RING1_AT(shared_info, evtchn_mask, 2560); RING1_AT(shared_info, wc_version, 3072); RING1_AT(shared_info, wc_sec, 3076);
RING1_AT(shared_info, wc_nsec, 3080); RING1_AT(shared_info, wc_sec_hi, 3084); RING1_AT(shared_info, arch, 3088);
RING1_AT(shared_info, window, 3136);

/* ---- grants */

enum {
    GTF_invalid = 0,
    GTF_permit_access = 1,
    GTF_accept_transfer = 2,
    GTF_type_mask = 3,
    GTF_readonly = 4,           /* of permit_access */
    GTF_transfer_committed = 4, /* of accept_transfer */
    GTF_transfer_completed = 8,
    GTF_reading = 8,
    GTF_writing = 16,
};
enum {
    GNTMAP_host_map = 2,
    GNTMAP_readonly = 4,
};
enum {
    GNTST_okay = 0,
    GNTST_general_error = -1,
    GNTST_bad_domain = -2,
    GNTST_bad_gntref = -3,
    GNTST_bad_handle = -4,
    GNTST_bad_virt_addr = -5,
    GNTST_no_device_space = -7,
    GNTST_permission_denied = -8,
    GNTST_bad_page = -9,
    GNTST_bad_copy_arg = -10,
    GNTST_address_too_big = -11,
    GNTST_eagain = -12,
    GNTST_no_space = -13,
};
enum {
    GNTCOPY_source_gref = 1,
    GNTCOPY_dest_gref = 2,
};
#define RING1_GREF_CONSOLE 0
#define RING1_GREF_XENSTORE 1
#define RING1_NR_RESERVED_ENTRIES 8

struct grant_entry_v1 {                    /* one 64-bit word: write domid and frame first, flags last */
    uint16_t flags, domid;
    uint32_t frame;                        /* an mfn of the granter; of accept_transfer, OUT: the one that came */
};
RING1_SIZE(grant_entry_v1, 8); RING1_AT(grant_entry_v1, flags, 0); RING1_AT(grant_entry_v1, domid, 2);
RING1_AT(grant_entry_v1, frame, 4);

struct gnttab_map_grant_ref {
    uint64_t host_addr;                    /* guest-virtual, page-aligned, in [GRANT_BASE, HYPERVISOR_VIRT_START) */
    uint32_t flags, ref;
    uint16_t dom;
    int16_t status;                        /* OUT */
    uint32_t handle;                       /* OUT */
    uint64_t dev_bus_addr;                 /* OUT: the mfn */
};
RING1_SIZE(gnttab_map_grant_ref, 32); RING1_AT(gnttab_map_grant_ref, host_addr, 0);
RING1_AT(gnttab_map_grant_ref, flags, 8); RING1_AT(gnttab_map_grant_ref, ref, 12); RING1_AT(gnttab_map_grant_ref, dom, 16);
RING1_AT(gnttab_map_grant_ref, status, 18); RING1_AT(gnttab_map_grant_ref, handle, 20);
RING1_AT(gnttab_map_grant_ref, dev_bus_addr, 24);

struct gnttab_unmap_grant_ref {
    uint64_t host_addr, dev_bus_addr;      /* as it was mapped; not looked at */
    uint32_t handle;
    int16_t status;                        /* OUT */
    uint16_t pad;
};
RING1_SIZE(gnttab_unmap_grant_ref, 24); RING1_AT(gnttab_unmap_grant_ref, host_addr, 0);
RING1_AT(gnttab_unmap_grant_ref, dev_bus_addr, 8); RING1_AT(gnttab_unmap_grant_ref, handle, 16);
RING1_AT(gnttab_unmap_grant_ref, status, 20);

struct gnttab_transfer {
    uint64_t mfn;                          /* the caller's frame that goes */
    uint16_t domid;
    uint32_t ref;                          /* an entry of domid's, GTF_accept_transfer */
    int16_t status;                        /* OUT */
    uint16_t pad[3];
};
RING1_SIZE(gnttab_transfer, 24); RING1_AT(gnttab_transfer, mfn, 0); RING1_AT(gnttab_transfer, domid, 8);
RING1_AT(gnttab_transfer, ref, 12); RING1_AT(gnttab_transfer, status, 16);

struct gnttab_copy_ptr {
    uint64_t frame;                        /* a reference where the flag says so, else an mfn of the caller */
    uint16_t domid, offset;
    uint32_t pad;
};
RING1_SIZE(gnttab_copy_ptr, 16); RING1_AT(gnttab_copy_ptr, frame, 0); RING1_AT(gnttab_copy_ptr, domid, 8);
RING1_AT(gnttab_copy_ptr, offset, 10);

struct gnttab_copy {
    struct gnttab_copy_ptr source, dest;
    uint16_t len, flags;                   /* GNTCOPY_* */
    int16_t status;                        /* OUT */
    uint16_t pad;
};
RING1_SIZE(gnttab_copy, 40); RING1_AT(gnttab_copy, source, 0); RING1_AT(gnttab_copy, dest, 16);
RING1_AT(gnttab_copy, len, 32); RING1_AT(gnttab_copy, flags, 34); RING1_AT(gnttab_copy, status, 36);

#endif
