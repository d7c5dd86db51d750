/* The notify protocol of ringlib/ring.h, for every interleaving, on a machine that keeps stores back (x86: TSO).
 *
 * A front pushes N requests through a ring of R slots, one or two at a time, and sleeps while it waits for answers or for
 * room; a back takes them, answers them in the same slots, and sleeps while there is nothing to take. Each store goes into a
 * first-in-first-out buffer of its process and reaches memory at some later moment, which the drains choose. Indexes count
 * modulo M as they do modulo 2^32, and pass it on the way.
 *
 * Two things are asked. The assertions: no slot is seen before it is filled, no index is where it cannot be, every answer is
 * that of its request. And an end: a state in which nobody can move and not both have finished is a wake-up that was lost.
 *
 *     spin -a notify.pml && gcc -O2 -DSAFETY -o pan pan.c && ./pan
 *
 * What a macro takes away, and what then happens (test_notify.py runs them all):
 *     NO_PRODUCER_BARRIER, NO_CONSUMER_BARRIER, NO_FINAL_CHECK, EQUAL_ONLY    a lost wake-up
 *     PUBLISH_FIRST                                                           a slot seen before it is filled
 *     SC                                      stores reach memory at once: then the barriers are not missed at all, which is
 *                                             why a model without buffers would prove nothing
 *
 * A line that begins with C: is the line of ring.h that the next one stands for; the test holds the two together. */

#define N 5      /* requests in all */
#define R 2      /* slots */
#define M 8      /* indexes count modulo this */
#define START 6
#define AFTER_START 7

/* what is at an address: indexes 0 to 3, then the slots */
#define REQ_PROD 0
#define REQ_EVENT 1
#define RSP_PROD 2
#define RSP_EVENT 3
#define SLOT(index) (4 + (index) % R)
byte memory[6] = { START, AFTER_START, START, AFTER_START, 0, 0 };

#define MINUS(a, b) ((M + (a) - (b)) % M)
#define REQUEST 10 /* the i-th request is written as REQUEST + i */
#define RESPONSE 20

bool wake_front, wake_back; /* events: a level that stays until it is taken */

chan front_stores = [4] of { byte, byte };
chan back_stores = [4] of { byte, byte };

#ifdef SC
#define STORE(buffer, where, what) memory[where] = what
#define FENCE(buffer) skip
#else
#define STORE(buffer, where, what) buffer!where, what
#define FENCE(buffer) empty(buffer)
#endif
#ifdef NO_PRODUCER_BARRIER
#define PRODUCER_FENCE(buffer) skip
#else
#define PRODUCER_FENCE(buffer) FENCE(buffer)
#endif
#ifdef NO_CONSUMER_BARRIER
#define CONSUMER_FENCE(buffer) skip
#else
#define CONSUMER_FENCE(buffer) FENCE(buffer)
#endif
#ifdef EQUAL_ONLY
#define ASKED_FOR(event, old, new) ((new) == (event))
#else
#define ASKED_FOR(event, old, new) (MINUS(new, event) < MINUS(new, old))
#endif

/* Neither side reads what it has written itself and not yet drained: an index of its own it keeps in private, and a slot
 * comes back only after the other side saw the index that was stored behind it. So loads go to memory. */
active proctype front_buffer()
{
    byte where, what;
end:
    do
    :: d_step { front_stores?where, what -> memory[where] = what; where = 0; what = 0 }
    od
}

active proctype back_buffer()
{
    byte where, what;
end:
    do
    :: d_step { back_stores?where, what -> memory[where] = what; where = 0; what = 0 }
    od
}

/* ring_front_publish and ring_back_publish: n records of a kind from number `first` on, then ring_push */
inline fill(buffer, old, n, first, kind)
{
    i = 0;
    do
    :: i < n -> STORE(buffer, SLOT(old + i), kind + first + i); i++
    :: else -> break
    od
}

