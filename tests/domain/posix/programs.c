/* What busybox does not exercise: threads, handlers, faults, preemption. One program, the first argument says what. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static long count, ready;
static __thread long own;

static void *counter(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    ready++;
    pthread_cond_broadcast(&turn);
    while (ready < 4)
        pthread_cond_wait(&turn, &lock);
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < 20000; i++) {
        pthread_mutex_lock(&lock);
        count++;
        own++;
        if (i % 1000 == 0)
            sched_yield();
        pthread_mutex_unlock(&lock);
    }
    return (void *)own;
}

static int threads(void)
{
    pthread_t thread[4];
    long sum = 0;
    for (int i = 0; i < 4; i++)
        if (pthread_create(&thread[i], NULL, counter, NULL))
            return 1;
    for (int i = 0; i < 4; i++) {
        void *value;
        pthread_join(thread[i], &value);
        sum += (long)value;
    }
    printf("%ld %ld %ld\n", count, sum, own);
    return 0;
}

static void *takes(void *mutex)
{
    for (int i = 0; i < 200; i++) {
        pthread_mutex_lock(mutex);
        long before = count;
        if (i % 16 == 0)
            sched_yield();
        count = before + 1;
        pthread_mutex_unlock(mutex);
    }
    return NULL;
}

/* Mutexes that the kernel knows the owner of: with priority inheritance, and one whose owner dies, of two processes. */
static int locks(void)
{
    pthread_mutexattr_t kind;
    pthread_mutex_t inherits, *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_t some[4];

    pthread_mutexattr_init(&kind);
    pthread_mutexattr_setprotocol(&kind, PTHREAD_PRIO_INHERIT);
    pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_ERRORCHECK);
    printf("made %d\n", pthread_mutex_init(&inherits, &kind));
    count = 0;
    for (int i = 0; i < 4; i++)
        pthread_create(&some[i], NULL, takes, &inherits);
    for (int i = 0; i < 4; i++)
        pthread_join(some[i], NULL);
    printf("%ld taken\n", count);
    pthread_mutex_lock(&inherits);
    printf("again: %s\n", strerror(pthread_mutex_lock(&inherits)));

    for (int inherit = 0; inherit < 2; inherit++) {
        pthread_mutexattr_init(&kind);
        pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
        pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
        pthread_mutexattr_setprotocol(&kind, inherit ? PTHREAD_PRIO_INHERIT : PTHREAD_PRIO_NONE);
        pthread_mutex_init(shared, &kind);
        for (int waits = 0; waits < 2; waits++) {
            int ends[2];
            char byte;
            if (pipe(ends))
                return 1;
            if (!fork()) {
                pthread_mutex_lock(shared);
                (void)!write(ends[1], "", 1);
                if (waits)
                    usleep(20000);
                _exit(0);
            }
            (void)!read(ends[0], &byte, 1);
            if (!waits)
                wait(NULL);
            printf("its owner: %s\n", strerror(pthread_mutex_lock(shared)));
            if (waits)
                wait(NULL);
            pthread_mutex_consistent(shared);
            printf("given back: %d\n", pthread_mutex_unlock(shared));
        }
    }
    return 0;
}

static pthread_t sender;
static void *kills(void *unused)
{
    usleep(5000);
    kill(getpid(), SIGUSR1);
    for (volatile long i = 0; i < 1000000; i++) /* it goes on, and may take the signal first */
        ;
    usleep(20000);
    return unused;
}

static void woken(int signo)
{
    printf("signal %d in %s\n", signo, pthread_equal(pthread_self(), sender) ? "the sender" : "the main thread");
}

/* A signal for the process: the thread whose wait it ends is the one that gets it. */
static int directed(void)
{
    struct sigaction action = {.sa_handler = woken};
    struct timespec end;
    sem_t never;

    sem_init(&never, 0, 0);
    sigaction(SIGUSR1, &action, NULL);
    for (int i = 0; i < 3; i++) {
        pthread_create(&sender, NULL, kills, NULL);
        clock_gettime(CLOCK_REALTIME, &end);
        end.tv_sec += 5;
        sem_timedwait(&never, &end);
        printf("it ended with %s\n", strerror(errno));
        pthread_join(sender, NULL);
    }
    return 0;
}

