/* Programs for test_fast.py. They say the same whether their calls are patched or not, and on the host. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define REPEAT(n) for (int i = 0; i < (n); i++)
#define CHECK(what)                                   \
    do {                                              \
        if (!(what)) {                                \
            printf("%d: %s\n", __LINE__, #what);      \
            fflush(stdout);                           \
            _exit(1);                                 \
        }                                             \
    } while (0)
enum { SIZE = 50000 };
static unsigned char content(long at) { return (unsigned char)(at * 7 + (at >> 8)); }
static char buffer[SIZE], *volatile nowhere = (char *)16;

static int file(const char *name)
{
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);

    for (long at = 0; at < SIZE; at++)
        buffer[at] = (char)content(at);
    CHECK(write(fd, buffer, SIZE) == SIZE);
    CHECK(lseek(fd, 0, SEEK_SET) == 0);
    return fd;
}

static int right(const char *at, long from, long count)
{
    for (long i = 0; i < count; i++)
        if ((unsigned char)at[i] != content(from + i))
            return 0;
    return 1;
}

static int ids(void)
{
    int pid = getpid(), channel[2], news[2], status;
    char c;

    CHECK(!pipe(channel) && !pipe(news));
    REPEAT(5) CHECK(getpid() == pid && gettid() == pid && getuid() == geteuid() && getgid() == getegid());
    int child = fork();
    if (!child) {
        REPEAT(3) CHECK(getpid() != pid && getppid() == pid);
        if (!fork()) { /* an orphan: its parent ends now, and it is init's or whoever adopts it */
            int before = getppid();
            CHECK(write(news[1], "x", 1) == 1 && read(channel[0], &c, 1) == 1);
            REPEAT(3) CHECK(getppid() != before);
            _exit(0);
        }
        CHECK(read(news[0], &c, 1) == 1);
        _exit(3);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 3 << 8);
    CHECK(write(channel[1], "x", 1) == 1);
    REPEAT(3) CHECK(getpid() == pid);
    puts("ids");
    return 0;
}