inline push(buffer, PROD, EVENT, old, n, first, kind, wake)
{
#ifdef PUBLISH_FIRST
    STORE(buffer, PROD, (old + n) % M);
    fill(buffer, old, n, first, kind);
#else
    /* C: ring_copy_in(f->sh, old, f->nr_ents, f->slot_size, requests, f->req_size, n); */
    fill(buffer, old, n, first, kind);
    /* C: atomic_store_explicit(prod, new, memory_order_release); */
    STORE(buffer, PROD, (old + n) % M);
#endif
    /* C: atomic_thread_fence(memory_order_seq_cst); */
    PRODUCER_FENCE(buffer);
    /* C: return (uint32_t)(new - atomic_load_explicit(event, memory_order_relaxed)) < (uint32_t)(new - old); */
    event = memory[EVENT];
    if
    :: ASKED_FOR(event, old, (old + n) % M) -> wake = true
    :: else
    fi;
    event = 0
}

/* ring_final_check for the next entry, then sleep; `seen` is what the last look at PROD showed */
inline sleep(buffer, PROD, EVENT, cons, wake)
{
    /* C: if ((uint32_t)(atomic_load_explicit(prod, memory_order_acquire) - cons) >= want) */
    seen = memory[PROD];
    if
    :: seen != cons
    :: else ->
        /* C: atomic_store_explicit(event, cons + want, memory_order_relaxed); */
        STORE(buffer, EVENT, (cons + 1) % M);
        /* C: atomic_thread_fence(memory_order_seq_cst); */
        CONSUMER_FENCE(buffer);
        /* C: return (uint32_t)(atomic_load_explicit(prod, memory_order_acquire) - cons) >= want; */
#ifndef NO_FINAL_CHECK
        seen = memory[PROD];
#endif
        if
        :: seen != cons
        :: else -> wake -> wake = false
        fi
    fi;
    seen = 0
}

active proctype front()
{
    byte prod = START, cons = START, sent, got, seen, event, i, n;

    do
    :: got == N -> break
    :: else ->
        /* take: ring_front_take */
        seen = memory[RSP_PROD];
        assert(MINUS(seen, cons) <= MINUS(prod, cons));
        do
        :: seen != cons ->
            assert(memory[SLOT(cons)] == RESPONSE + got);
            cons = (cons + 1) % M;
            got++
        :: else -> break
        od;
        seen = 0;
        /* publish what there is room for, or sleep */
        if
        :: sent < N && MINUS(prod, cons) < R ->
            if
            :: n = 1
            :: sent + 2 <= N && MINUS(prod, cons) + 2 <= R -> n = 2
            fi;
            push(front_stores, REQ_PROD, REQ_EVENT, prod, n, sent, REQUEST, wake_back);
            prod = (prod + n) % M;
            sent = sent + n;
            n = 0
        :: else ->
            if
            :: got < N -> sleep(front_stores, RSP_PROD, RSP_EVENT, cons, wake_front)
            :: else
            fi
        fi
    od
}

active proctype back()
{
    byte prod = START, cons = START, taken, answered, seen, event, i, n;

    do
    :: answered == N -> break
    :: else ->
        /* take: ring_back_take, all or only the next */
        seen = memory[REQ_PROD];
        assert(MINUS(seen, cons) <= R - MINUS(cons, prod));
        do
        :: seen != cons ->
            assert(memory[SLOT(cons)] == REQUEST + taken);
            cons = (cons + 1) % M;
            taken++
        :: seen == cons || cons != prod -> break
        od;
        seen = 0;
        /* answer what was taken, or sleep */
        n = MINUS(cons, prod);
        if
        :: n > 0 ->
            push(back_stores, RSP_PROD, RSP_EVENT, prod, n, answered, RESPONSE, wake_front);
            prod = cons;
            answered = answered + n
        :: else -> sleep(back_stores, REQ_PROD, REQ_EVENT, cons, wake_back)
        fi;
        n = 0
    od
}