/* Timers that count a process's own time: they are not over while it sleeps, and are when it has worked. */
static int timers(void)
{
    const int which[] = {ITIMER_VIRTUAL, ITIMER_PROF}, signals[] = {SIGVTALRM, SIGPROF};
    for (int i = 0; i < 2; i++) {
        struct itimerval value = {.it_value.tv_usec = 30000}, left;
        sigset_t set;
        struct timespec none = {0};
        sigemptyset(&set);
        sigaddset(&set, signals[i]);
        sigprocmask(SIG_BLOCK, &set, NULL);
        setitimer(which[i], &value, NULL);
        usleep(60000);
        getitimer(which[i], &left);
        printf("asleep: %d, left: %d\n", sigtimedwait(&set, NULL, &none), left.it_value.tv_usec > 10000);
        while (sigtimedwait(&set, NULL, &none) < 0)
            for (volatile int work = 0; work < 100000; work++)
                ;
        getitimer(which[i], &left);
        printf("over: %ld\n", left.it_value.tv_usec);
    }
    return 0;
}

/* What make asks of posix_spawn, and what a program asks of its users. */
static int identity(void)
{
    extern char **environ;
    char *arguments[] = {"sh", "-c", "exit 4", NULL};
    uid_t real, effective, saved;
    posix_spawnattr_t how;
    pid_t child;
    int status;

    posix_spawnattr_init(&how);
    posix_spawnattr_setflags(&how, POSIX_SPAWN_RESETIDS | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
    status = posix_spawnp(&child, "sh", NULL, &how, arguments, environ);
    printf("spawn: %s\n", strerror(status));
    waitpid(child, &status, 0);
    printf("it said %d\n", WEXITSTATUS(status));
    getresuid(&real, &effective, &saved);
    printf("all the same: %d\n", real == effective && real == saved && real == getuid());
    printf("set to what they are: %d %d\n", setresuid(-1, effective, -1), setregid(-1, getgid()));
    return 0;
}

static volatile sig_atomic_t seen;
static volatile double kept;
static void note(int signo, siginfo_t *info, void *context)
{
    ucontext_t *uc = context;
    double x = 1.0;
    for (int i = 0; i < 10; i++)
        x = x * 1.5 + info->si_pid; /* spoils xmm0.. of whoever was interrupted, which sigreturn puts back */
    kept = x;
    seen += signo == SIGUSR1 && info->si_signo == signo && uc->uc_mcontext.gregs[REG_RIP] != 0;
}

static char other_stack[65536];
static jmp_buf back;
static void on_fault(int signo, siginfo_t *info, void *context)
{
    char here;
    (void)context;
    printf("signal %d code %d at %p, on the other stack: %d\n", signo, info->si_code,
           signo == SIGFPE ? (void *)0 : info->si_addr,
           &here >= other_stack && &here < other_stack + sizeof other_stack);
    siglongjmp(back, 1);
}

static int handlers(void)
{
    struct sigaction act = {.sa_sigaction = note, .sa_flags = SA_SIGINFO | SA_RESTART};
    stack_t stack = {.ss_sp = other_stack, .ss_size = sizeof other_stack};
    int pipes[2];
    char byte = 0;
    double before = 3.25, after;
    sigaction(SIGUSR1, &act, NULL);
    __asm__ volatile("movsd %0, %%xmm7" : : "m"(before) : "xmm7");
    kill(getpid(), SIGUSR1);
    __asm__ volatile("movsd %%xmm7, %0" : "=m"(after));
    printf("seen %d, xmm7 %.2f\n", (int)seen, after);

    if (pipe(pipes))
        return 1;
    if (!fork()) {
        usleep(20000);
        kill(getppid(), SIGUSR1);
        usleep(20000);
        if (write(pipes[1], "x", 1) != 1)
            _exit(1);
        _exit(0);
    }
    ssize_t got = read(pipes[0], &byte, 1); /* SA_RESTART: goes on */
    printf("seen %d, read %zd %c\n", (int)seen, got, byte);
    wait(NULL);

    act.sa_flags = SA_SIGINFO;
    sigaction(SIGUSR1, &act, NULL);
    pid_t child = fork();
    if (!child) {
        usleep(20000);
        kill(getppid(), SIGUSR1);
        usleep(100000);
        _exit(0);
    }
    got = read(pipes[0], &byte, 1);
    printf("read %zd %s\n", got, got < 0 && errno == EINTR ? "EINTR" : "?");
    waitpid(child, NULL, 0);

    sigaltstack(&stack, NULL);
    struct sigaction fault = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGSEGV, &fault, NULL);
    if (!sigsetjmp(back, 1))
        *(volatile int *)0x123450 = 1;
    static const int fixed = 1;
    if (!sigsetjmp(back, 1))
        *(volatile int *)&fixed = 2;
    struct sigaction arith = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGFPE, &arith, NULL);
    if (!sigsetjmp(back, 1))
        __asm__ volatile("xorl %%ecx, %%ecx; movl $1, %%eax; cltd; idivl %%ecx" ::: "eax", "ecx", "edx");

    struct itimerval timer = {.it_value = {.tv_usec = 20000}};
    signal(SIGALRM, SIG_IGN);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGALRM, SIG_DFL);
    setitimer(ITIMER_REAL, &timer, NULL);
    printf("sigtimedwait %d\n", sigwaitinfo(&set, NULL));
    return 0;
}

