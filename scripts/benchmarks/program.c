/* The program of the rows of syscalls: unmodified, it runs natively, in a domain, and in what else runs such programs.
 *
 * It says "= ready 1", then reads lines "WHAT N" and answers each with "= WHAT NS": the median of what one took in ROUNDS batches
 * of N. At the end of its input it ends, and the machine with it where it is the first process. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 7, PAGE = 4096, BLOCK = 4096 };

static char *self, busybox[4096]; /* paths: our own file, and busybox beside it */
static char block[BLOCK];

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void fail(const char *what)
{
    printf("! %s\n", what);
    fflush(stdout);
    _exit(1);
}

static double since(double begin, long n)
{
    return (now() - begin) / (double)n;
}

/* ---- calls */

/* The number is in a register by then: nobody can patch this site. */
static double null_unpatched(long n)
{
    double begin = now();

    for (long i = 0; i < n; i++)
        syscall(SYS_getpid);
    return since(begin, n);
}

/* Here it is a constant right before the instruction. */
static double null(long n)
{
    double begin = now();

    for (long i = 0; i < n; i++)
        getpid();
    return since(begin, n);
}

/* As null, but not a call that is worth a fast path. */
static double plain(long n)
{
    double begin = now();

    for (long i = 0; i < n; i++)
        getpgid(0);
    return since(begin, n);
}

static double read_clock(long n)
{
    struct timespec t;
    double begin = now();

    for (long i = 0; i < n; i++)
        clock_gettime(CLOCK_MONOTONIC, &t);
    return since(begin, n);
}

static double read_file(long n, size_t bytes)
{
    static int fd = -1;
    double begin;

    if (fd < 0 && (fd = open(self, O_RDONLY)) < 0)
        fail("its own file cannot be opened");
    lseek(fd, 0, SEEK_SET);
    begin = now();
    for (long i = 0; i < n; i++)
        if (read(fd, block, bytes) != (ssize_t)bytes && lseek(fd, 0, SEEK_SET))
            fail("its own file cannot be read");
    return since(begin, n);
}

static double read_1(long n) { return read_file(n, 1); }
static double read_4k(long n) { return read_file(n, BLOCK); }

/* ---- processes */

static double children(long n, char *const *argv)
{
    double begin = now();

    for (long i = 0; i < n; i++) {
        int status = 0;
        pid_t pid = fork();

        if (!pid) {
            if (argv)
                execv(argv[0], argv);
            _exit(argv ? 1 : 0);
        }
        if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
            fail("a child did not end well");
    }
    return since(begin, n);
}

static double fork_exit(long n) { return children(n, 0); }
static double fork_exec(long n) { return children(n, (char *[]){self, "exit", 0}); }

static double shell(long n)
{
    static char script[3 * sizeof busybox + 64];

    snprintf(script, sizeof script, "%s seq 1 2000 | %s sort -n | %s md5sum >/dev/null", busybox, busybox, busybox);
    return children(n, (char *[]){busybox, "sh", "-c", script, 0});
}

/* To a process that sends every byte back. It lives as long as we do. */
static double pipe_trip(long n)
{
    static int there[2], back[2];
    char byte = 0;
    double begin;

    if (!there[1]) {
        if (pipe(there) || pipe(back))
            fail("no pipes");
        if (!fork()) {
            close(there[1]);
            close(back[0]);
            while (read(there[0], &byte, 1) == 1 && write(back[1], &byte, 1) == 1)
                ;
            _exit(0);
        }
        close(there[0]);
        close(back[1]);
    }
    begin = now();
    for (long i = 0; i < n; i++)
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            fail("the other process is gone");
    return since(begin, n);
}

/* ---- memory */

/* One after the other, in an area of so many pages: how large it is decides how many a kernel makes at once. */
static double touch(long n)
{
    volatile char *area = mmap(0, (size_t)n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    double begin;

    if (area == MAP_FAILED)
        fail("no memory");
    madvise((void *)area, (size_t)n * PAGE, MADV_NOHUGEPAGE); /* pages are what is counted */
    begin = now();
    for (long i = 0; i < n; i++)
        area[i * PAGE] = 1;
    begin = since(begin, n);
    munmap((void *)area, (size_t)n * PAGE);
    return begin;
}

/* ---- what is asked */

/* 1 or 0. */
static double has_vdso(long n)
{
    (void)n;
    return getauxval(AT_SYSINFO_EHDR) != 0;
}

static const struct {
    const char *name;
    double (*once)(long);
} what[] = {
    {"null-unpatched", null_unpatched}, {"null", null}, {"plain", plain}, {"clock", read_clock}, {"read-1", read_1},
    {"read-4k", read_4k}, {"fork", fork_exit}, {"exec", fork_exec}, {"shell", shell}, {"pipe", pipe_trip}, {"touch", touch},
    {"vdso", has_vdso},
};

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static void say(const char *name, double figure)
{
    printf("= %s %.1f\n", name, figure);
    fflush(stdout);
}

static void answer(const char *name, long n)
{
    double ns[ROUNDS];

    for (size_t i = 0; i < sizeof what / sizeof *what; i++)
        if (!strcmp(name, what[i].name)) {
            for (int round = 0; round < ROUNDS; round++)
                ns[round] = what[i].once(n);
            qsort(ns, ROUNDS, sizeof *ns, compare);
            say(name, ns[ROUNDS / 2]);
            return;
        }
    fail("asked for what there is not");
}

int main(int argc, char **argv)
{
    char line[128], name[64], *slash;
    long n;

    self = argv[0];
    if (argc > 1 && !strcmp(argv[1], "exit"))
        return 0;
    snprintf(busybox, sizeof busybox, "%s", self);
    slash = strrchr(busybox, '/');
    snprintf(slash ? slash + 1 : busybox, 16, "busybox");
    say("ready", 1); /* what a terminal was typed before that may be lost */
    while (fgets(line, sizeof line, stdin))
        if (sscanf(line, "%63s %ld", name, &n) == 2 && n > 0)
            answer(name, n);
    if (syscall(SYS_getpid) == 1)
        reboot(RB_POWER_OFF);
    return 0;
}
