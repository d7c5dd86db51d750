/* What the cases of exceptions.c are made of: handlers of all vectors that remember what they found, and one line each for the test. */
#ifndef EXCEPTIONS_H
#define EXCEPTIONS_H

#include "kernel.h"
#include "ring1_mmu.h"

enum { SYS_rt_sigaction = 13, SYS_rt_sigprocmask = 14, SYS_rt_sigreturn = 15, SYS_getpid = 39, SYS_kill = 62, SYS_sigaltstack = 131 };
enum { TF = 0x100, DF = 0x400, NT = 0x4000, AC = 0x40000 };
#define HIDDEN __attribute__((visibility("hidden")))

struct context { /* as the entries of all vectors push it */
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax, vector, error, rip, cs, rflags, rsp, ss;
};
extern HIDDEN struct context seen;          /* the last one */
extern HIDDEN uint64_t seen_at, times;      /* where its frame lay; how many there were */
extern HIDDEN uint64_t resume, resume_rsp;  /* where the next one ends, once; 0: where it came from. With this stack pointer; 0: its own */
extern HIDDEN uint64_t expected;            /* the instruction that RAISE expects it of */
extern HIDDEN uint64_t keep_stepping;       /* how many single steps are taken before TF is cleared */
extern HIDDEN uint8_t mask_seen;            /* evtchn_upcall_mask in the handler */
extern HIDDEN const char handlers[];        /* 16 bytes a vector */
extern HIDDEN const char failsafe_handler[], event_handler[], twin_handler[], faulting_handler[];
extern HIDDEN uint64_t twins, events, event_saved, event_masked; /* how often those two were entered, and what the last event saw */

void handle(uint32_t vector, uint32_t flags);
void handle_all(void);                      /* those that may be, with DPL 0 */
int64_t register_one(uint32_t vector, uint32_t flags, uint64_t address);
void *page(uint32_t n);                     /* one of ours that nobody uses */

/* One instruction, after what makes it ready, that raises something; it is gone on behind it. */
#define RAISE(before, instruction) \
    __asm__ volatile("lea 2f(%%rip),%%rax\n mov %%rax,resume(%%rip)\n lea 1f(%%rip),%%rax\n mov %%rax,expected(%%rip)\n" before \
                     "\n1: " instruction "\n2:" : : : "rax", "rcx", "rdx", "rdi", "memory", "cc")
/* On another stack. */
#define RAISE_ON(stack, instruction) \
    __asm__ volatile("lea 2f(%%rip),%%rax\n mov %%rax,resume(%%rip)\n lea 1f(%%rip),%%rax\n mov %%rax,expected(%%rip)\n" \
                     "mov %%rsp,resume_rsp(%%rip)\n mov %0,%%rsp\n1: " instruction "\n2: mov %%rsp,%%rsp" \
                     : : "D"(stack) : "rax", "rcx", "rdx", "r11", "memory", "cc")

void word(const char *text);
void note(int64_t number);
void flush(void);                           /* say the line */
void told(const char *name);                /* a line: name, vector, error code, how far behind `expected` */

int case_each(const char *name);
int case_hostile(const char *name);
int case_returns(const char *name);
int case_events(const char *name);
#define CASE(text, call) \
    if (same(name, text)) { \
        call; \
        return 1; \
    }

#endif