static int files(void)
{
    char small[100];
    struct stat st;
    int fd = file("a"), other;

    REPEAT(500) CHECK(pread(fd, small, 100, i * 90) == 100 && right(small, i * 90, 100));
    REPEAT(500) CHECK(read(fd, small, 99) == 99 && right(small, i * 99, 99) && lseek(fd, 0, SEEK_CUR) == (i + 1) * 99);
    CHECK(read(fd, small, 0) == 0 && read(fd, buffer, SIZE) == SIZE - 500 * 99 && read(fd, small, 1) == 0);
    CHECK(lseek(fd, -10, SEEK_END) == SIZE - 10 && read(fd, small, 100) == 10 && right(small, SIZE - 10, 10));
    CHECK(lseek(fd, -1, SEEK_SET) == -1 && errno == EINVAL && lseek(fd, 0, 99) == -1 && lseek(fd, SIZE, SEEK_CUR) == 2 * SIZE);
    CHECK(read(fd, small, 1) == 0 && pread(fd, small, 1, -1) == -1 && errno == EINVAL);
    CHECK(pread(fd, nowhere, 1, 0) == -1 && errno == EFAULT && read(-1, small, 1) == -1 && errno == EBADF);
    CHECK(lseek(fd, 0, SEEK_SET) == 0 && read(fd, nowhere, 1) == -1 && errno == EFAULT && lseek(fd, 0, SEEK_CUR) == 0);
    /* written by one way, read by the other */
    REPEAT(50) CHECK(pwrite(fd, "abc", 3, 4094 + i * 4096 % 40000) == 3 && pread(fd, small, 3, 4094 + i * 4096 % 40000) == 3);
    CHECK(!memcmp(small, "abc", 3) && (other = open("a", O_RDWR)) >= 0);
    CHECK(pread(other, small, 3, 4094) == 3 && !memcmp(small, "abc", 3));
    CHECK(pwrite(other, "xyz", 3, 4094) == 3 && pread(fd, small, 3, 4094) == 3 && !memcmp(small, "xyz", 3));
    REPEAT(8) CHECK(pwrite(fd, "!", 1, 10 + i) == 1);
    char *seen = mmap(0, SIZE, PROT_READ, MAP_PRIVATE, other, 0);
    CHECK(seen[10] == '!' && !memcmp(seen + 4094, "xyz", 3));
    /* a length that changes, by this descriptor, by another, by a child's that shares the position */
    REPEAT(20) CHECK(pwrite(fd, "tail", 4, SIZE + i) == 4 && !fstat(fd, &st) && st.st_size == SIZE + i + 4);
    CHECK(!ftruncate(other, 100));
    REPEAT(20) CHECK(pread(fd, small, 100, 50) == 50 && pread(fd, small, 1, 100) == 0);
    CHECK(lseek(fd, 20, SEEK_SET) == 20);
    if (!fork()) {
        CHECK(read(fd, small, 5) == 5);
        REPEAT(10) CHECK(lseek(fd, 1, SEEK_CUR) == 26 + i);
        _exit(0);
    }
    wait(0);
    CHECK(lseek(fd, 0, SEEK_CUR) == 35);
    other = dup(fd);
    REPEAT(10) CHECK(read(i & 1 ? fd : other, small, 1) == 1 && lseek(fd, 0, SEEK_CUR) == 36 + i);
    CHECK(!close(fd) && read(fd, small, 1) == -1 && errno == EBADF && read(other, small, 1) == 1);
    REPEAT(9) CHECK(read(other, small, 1) == 1);
    CHECK(dup2(open("/dev/zero", O_RDONLY), other) == other && read(other, small, 1) == 1 && !small[0]);
    /* what it may not */
    CHECK((fd = open("a", O_RDONLY)) >= 0);
    REPEAT(9) CHECK(pread(fd, small, 1, 0) == 1);
    CHECK(pwrite(fd, "a", 1, 0) == -1 && errno == EBADF);
    CHECK((fd = open("a", O_RDWR | O_APPEND)) >= 0 && lseek(fd, 0, SEEK_SET) == 0);
    REPEAT(9) CHECK(pread(fd, small, 1, 0) == 1);
    CHECK(write(fd, "a", 1) == 1 && !fstat(fd, &st) && st.st_size == 101);
    /* a hole */
    CHECK(!ftruncate(fd, 40000) && pread(fd, small, 2, 20000) == 2 && !small[0]);
    REPEAT(9) CHECK(pread(fd, small, 2, 20000) == 2 && !small[0] && !small[1]);
    CHECK(!fstat(fd, &st) && st.st_blocks <= 8);
    puts("files");
    return 0;
}

/* Call sites of both forms, and ways into their middle. */
long site_mov(void), site_xor(long fd, void *to, long count), middle(long number, long fd, void *to, long count, const void *where);
__asm__(".text\n.balign 4096\n"
        "site_mov: mov $39,%eax\n syscall\n ret\n"
        ".balign 64\n"
        "site_xor: nop\n xor %eax,%eax\n syscall\n cmp $-4096,%rax\n ja 1f\n ret\n1: mov $-77,%rax\n ret\n"
        ".balign 64\n"
        "middle: mov %rdi,%rax\n mov %rsi,%rdi\n mov %rdx,%rsi\n mov %rcx,%rdx\n jmp *%r8\n"
        ".balign 4096\n");
static const char mov_code[] = "\xb8\x27\0\0\0\x0f\x05\xc3", xor_code[] = "\x90\x31\xc0\x0f\x05\x48\x3d\x00\xf0\xff\xff\x77";

/* The file of this program changes while it runs: what is kept of it for others is old. Linux does not let us. */
static void change_file(void)
{
    int self = open("/proc/self/exe", O_RDWR);
    char c;

    if (self >= 0)
        CHECK(pread(self, &c, 1, 15) == 1 && pwrite(self, &c, 1, 15) == 1 && !close(self));
}

static int old(void)
{
    char small[8];
    const char *mov = (const char *)site_mov, *xor = (const char *)site_xor + 1;
    int fd = file("o"), pid = (int)site_mov();

    REPEAT(9) CHECK(site_mov() == pid);
    REPEAT(9) CHECK(site_xor(fd, small, 8) == 8 && right(small, i * 8, 8));
    REPEAT(9) CHECK(site_xor(-1, small, 8) == -77);
    change_file();
    CHECK(lseek(fd, 0, SEEK_SET) == 0);
    REPEAT(5) CHECK(middle(SYS_getppid, 0, 0, 0, mov + 5) == getppid());
    REPEAT(5) CHECK(middle(SYS_read, fd, small, 8, mov + 5) == 8 && right(small, i * 8, 8));
    REPEAT(5) CHECK(middle(SYS_getpid, 0, 0, 0, xor + 2) == pid);
    REPEAT(5) CHECK(middle(-5, 0, 0, 0, xor + 4) == -77 && middle(5, 0, 0, 0, xor + 4) == 5);
    puts("old");
    return 0;
}

