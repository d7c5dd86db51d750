/* A kernel that tries what a domain must not do. Its command line says what:
 *
 *     (nothing)                     every call that is to be refused with an error; each says "name result", and the exit
 *                                   code is 0 if the filter refused them all
 *     attack=NAME                   one that is to kill: it says "NAME tried", and if it lives "NAME ALLOWED", exit code 1
 *     attack=ring domid=D gref=G    makes a hypercall ring and tries to be rid of its frame, which the hypervisor would go
 *                                   on writing, also by giving it to that domain; exit code 0 if it cannot
 *     attack=grant domid=D gref=G   maps that grant, which is for reading only, and then stores to it
 *
 * A refusal is EPERM or ENOSYS: any other error means that the call reached the host kernel. */
#include "kernel.h"

enum {
    SYS_open = 2, SYS_mmap = 9, SYS_mprotect = 10, SYS_munmap = 11, SYS_rt_sigaction = 13, SYS_ioctl = 16, SYS_pwrite64 = 18,
    SYS_mremap = 25, SYS_madvise = 28, SYS_shmget = 29, SYS_dup = 32, SYS_getpid = 39, SYS_socket = 41, SYS_sendto = 44,
    SYS_recvfrom = 45, SYS_recvmsg = 47, SYS_socketpair = 53, SYS_fork = 57, SYS_execve = 59, SYS_wait4 = 61, SYS_kill = 62, SYS_fcntl = 72, SYS_unlink = 87,
    SYS_ptrace = 101, SYS_getppid = 110, SYS_prctl = 157, SYS_futex = 202, SYS_sched_setaffinity = 203, SYS_tgkill = 234,
    SYS_mq_open = 240, SYS_mq_notify = 244, SYS_openat = 257, SYS_pipe2 = 293, SYS_prlimit64 = 302,
    SYS_process_vm_readv = 310, SYS_process_vm_writev = 311, SYS_seccomp = 317, SYS_memfd_create = 319, SYS_bpf = 321,
    SYS_userfaultfd = 323, SYS_io_uring_setup = 425, SYS_pidfd_open = 434, SYS_clone3 = 435,
};
enum { O_RDWR = 2, PROT_RW = 3, PROT_RX = 5, PROT_RWX = 7, MAP_PRIVATE = 2, MAP_FIXED_ANONYMOUS = 0x32, SIGSEGV = 11 };

static char spare[RING1_PAGE_SIZE] __attribute__((aligned(RING1_PAGE_SIZE))); /* a frame of ours to be quarrelled about */
static int allowed;

/* ---- calls that are to be refused with an error */

static void report(const char *name, int64_t result)
{
    char line[128];

    put_decimal(put_text(put_text(line, name), " "), result);
    say(line);
}

static void refused(const char *name, long result)
{
    report(name, result);
    allowed += result != -EPERM && result != -ENOSYS;
}

static void files(void)
{
    long words[16] = {0};

    refused("open", SYS2(SYS_open, "/etc/passwd", 0));
    refused("openat", SYS3(SYS_openat, -100, "/etc/passwd", 0));
    refused("open-own-memory", SYS2(SYS_open, "/proc/self/mem", O_RDWR));
    refused("open-descriptors", SYS2(SYS_open, "/proc/self/fd/8", O_RDWR));
    refused("unlink", SYS1(SYS_unlink, "/no/such/file"));
    refused("execve", SYS3(SYS_execve, "/no/such/file", 0, 0));
    refused("memfd_create", SYS2(SYS_memfd_create, "hostile", 0));
    refused("shmget", SYS3(SYS_shmget, 0x7e57, 4096, 0));
    refused("mq_open", SYS4(SYS_mq_open, "no-such-queue", 0, 0, 0));
    refused("mq_notify", SYS2(SYS_mq_notify, RING1_FD_REPLY, 0));
    refused("socket-unix", SYS3(SYS_socket, 1, 1, 0));
    refused("socket-inet", SYS3(SYS_socket, 2, 1, 0));
    refused("socketpair", SYS4(SYS_socketpair, 1, 1, 0, words));
    refused("pipe", SYS2(SYS_pipe2, words, 0));
    refused("recvmsg", SYS3(SYS_recvmsg, 0, words, 0));
    refused("sendto", SYS6(SYS_sendto, RING1_FD_UPCALL, words, 8, 0, 0, 0));
    refused("sendto-address", SYS6(SYS_sendto, RING1_FD_FAULT, 1, 8, 0, words, 16)); /* from nowhere: sent, it would end us */
    refused("recvfrom", SYS6(SYS_recvfrom, RING1_FD_UPCALL, words, 8, 0x40, 0, 0));
    refused("recvfrom-address", SYS6(SYS_recvfrom, RING1_FD_FAULT, words, 8, 0x40, words, words));
    refused("dup", SYS1(SYS_dup, RING1_FD_REQUEST));
    refused("fcntl-dup", SYS3(SYS_fcntl, RING1_FD_REQUEST, 0, 0));
    refused("ioctl", SYS3(SYS_ioctl, 0, 0x5413, words));
    refused("pwrite", SYS4(SYS_pwrite64, 0, words, 1, 0));
}