static int spin(const char *name)
{
    struct timespec start, now;
    volatile unsigned long turns = 0;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        for (int i = 0; i < 100000; i++)
            turns++;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 < 600);
    printf("%s %lu\n", name, turns);
    return 0;
}

static int memory(void)
{
    size_t size = 8 << 20;
    unsigned char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (size_t i = 0; i < size; i += 4096)
        p[i] = (unsigned char)(i >> 12);
    *shared = 0;
    if (!fork()) {
        for (size_t i = 0; i < size; i += 8192)
            p[i] = 255;
        *shared = 42;
        _exit(p[4096] == 1 ? 0 : 1);
    }
    int status;
    wait(&status);
    int wrong = 0;
    for (size_t i = 0; i < size; i += 4096)
        wrong += p[i] != (unsigned char)(i >> 12);
    p = mremap(p, size, 2 * size, MREMAP_MAYMOVE);
    printf("child %d, wrong %d, shared %d, moved %d %d\n", status, wrong, *shared, p[4096 * 7], p[size + 5]);
    munmap(p, 2 * size);
    return 0;
}

static int forks(int argc, char **argv)
{
    int times = argc > 2 ? atoi(argv[2]) : 100;
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int i = 0; i < times; i++) {
        pid_t child = fork();
        if (!child) {
            if (argc > 3)
                execv(argv[3], argv + 3);
            _exit(0);
        }
        waitpid(child, NULL, 0);
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    printf("%.1f us\n", ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec)) / 1e3 / times);
    return 0;
}

/* The cheapest calls there are, three a turn; 1 000 turns first that nobody counts, then a line from the terminal between them. */
static int calls(long times)
{
    int zero = open("/dev/zero", O_RDONLY), null = open("/dev/null", O_WRONLY);
    char byte;

    for (long i = 0; i < 1000 + times; i++) {
        if (i == 1000 && (puts("ready"), getchar() != '\n'))
            return 1;
        if (syscall(SYS_getpid) < 1 || read(zero, &byte, 1) != 1 || write(null, &byte, 1) != 1)
            return 1;
    }
    puts("done");
    return getchar() != '\n';
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!strcmp(what, "threads"))
        return threads();
    if (!strcmp(what, "handlers"))
        return handlers();
    if (!strcmp(what, "directed"))
        return directed();
    if (!strcmp(what, "identity"))
        return identity();
    if (!strcmp(what, "timers"))
        return timers();
    if (!strcmp(what, "locks"))
        return locks();
    if (!strcmp(what, "spin"))
        return spin(argv[2]);
    if (!strcmp(what, "memory"))
        return memory();
    if (!strcmp(what, "forks"))
        return forks(argc, argv);
    if (!strcmp(what, "calls"))
        return calls(atol(argv[2]));
    if (!strcmp(what, "lost")) /* a system call of the gate's page that is not the gate's */
        __asm__ volatile("mov $39, %%eax; jmp *%0" : : "r"(0x7ffc000005) : "rax");
    if (!strcmp(what, "wild"))
        *(volatile int *)0x7fffff0000 = 1;
    return 2;
}