/* The bytes of this program in memory, and in its file. */
static int text(void)
{
    char small[8], *page = (char *)((long)site_mov & -4096);
    int self = open("/proc/self/exe", O_RDONLY), fd = file("t");
    unsigned sum = 0, mapped = 0;
    long size = 0, n;

    REPEAT(9) CHECK(site_mov() == getpid() && site_xor(fd, small, 8) == 8);
    CHECK(self >= 0);
    while ((n = read(self, buffer, SIZE)) > 0)
        for (long i = 0; i < n; i++, size++)
            sum = sum * 31 + (unsigned char)buffer[i];
    char *again = mmap(0, (size_t)size, PROT_READ, MAP_PRIVATE, self, 0);
    CHECK(again != MAP_FAILED);
    for (long i = 0; i < size; i++)
        mapped = mapped * 31 + (unsigned char)again[i];
    CHECK(mapped == sum);
    /* what this program may write is its own, and unpatched; it runs all the same */
    CHECK(!mprotect(page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC));
    ((volatile char *)site_mov)[7] = '\xc3';
    ((volatile char *)site_xor)[0] = '\x90';
    CHECK(!memcmp((char *)site_mov, mov_code, 8) && !memcmp((char *)site_xor, xor_code, 12));
    CHECK(lseek(fd, 0, SEEK_SET) == 0);
    REPEAT(9) CHECK(site_mov() == getpid() && site_xor(fd, small, 8) == 8 && right(small, i * 8, 8));
    printf("text %ld %u\n", size, sum);
    return 0;
}