static void memory(void)
{
    long file = SYS2(SYS_open, "/proc/self/exe", 0);

    refused("mmap-file", SYS6(SYS_mmap, 0, 4096, 1, MAP_PRIVATE, file < 0 ? 0 : file, 0));
    refused("mmap-window", SYS6(SYS_mmap, spare, 4096, PROT_RW, MAP_PRIVATE | MAP_FIXED_ANONYMOUS, -1, 0));
    refused("mmap-top", SYS6(SYS_mmap, HOST(RING1_COMMANDS), 4096, PROT_RW, MAP_PRIVATE | MAP_FIXED_ANONYMOUS, -1, 0));
    refused("mprotect-own", SYS3(SYS_mprotect, spare, 4096, PROT_RW));
    refused("mprotect-code", SYS3(SYS_mprotect, HOST(RING1_MONITOR_CODE), 4096, PROT_RWX));
    refused("mprotect-reserved", SYS3(SYS_mprotect, HOST(RING1_GRANT_BASE), 4096, PROT_RW));
    refused("mremap", SYS4(SYS_mremap, spare, 4096, 8192, 1));
    refused("madvise", SYS3(SYS_madvise, spare, 4096, 4));
    refused("munmap-window", SYS2(SYS_munmap, spare, 4096));
    refused("munmap-top", SYS2(SYS_munmap, HOST(RING1_COMMANDS), 4096));
}

/* A child would run on this very stack, whose frames are shared memory: in registers only, it leaves at once. */
static long fork_and_leave(void)
{
    long ret;

    __asm__ volatile("syscall\n test %%rax,%%rax\n jnz 1f\n mov %2,%%eax\n xor %%edi,%%edi\n syscall\n1:"
                     : "=a"(ret)
                     : "a"((long)SYS_fork), "i"(SYS_exit_group)
                     : "rcx", "r11", "rdi", "memory");
    return ret;
}

static void processes(void)
{
    long hypervisor = SYS1(SYS_getppid, 0), words[32] = {0}, child = fork_and_leave();

    refused("kill-hypervisor", SYS2(SYS_kill, hypervisor, 0));
    refused("kill-all", SYS2(SYS_kill, -1, 0));
    refused("kill-group", SYS2(SYS_kill, 0, 0));
    refused("tgkill-hypervisor", SYS3(SYS_tgkill, hypervisor, hypervisor, 0));
    refused("fork", child);
    if (child > 0)
        SYS4(SYS_wait4, child, 0, 0, 0);
    refused("clone3", SYS2(SYS_clone3, words, 0));
    refused("handler-of-faults", SYS4(SYS_rt_sigaction, SIGSEGV, 0, words, 8));
    refused("futex-requeue", SYS5(SYS_futex, words, 3, 0, 0, words + 1));
    refused("dumpable", SYS2(SYS_prctl, 4, 1));
    refused("seccomp", SYS3(SYS_seccomp, 2, 0, words));
    refused("prlimit", SYS4(SYS_prlimit64, 0, 2, 0, words));
    refused("affinity", SYS3(SYS_sched_setaffinity, 0, 8, words));
}

/* ---- a frame that the hypervisor writes */

static int keep_the_ring(uint64_t taker, uint64_t gref)
{
    struct ring1_sring *ring = (struct ring1_sring *)(void *)spare;
    uint64_t pfn = (VIRT(spare) - RING1_VIRT_BASE) / RING1_PAGE_SIZE;
    uint64_t mfn = ((uint64_t *)HOST(start_page->xen.mfn_list))[pfn];
    struct gnttab_transfer gift = {.mfn = mfn, .domid = (uint16_t)taker, .ref = (uint32_t)gref};

    ring->req_event = ring->rsp_event = 1;
    report("ring-setup", CALL(RING1_OP_callring, RING1_CALLRING_setup, VIRT(spare)));
    CALL(__HYPERVISOR_update_va_mapping, VIRT(spare), 0, 0); /* a frame that is mapped may not leave anyway */
    CALL(__HYPERVISOR_grant_table_op, GNTTABOP_transfer, VIRT(&gift), 1);
    report("ring-transferred", gift.status);
    report("ring-given-back", CALL(__HYPERVISOR_memory_op, XENMEM_decrease_reservation, VIRT(&mfn), 1, 0));
    return CALL(__HYPERVISOR_memory_op, XENMEM_current_reservation, DOMID_SELF) != (int64_t)start_page->xen.nr_pages;
}

