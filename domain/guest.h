/* The guest's C half: hypercall transport, event bitmaps, memory, page faults, raw system calls. build_guest.py hands these to cffi. */
#ifndef RING1_GUEST_H
#define RING1_GUEST_H

#include <stdint.h>

#include "spin.h"

#define GVA_FAULT 0x100 /* of gva_copy's result: it faulted; the low byte is the error code */

/* cdef begin */
int32_t hypercall_post(int32_t request, const void *message, uint64_t size);
int64_t hypercall_answer(int32_t reply, void *answer, uint64_t room);
int64_t hypercall_trap(int32_t request, int32_t reply, const void *message, uint64_t size, void *answer, uint64_t room);
int32_t upcall_drain(void *shared_info, uint32_t *ports, uint32_t max);
void upcall_mask(void *shared_info);
int32_t upcall_unmask(void *shared_info);
#define IDLE_PORTS 256
struct wanted { /* struct pollfd */
    int32_t fd;
    int16_t events, revents;
};
struct idle {
    void *shared_info;
    struct wanted *fds; /* the upcall's own, and those that somebody waits for */
    uint32_t nr_fds;
    uint32_t nr_ready;                    /* OUT: how many have revents */
    uint32_t nr_ports, ports[IDLE_PORTS]; /* OUT: what was pending */
    struct spin spin;
};
void idle(struct idle *i, int32_t sleep);
void event_mask(void *shared_info, uint32_t port);
uint64_t system_time(void *shared_info, uint64_t boot_ns, uint64_t *last);
uint64_t wall_base(void *shared_info);
void memory_copy(void *to, const void *from, uint64_t size);
void memory_zero(void *at, uint64_t size);
int32_t grant_set(void *table, uint32_t ref, uint16_t flags, uint16_t domid, uint32_t frame);
int32_t grant_end(void *table, uint32_t ref);
int32_t callring_round(void *front, const void *entries, uint32_t count, uint32_t *pushed, void *answers,
                       uint32_t *answered, struct spin *spin);
int64_t gva_copy(void *to, const void *from, uint64_t size);
int64_t gva_store(void *to, uint64_t value);
uint64_t fault_handler(int32_t request, int32_t reply, const void *message, uint32_t size, uint32_t cr2_at, uint32_t error_at,
                       uint32_t rip_at, const void *cr2);
#define USER_SYSCALL 0
#define USER_FAULT 1
#define USER_EXCEPTION 2
#define USER_TIMEOUT 3
#define USER_UPCALL 4
#define USER_DEAD 5
#define USER_LATE 6
#define USER_STALE 7
struct user { /* the space of a program, as its kernel knows it; user.c */
    char *control; /* the control region, in this kernel's memory */
    void *shared_info;
    uint64_t frame, fpu; /* offsets in the region, for good */
    uint32_t fpu_bytes, upcall;
    uint64_t registers[27]; /* struct user_regs_struct */
    uint64_t came_with[27]; /* of a direct call */
    uint64_t number, arguments[6], address;
    uint32_t native, error, vector;
    uint32_t told;   /* 1: it was told to give the CPU back, and has not yet */
    uint32_t direct; /* 1: it is in a direct call, and has no frame */
    uint32_t lost;   /* 1: it did not come into a frame, and is not given the turn again */
    uint64_t traps; /* so far */
};
int32_t user_init(void);
int32_t user_begin(struct user *u, int64_t ns);
int32_t user_run(struct user *u, int64_t ns);
int32_t user_wait(struct user *u, int64_t ns);
int32_t user_frame(struct user *u);
int64_t raw6(int64_t nr, int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f);
/* cdef end */

#endif