static int moved(void)
{
    char small[8], *page = (char *)site_mov, *to = (char *)0x30000000;
    int pid = getpid(), fd = file("m");

    REPEAT(9) CHECK(site_mov() == pid && site_xor(fd, small, 8) == 8);
    change_file();
    CHECK(mremap(page, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
    REPEAT(9) CHECK(((long (*)(void))to)() == pid);
    CHECK(mmap(page, 4096, PROT_READ | PROT_EXEC, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == page && !*page);
    REPEAT(9) CHECK(((long (*)(long, char *, long))(to + 64))(fd, small, 8) == 8 && right(small, 72 + i * 8, 8));
    puts("moved");
    return 0;
}

static volatile int caught;
static void note(int signo)
{
    (void)signo;
    caught++;
}

static int restart(void)
{
    struct sigaction action = {.sa_handler = note, .sa_flags = SA_RESTART};
    int channel[2], fd = file("r");
    char small[8];

    CHECK(!pipe(channel));
    REPEAT(9) CHECK(site_xor(fd, small, 8) == 8); /* both are patched from here on */
    REPEAT(9) CHECK(write(channel[1], "x", 1) == 1 && site_xor(channel[0], small, 8) == 1);
    sigaction(SIGUSR1, &action, 0);
    for (int flags = SA_RESTART;; flags = 0) {
        int pid = getpid();
        action.sa_flags = flags;
        sigaction(SIGUSR1, &action, 0);
        caught = 0;
        if (!fork()) {
            REPEAT(3) sched_yield();
            kill(pid, SIGUSR1);
            REPEAT(3) sched_yield();
            CHECK(write(channel[1], "y", 1) == 1);
            _exit(0);
        }
        long got = site_xor(channel[0], small, 8);
        CHECK(caught == 1 && got == (flags ? 1 : -EINTR) - (flags ? 0 : 77 - EINTR));
        if (!flags)
            CHECK(read(channel[0], small, 8) == 1);
        wait(0);
        if (!flags)
            break;
    }
    puts("restart");
    return 0;
}

/* Threads that all use one page of the kernel's for their calls. */
static int shared;
static void *reader(void *argument)
{
    char own[3000];
    int tid = gettid(), fd = open("th", O_RDONLY);

    for (long i = 0; i < 300; i++) {
        long from = (i * 997 + (long)argument * 13) % (SIZE - 3000), count = 1 + i * 11 % 2999;
        CHECK(pread(shared, own, (size_t)count, from) == count && right(own, from, count));
        CHECK(gettid() == tid && getpid() != tid);
        CHECK(lseek(fd, from, SEEK_SET) == from && read(fd, own, 100) == 100 && right(own, from, 100));
        if (i % 50 == (long)argument)
            sched_yield();
    }
    close(fd);
    return 0;
}

static int threads(void)
{
    pthread_t all[8];

    shared = file("th");
    for (long i = 0; i < 8; i++)
        CHECK(!pthread_create(&all[i], 0, reader, (void *)i));
    REPEAT(8) CHECK(!pthread_join(all[i], 0));
    puts("threads");
    return 0;
}

/* One memory, two tables of descriptors: a window is found by number. */
static int apart(void *argument)
{
    char small[4];

    (void)argument;
    close(shared);
    CHECK(open("two", O_RDONLY) == shared);
    REPEAT(9) CHECK(pread(shared, small, 4, 0) == 4 && !memcmp(small, "two!", 4));
    return 0;
}

static int tables(void)
{
    static char stack[65536];
    char small[4];
    int status;

    CHECK(write(open("two", O_RDWR | O_CREAT, 0600), "two!", 4) == 4);
    shared = file("one");
    REPEAT(9) CHECK(pread(shared, small, 4, 0) == 4 && right(small, 0, 4));
    CHECK(clone(apart, stack + sizeof stack, CLONE_VM | SIGCHLD, 0) > 0 && wait(&status) > 0 && !status);
    REPEAT(9) CHECK(pread(shared, small, 4, 0) == 4 && right(small, 0, 4));
    puts("tables");
    return 0;
}

/* A call that is interrupted at each of its instructions by a handler that makes calls of its own. test_fast.py counts getsid. */
static int stepped;
static void nested(int signo)
{
    char small[40];

    (void)signo;
    CHECK(pread(stepped, small, 40, 7) == 40 && right(small, 7, 40));
    CHECK(lseek(stepped, 3, SEEK_SET) == 3 && site_xor(stepped, small, 5) == 5 && right(small, 3, 5));
    CHECK(lseek(stepped, 50, SEEK_CUR) == 58 && lseek(stepped, 0, SEEK_SET) == 0);
    caught++;
}

static int steps(void)
{
    struct sigaction action = {.sa_handler = nested};
    int fd = file("s");
    char small[40];

    stepped = open("s", O_RDONLY);
    REPEAT(9) CHECK(pread(stepped, small, 1, 0) == 1 && site_xor(fd, small, 1) == 1 && lseek(fd, 0, SEEK_SET) == 0);
    sigaction(SIGUSR1, &action, 0);
    for (long i = 0; i < 120; i++) {
        syscall(SYS_getsid, 0);
        register long a __asm__("r8") = 8 + i, b __asm__("r9") = 9, c __asm__("r10") = 10, d __asm__("r12") = 12;
        register long e __asm__("rbx") = 3, f __asm__("r15") = 15, g __asm__("r13") = 13, h __asm__("r14") = 14;
        long to = (long)small, count = 12, got, descriptor = fd;

        __asm__ volatile("call site_xor"
                         : "=a"(got), "+r"(a), "+r"(b), "+r"(c), "+r"(d), "+r"(e), "+r"(f), "+r"(g), "+r"(h), "+D"(descriptor),
                           "+S"(to), "+d"(count)
                         :
                         : "rcx", "r11", "memory");
        long after[] = {a, b, c, d, e, f, g, h, descriptor, to, count}, want[] = {8 + i, 9, 10, 12, 3, 15, 13, 14, fd, (long)small, 12};
        CHECK(got == 12 && !memcmp(after, want, sizeof want) && right(small, i * 12, 12));
    }
    printf("steps\n");
    return 0;
}

/* What may at worst end this program. */
static int attack(const char *how, long stride)
{
    char small[40], *data = (char *)0x70000;
    int fd = file("x");

    REPEAT(9) CHECK(pread(fd, small, 40, 0) == 40 && site_mov() == getpid());
    if (!strcmp(how, "table"))
        *(volatile long *)0x60000 = 1;
    if (!strcmp(how, "code"))
        *(volatile long *)0x80000 = 1;
    if (!strcmp(how, "window"))
        ((volatile char *)0x7FF8000000)[(long)fd << 20] = 1; /* it may: the file is its own to write */
    if (!strcmp(how, "readonly")) {
        fd = open("x", O_RDONLY);
        REPEAT(9) CHECK(pread(fd, small, 40, 0) == 40);
        ((volatile char *)0x7FF8000000)[(long)fd << 20] = 1;
    }
    if (!strcmp(how, "other"))
        return ((volatile char *)0x7FF8000000)[63l << 20];
    if (!strcmp(how, "mmap"))
        for (long at = 0; at < 0x100000; at += 4096)
            CHECK(mmap((void *)at, 4096, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED);
    if (!strcmp(how, "unmap")) {
        CHECK(!munmap((void *)0x60000, 0x40000) && mprotect((void *)0x60000, 4096, 7));
        CHECK(mmap((void *)0x7FF8000000, 4096, 3, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED);
        CHECK(site_mov() == getpid());
    }
    if (!strcmp(how, "data")) { /* every word of it, in turn and together, then calls */
        for (long value = 1, n = 0; n < 4; n++, value = value * 0x7fffffff + 0x123456789) {
            for (long at = 0; at < 2208; at += 8) {
                long kept = *(volatile long *)(data + at);
                *(volatile long *)(data + at) = value;
                pread(fd, small, 40, at);
                lseek(fd, 1, SEEK_CUR);
                read(fd, small, 4);
                if (!(at % 96)) {
                    struct stat st;
                    fstat(fd, &st);
                }
                *(volatile long *)(data + at) = kept;
            }
        }
        memset(data, 0x5a, 4096);
        lseek(fd, 0, SEEK_CUR);
    }
    if (!strcmp(how, "position")) {
        long wrong[] = {-1, 1l << 62, 1l + (-1ul >> 1), 1l << 40, SIZE + 1};
        for (int n = 0; n < 5; n++) {
            REPEAT(9) CHECK(pread(fd, small, 1, 0) == 1);
            *(volatile long *)(data + 160 + fd * 32 + 8) = wrong[n];
            CHECK(site_xor(fd, small, 1) == (n == 2)); /* beyond the end, but for the one whose low 63 bits are 0 */
            int child = dup(fd);
            CHECK(lseek(child, 0, SEEK_CUR) >= 0);
            close(child);
        }
    }
    if (!strcmp(how, "loop")) { /* where nobody is to be found; the parent goes on */
        int child = fork(), status;
        if (!child) {
            long jump = (long)memmem((char *)0x80000, 4096, "\xff\xe1", 2); /* jmp *%rcx, to itself */
            *(volatile long *)(data + 40) = jump; /* rcx as the kernel finds it */
            __asm__ volatile("jmp *%0" : : "c"(jump));
        }
        REPEAT(20) sched_yield();
        kill(child, SIGKILL);
        CHECK(waitpid(child, &status, 0) == child && status == SIGKILL);
    }
    if (!strcmp(how, "jump")) { /* to every byte of the code, with registers as they come */
        int alive = 0, dead = 0;
        for (long at = 0x80000; at < 0x80000 + 700; at += stride) {
            int child = fork(), status;
            if (!child) {
                alarm(1);
                __asm__ volatile("jmp *%0" : : "r"(at), "a"(17l), "c"(site_mov), "D"((long)fd), "S"(small), "d"(8l) : "memory");
            }
            waitpid(child, &status, 0);
            status ? dead++ : alive++;
        }
        CHECK(alive + dead >= 700 / stride);
    }
    puts(how);
    return 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    struct { const char *name; int (*run)(void); } all[] = {
        {"ids", ids}, {"files", files}, {"old", old}, {"text", text}, {"restart", restart}, {"threads", threads},
        {"tables", tables}, {"steps", steps}, {"moved", moved},
    };

    setvbuf(stdout, 0, _IOLBF, 0);
    for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(what, all[i].name))
            return all[i].run();
    return attack(what, argc > 2 ? atol(argv[2]) : 1);
}