/* ---- attacks that are to kill: each returns only where nothing stopped it */

static void store(uint64_t va)
{
    *(volatile uint64_t *)HOST(va) = 0x0b0b0b0b;
}

static void store_to_grant(uint64_t domid, uint64_t gref)
{
    struct gnttab_map_grant_ref map = {
        .host_addr = RING1_GRANT_BASE, .flags = GNTMAP_host_map, .ref = (uint32_t)gref, .dom = (uint16_t)domid,
    };

    CALL(__HYPERVISOR_grant_table_op, GNTTABOP_map_grant_ref, VIRT(&map), 1);
    report("grant-map-writable", map.status);
    allowed += map.status != GNTST_permission_denied;
    map.flags |= GNTMAP_readonly;
    CALL(__HYPERVISOR_grant_table_op, GNTTABOP_map_grant_ref, VIRT(&map), 1);
    report("grant-map-readonly", map.status);
    if (map.status != GNTST_okay)
        return;
    report("grant-first-word", (int64_t) * (volatile uint64_t *)HOST(RING1_GRANT_BASE));
    refused("grant-mprotect", SYS3(SYS_mprotect, HOST(RING1_GRANT_BASE), 4096, PROT_RW));
    if (!allowed)
        store(RING1_GRANT_BASE);
}

static uint64_t number(const char *text)
{
    uint64_t value = 0;

    for (; text && *text >= '0' && *text <= '9'; text++)
        value = value * 10 + (uint64_t)(*text - '0');
    return value;
}

static int attack(const char *name)
{
    long hypervisor = SYS1(SYS_getppid, 0), words[16] = {0}, eax = 20; /* getpid, of 32 bits */

    if (same(name, "store-monitor-code"))
        store(RING1_MONITOR_CODE);
    else if (same(name, "store-commands"))
        store(RING1_COMMANDS);
    else if (same(name, "store-top-middle"))
        store(RING1_HYPERVISOR_VIRT_START + (32 << 20));
    else if (same(name, "store-before-shared-info"))
        store(RING1_SHARED_INFO - 8);
    else if (same(name, "store-reserved"))
        store(RING1_GRANT_BASE);
    else if (same(name, "store-null"))
        store(0);
    else if (same(name, "store-own-code"))
        store(RING1_VIRT_BASE + RING1_KERNEL_PFN * RING1_PAGE_SIZE);
    else if (same(name, "execute-data")) {
        spare[0] = (char)0xc3; /* ret */
        __asm__ volatile("call *%0" : : "r"(spare) : "memory");
    } else if (same(name, "ptrace"))
        SYS4(SYS_ptrace, 0x4206 /* SEIZE */, hypervisor, 0, 0);
    else if (same(name, "process_vm_readv"))
        SYS6(SYS_process_vm_readv, hypervisor, words, 0, words, 0, 0);
    else if (same(name, "process_vm_writev"))
        SYS6(SYS_process_vm_writev, hypervisor, words, 0, words, 0, 0);
    else if (same(name, "pidfd_open"))
        SYS2(SYS_pidfd_open, hypervisor, 0);
    else if (same(name, "io_uring"))
        SYS2(SYS_io_uring_setup, 1, words);
    else if (same(name, "userfaultfd"))
        SYS1(SYS_userfaultfd, 1);
    else if (same(name, "bpf"))
        SYS3(SYS_bpf, 0, words, 0);
    else if (same(name, "x32"))
        SYS1(0x40000000 | SYS_getpid, 0);
    else if (same(name, "int80"))
        __asm__ volatile("int $0x80" : "+a"(eax) : : "memory", "r8", "r9", "r10", "r11");
    else if (same(name, "cli"))
        __asm__ volatile("cli");
    else if (same(name, "hlt"))
        __asm__ volatile("hlt");
    else if (same(name, "cr3"))
        __asm__ volatile("mov %0, %%cr3" : : "r"(0L));
    else if (same(name, "out"))
        __asm__ volatile("outb %%al, $0x80" : : "a"(0));
    else if (same(name, "grant"))
        store_to_grant(number(option("domid=")), number(option("gref=")));
    else
        return 0;
    return 1;
}

int kernel_main(void)
{
    const char *at = option("attack=");
    char name[64], line[96];
    uint32_t n = 0;

    if (!at) {
        files();
        memory();
        processes();
        return allowed != 0;
    }
    while (*at && *at != ' ' && n < sizeof name - 1)
        name[n++] = *at++;
    name[n] = 0;
    put_text(put_text(line, name), " tried");
    say(line);
    if (same(name, "ring"))
        return keep_the_ring(number(option("domid=")), number(option("gref=")));
    if (!attack(name))
        return 2; /* no such attack */
    put_text(put_text(line, name), " ALLOWED");
    say(line);
    return 1;
}
