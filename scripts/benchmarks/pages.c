/* What the host itself does with pages, and how fast: what the figures of paging are measured against. Medians, in ns.
 *
 * `fd` is shared memory of `pages` pages, every one of them there already, as a machine frame is. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* cdef begin */
double host_fault(int32_t fd, uint32_t pages);
double host_map(int32_t fd, uint32_t pages);
double host_protect(int32_t fd, uint32_t pages);
double host_unmap(int32_t fd, uint32_t pages);
double host_trap(int32_t fd, uint32_t pages);
int32_t pipe_pong(int32_t in, int32_t out, uint32_t n);
double pipe_ping(int32_t in, int32_t out, uint32_t n);
/* cdef end */

enum { PAGE = 4096 };

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double median(double *ns, uint32_t n)
{
    qsort(ns, n, sizeof *ns, compare);
    return ns[n / 2];
}

/* Each of these does one thing to page i of the mapping. */
typedef void action(char *page, int fd, uint32_t i);

static void touch(char *page, int fd, uint32_t i)
{
    (void)fd, (void)i;
    *(volatile char *)page;
}

static void map(char *page, int fd, uint32_t i)
{
    mmap(page, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, (off_t)i * PAGE);
}

static void protect(char *page, int fd, uint32_t i)
{
    (void)fd, (void)i;
    mprotect(page, PAGE, PROT_READ);
}

static void unmap(char *page, int fd, uint32_t i)
{
    (void)fd, (void)i;
    mmap(page, PAGE, PROT_NONE, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static void store(char *page, int fd, uint32_t i)
{
    (void)fd;
    *(volatile uint64_t *)page = i;
}

static void make_writable(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)context;
    mprotect((void *)((uintptr_t)info->si_addr & -(uintptr_t)PAGE), PAGE, PROT_READ | PROT_WRITE);
}

/* The median of `act` on every other page of a fresh mapping, so that each of them splits it. */
static double each(int fd, uint32_t pages, int prot, action *before, action *act)
{
    char *base = mmap(NULL, (size_t)pages * PAGE, prot, MAP_SHARED, fd, 0);
    double *ns = calloc(pages, sizeof *ns), m = -1;
    uint32_t n = 0;

    if (base != MAP_FAILED && ns) {
        for (uint32_t i = 0; before && i < pages; i++)
            before(base + (size_t)i * PAGE, fd, i);
        for (uint32_t i = 0; i < pages; i += 2) {
            double begin = now();

            act(base + (size_t)i * PAGE, fd, i ^ 1); /* `map` shows another page there */
            ns[n++] = now() - begin;
        }
        m = median(ns, n);
        munmap(base, (size_t)pages * PAGE);
    }
    free(ns);
    return m;
}

/* A minor fault: the page is there, this process has no translation of it yet. A store, since the host kernel maps sixteen
 * at a time for a read. */
double host_fault(int32_t fd, uint32_t pages) { return each(fd, pages, PROT_READ | PROT_WRITE, NULL, store); }
double host_map(int32_t fd, uint32_t pages) { return each(fd, pages, PROT_READ | PROT_WRITE, touch, map); }
double host_protect(int32_t fd, uint32_t pages) { return each(fd, pages, PROT_READ | PROT_WRITE, touch, protect); }
double host_unmap(int32_t fd, uint32_t pages) { return each(fd, pages, PROT_READ | PROT_WRITE, touch, unmap); }

/* A store to a read-only page, which a handler in the same process makes writable. */
double host_trap(int32_t fd, uint32_t pages)
{
    struct sigaction action = {.sa_sigaction = make_writable, .sa_flags = SA_SIGINFO}, before;
    double m;

    sigaction(SIGSEGV, &action, &before);
    m = each(fd, pages, PROT_READ, touch, store);
    sigaction(SIGSEGV, &before, NULL);
    return m;
}

int32_t pipe_pong(int32_t in, int32_t out, uint32_t n)
{
    char byte;

    while (n--)
        if (read(in, &byte, 1) != 1 || write(out, &byte, 1) != 1)
            return -1;
    return 0;
}

double pipe_ping(int32_t in, int32_t out, uint32_t n)
{
    double *ns = calloc(n, sizeof *ns), m = -1;
    uint32_t done = 0;
    char byte = 0;

    while (ns && done < n) {
        double begin = now();

        if (write(out, &byte, 1) != 1 || read(in, &byte, 1) != 1)
            break;
        ns[done++] = now() - begin;
    }
    if (done == n && n)
        m = median(ns, n);
    free(ns);
    return m;
}
