/* intercept HOW PROGRAM ARGUMENT ...: a program whose getpid() another process answers, as tools that watch system calls do it.
 *
 * sysemu: a tracer stops it at every call, and has it made only if it is no getpid.
 * notify: its filter hands getpid, and nothing else, to a supervisor. */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SYSTEM_CALL = SIGTRAP | 0x80, INSTRUCTION = 2, OURS = 4711 };

static int failed(const char *what)
{
    perror(what);
    return 1;
}

/* Until it stops for a system call; 0 where it ends instead. Its signals are handed on. */
static int next(pid_t pid, enum __ptrace_request how)
{
    int status;
    long sig = 0;

    for (;;) {
        if (ptrace(how, pid, 0, sig) || waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status))
            return 0;
        if (WSTOPSIG(status) == SYSTEM_CALL)
            return 1;
        sig = WSTOPSIG(status) == SIGTRAP ? 0 : WSTOPSIG(status);
    }
}

static int sysemu(char **argv)
{
    struct user_regs_struct regs;
    int status;
    pid_t pid = fork();

    if (!pid) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        execv(argv[0], argv);
        _exit(127);
    }
    if (waitpid(pid, &status, 0) != pid || ptrace(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL))
        return failed("ptrace");
    while (next(pid, PTRACE_SYSEMU)) {
        ptrace(PTRACE_GETREGS, pid, 0, &regs);
        if (regs.orig_rax == SYS_getpid) {
            regs.rax = OURS;
            ptrace(PTRACE_SETREGS, pid, 0, &regs);
            continue;
        }
        regs.rax = regs.orig_rax, regs.rip -= INSTRUCTION; /* again, and this time the host's kernel has it */
        ptrace(PTRACE_SETREGS, pid, 0, &regs);
        if (!next(pid, PTRACE_SYSCALL) || !next(pid, PTRACE_SYSCALL))
            break;
    }
    return 0;
}

static int filter(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};

    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
}

static void on_end(int sig)
{
    (void)sig;
    _exit(0);
}

static int notify(char **argv)
{
    int ends[2], theirs = -1, pidfd, fd;
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
        return failed("socketpair");
    if (!(pid = fork())) {
        theirs = filter();
        if (theirs < 0 || write(ends[1], &theirs, sizeof theirs) < 0 || read(ends[1], &theirs, 1) != 1)
            _exit(127);
        execv(argv[0], argv);
        _exit(127);
    }
    close(ends[1]);
    if (read(ends[0], &theirs, sizeof theirs) != sizeof theirs)
        return failed("seccomp");
    pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pidfd < 0 || (fd = (int)syscall(SYS_pidfd_getfd, pidfd, theirs, 0)) < 0)
        return failed("pidfd_getfd");
    signal(SIGCHLD, on_end);
    if (write(ends[0], "x", 1) != 1)
        return failed("write");
    for (;;) {
        struct seccomp_notif call;
        struct seccomp_notif_resp reply;

        memset(&call, 0, sizeof call);
        if (ioctl(fd, SECCOMP_IOCTL_NOTIF_RECV, &call))
            continue;
        reply = (struct seccomp_notif_resp){.id = call.id, .val = OURS};
        ioctl(fd, SECCOMP_IOCTL_NOTIF_SEND, &reply);
    }
}

int main(int argc, char **argv)
{
    if (argc > 2 && !strcmp(argv[1], "sysemu"))
        return sysemu(argv + 2);
    if (argc > 2 && !strcmp(argv[1], "notify"))
        return notify(argv + 2);
    return fputs("intercept sysemu|notify PROGRAM ...\n", stderr), 2;
}
