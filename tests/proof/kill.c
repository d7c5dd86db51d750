/* kill front|back|writer|reader|answerer EVERY: run one side of a ring step by step in a child, SIGKILL it after the first, the
 * EVERYth, the 2 * EVERYth ... instruction, and look each time as its peer would: no index that cannot be, no slot that is
 * half filled, nothing lost of what the dead one was told is done, and the ring goes on, with a new peer. Prints the points
 * and the violations; exit 77: this host refuses ptrace. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "record.h"
#include "ringlib.h"

enum { REQUEST = 48, RESPONSE = 48, ENTRIES = 8, BYTES = 16, TEXT = 40, BEFORE = 5, MORE = 3 * ENTRIES };
enum { RING = 64 + ENTRIES * REQUEST, OBJECT = 4096 + 2 * RING };

/* What both processes see. `told`: what calls of the child's returned, so that it may count on it. */
static struct shared {
    _Alignas(64) char page[RING];
    _Atomic uint32_t told;
    _Atomic uint32_t cons, prod; /* of the byte ring */
    char bytes[BYTES];
    _Alignas(64) char object[OBJECT]; /* of a SharedRing */
} *shared;

static struct ring_front front;
static struct ring_back back;
static char text[TEXT];
static const char *wrong;

static void violation(const char *what)
{
    if (!wrong)
        wrong = what;
}

/* ---- a ring in the middle of its work: five requests asked, four taken, three answered; indexes pass 2^32 */

static uint32_t asked, answered, got_requests, got_responses; /* numbers of the next ones, on either side */

static int publish(uint32_t n)
{
    char out[ENTRIES * REQUEST];

    for (uint32_t i = 0; i < n; i++)
        fill(out + i * REQUEST, REQUEST, asked + i);
    if (ring_front_publish(&front, out, n) < 0)
        return 0;
    asked += n;
    return 1;
}

static int answer(uint32_t n)
{
    char out[ENTRIES * RESPONSE];

    for (uint32_t i = 0; i < n; i++)
        fill(out + i * RESPONSE, RESPONSE, 1000 + answered + i);
    if (ring_back_publish(&back, out, n) < 0)
        return 0;
    answered += n;
    return 1;
}

/* Take at most `max`, which must go on from where the last ones ended. Returns how many, or less than 0. */
static int take_requests(uint32_t max)
{
    char in[ENTRIES * REQUEST];
    int32_t n = ring_back_take(&back, in, max);

    for (int32_t i = 0; i < n; i++)
        if (!whole(in + i * REQUEST, REQUEST, got_requests++))
            violation("a request that is not whole, or not the next");
    if (n < 0)
        violation("a request index that cannot be");
    return n;
}

static int take_responses(void)
{
    char in[ENTRIES * RESPONSE];
    int32_t n = ring_front_take(&front, in, ENTRIES);

    for (int32_t i = 0; i < n; i++)
        if (!whole(in + i * RESPONSE, RESPONSE, 1000 + got_responses++))
            violation("a response that is not whole, or not the next");
    if (n < 0)
        violation("a response index that cannot be");
    return n;
}

static void begin(uint32_t start)
{
    ring_front_init(&front, shared->page, sizeof shared->page, REQUEST, RESPONSE);
    front.req_prod_pvt = front.rsp_cons = front.rsp_seen = start;
    atomic_store(&front.sh->req_prod, start);
    atomic_store(&front.sh->rsp_prod, start);
    ring_back_attach(&back, shared->page, sizeof shared->page, REQUEST, RESPONSE);
}

static char requests[3 * REQUEST], responses[2 * RESPONSE]; /* what the child will publish */

static void prepare(void)
{
    memset(shared, 0, sizeof *shared);
    asked = answered = got_requests = got_responses = 0;
    begin((uint32_t)-BEFORE - 1);
    if (!publish(BEFORE) || take_requests(BEFORE - 1) != BEFORE - 1 || !answer(3))
        violation("the ring did not even begin");
    for (uint32_t i = 0; i < 3; i++)
        fill(requests + i * REQUEST, REQUEST, asked + i);
    for (uint32_t i = 0; i < 2; i++)
        fill(responses + i * RESPONSE, RESPONSE, 1000 + answered + i);
    for (uint32_t i = 0; i < TEXT; i++)
        text[i] = (char)(i + 1);
    atomic_store(&shared->cons, UINT32_MAX - 3);
    atomic_store(&shared->prod, UINT32_MAX - 3);
}

/* Everybody finishes what is there; then more, all the way round the ring. */
static void finish(void)
{
    for (int round = 0; round < 4 && got_responses < asked && !wrong; round++)
        if (take_requests(ENTRIES) < 0 || !answer(back.req_cons - back.rsp_prod_pvt) || take_responses() < 0)
            violation("the ring does not go on");
    if (got_responses != asked || got_requests != asked)
        violation("something was lost on the way");
}

static void go_on(void)
{
    finish();
    for (int i = 0; i < MORE && !wrong; i++) {
        if (!publish(1 + (uint32_t)i % 3))
            violation("the ring has no room any more");
        finish();
    }
}

/* ---- what the child does, and what the other side finds */

static void front_acts(void)
{
    char in[ENTRIES * RESPONSE];

    ring_front_publish(&front, requests, 2);
    atomic_store(&shared->told, 2);
    ring_front_take(&front, in, 2);
    ring_front_recheck(&front);
    ring_front_publish(&front, requests + 2 * REQUEST, 1);
    atomic_store(&shared->told, 3);
    ring_front_take(&front, in, ENTRIES);
    ring_front_recheck(&front);
}

/* The backend answers what it finds; then the dead one's domain is gone, and another one initialises a ring here. */
static void back_remains(void)
{
    uint32_t told = BEFORE + atomic_load(&shared->told);

    ring_back_recheck(&back);
    take_requests(ENTRIES);
    if (got_requests < told)
        violation("a request that was published is lost");
    if (!wrong && !answer(back.req_cons - back.rsp_prod_pvt))
        violation("the dead one's requests cannot be answered");
    asked = answered = got_requests = got_responses = 0;
    begin(0);
    go_on();
}

static void back_acts(void)
{
    char in[ENTRIES * REQUEST];

    ring_back_publish(&back, responses, 1);
    atomic_store(&shared->told, 1);
    ring_back_take(&back, in, 1);
    ring_back_publish(&back, responses + RESPONSE, 1);
    atomic_store(&shared->told, 2);
    ring_back_take(&back, in, 1);
    ring_back_recheck(&back);
}

/* The frontend takes what was answered. What was not may be overwritten, for an answer lies where its request lay: it asks
 * again, from its own copies, on a ring that it has initialised again. */
static void front_remains(void)
{
    uint32_t told = answered + atomic_load(&shared->told), lost;

    ring_front_recheck(&front);
    take_responses();
    if (got_responses < told)
        violation("a response that was published is lost");
    if (wrong)
        return;
    lost = asked - got_responses;
    asked = answered = got_requests = got_responses;
    begin(UINT32_MAX);
    if (!publish(lost))
        violation("what was not answered cannot be asked again");
    go_on();
}

/* ---- a byte ring: TEXT through BYTES of room, indexes from 4 below 2^32 */

static int32_t write_text(uint32_t from, uint32_t n)
{
    return bytes_write(shared->bytes, &shared->cons, &shared->prod, BYTES, text + from, n);
}

static uint32_t written(void) { return atomic_load(&shared->prod) + 4; }

/* Whoever is left, and a new peer, bring the rest across; `from` is the first byte that was not read. */
static void bytes_go_on(uint32_t from)
{
    if (from > written() || written() > from + BYTES || written() > TEXT)
        violation("an index that cannot be");
    while (!wrong && from < TEXT) {
        char in[BYTES];
        int32_t n = write_text(written(), TEXT - written());

        if (n >= 0)
            n = bytes_read(shared->bytes, &shared->cons, &shared->prod, BYTES, in, 1 + from % BYTES);
        if (n <= 0)
            violation("the bytes do not go on");
        else if (memcmp(in, text + from, (size_t)n))
            violation("a byte that was not written");
        from += n > 0 ? (uint32_t)n : 0;
    }
}

static void writer_acts(void)
{
    write_text(0, 7);
    atomic_store(&shared->told, 7);
    write_text(7, 9);
    atomic_store(&shared->told, 16);
}

static void reader_remains(void)
{
    if (written() < atomic_load(&shared->told))
        violation("bytes that were written are lost");
    bytes_go_on(0);
}

static void reader_acts(void)
{
    char in[BYTES];

    bytes_read(shared->bytes, &shared->cons, &shared->prod, BYTES, in, 5);
    atomic_store(&shared->told, 5);
    bytes_read(shared->bytes, &shared->cons, &shared->prod, BYTES, in, 9);
    atomic_store(&shared->told, 14);
}

static void writer_remains(void)
{
    uint32_t read = atomic_load(&shared->cons) + 4;

    if (read < atomic_load(&shared->told))
        violation("bytes that were read come again");
    bytes_go_on(read);
}

/* ---- a SharedRing: what a back that died took and did not answer is taken again, whole, by the next one */

static _Alignas(64) char asker[SHARED_STATE], answerer[SHARED_STATE];

static void open_end(char *state, uint32_t side)
{
    if (shared_open(state, shared->object, OBJECT, RING, side, REQUEST, RESPONSE) != ENTRIES)
        violation("the ring cannot be opened");
}

static void answer_requests(void)
{
    char in[ENTRIES * REQUEST], out[ENTRIES * RESPONSE];
    int32_t n = shared_take(answerer, in, ENTRIES, 0);

    for (int32_t i = 0; i < n; i++, got_requests++) {
        if (!whole(in + i * REQUEST, REQUEST, got_requests))
            violation("a request that is not whole, or not the next");
        fill(out + i * RESPONSE, RESPONSE, 1000 + got_requests);
    }
    if (n < 0 || shared_publish(answerer, out, (uint64_t)n * RESPONSE, 0))
        violation("the requests cannot be answered");
}

static void take_answers(void)
{
    char in[ENTRIES * RESPONSE];
    int32_t n = shared_take(asker, in, ENTRIES, 0);

    for (int32_t i = 0; i < n; i++)
        if (!whole(in + i * RESPONSE, RESPONSE, 1000 + got_responses++))
            violation("a response that is not whole, or not the next");
}

static void ask_more(uint32_t n)
{
    char out[ENTRIES * REQUEST];

    for (uint32_t i = 0; i < n; i++)
        fill(out + i * REQUEST, REQUEST, asked + i);
    if (shared_publish(asker, out, (uint64_t)n * REQUEST, 0))
        violation("the ring has no room any more");
    asked += n;
}

/* Six answered; then five asked, four taken, none answered, the slots of them on both sides of the ring's end. */
static void answerer_prepares(void)
{
    char in[ENTRIES * REQUEST];

    asked = got_requests = got_responses = 0;
    open_end(asker, 0);
    open_end(answerer, 1);
    ask_more(6);
    answer_requests();
    take_answers();
    ask_more(BEFORE);
    if (shared_take(answerer, in, BEFORE - 1, 0) != BEFORE - 1)
        violation("the ring did not even begin");
    for (uint32_t i = 0; i < 2; i++)
        fill(responses + i * RESPONSE, RESPONSE, 1000 + got_requests + i);
}

static void answerer_acts(void)
{
    shared_publish(answerer, responses, RESPONSE, 0);
    atomic_store(&shared->told, 1);
    shared_publish(answerer, responses + RESPONSE, RESPONSE, 0);
    atomic_store(&shared->told, 2);
}

static void asker_remains(void)
{
    uint32_t told = got_responses + atomic_load(&shared->told);

    take_answers();
    if (got_responses < told)
        violation("a response that was published is lost");
    got_requests = got_responses; /* a new back takes again what was not answered, and nothing else */
    open_end(answerer, 1);
    for (uint32_t i = 0; i < MORE && !wrong; i++) {
        answer_requests();
        take_answers();
        if (got_responses != asked)
            violation("something was lost on the way");
        ask_more(1 + i % 3);
    }
}

static const struct side {
    const char *name;
    uint32_t written; /* bytes that are there before */
    void (*acts)(void), (*remains)(void);
} sides[] = {
    {"front", 0, front_acts, back_remains},
    {"back", 0, back_acts, front_remains},
    {"writer", 0, writer_acts, reader_remains},
    {"reader", BYTES, reader_acts, writer_remains},
    {"answerer", 0, answerer_acts, asker_remains},
};

/* ---- the killer */

/* A child that stands at the first instruction of what it does. */
static pid_t start(const struct side *side)
{
    pid_t child = fork();
    int status;

    if (!child) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL))
            _exit(77);
        raise(SIGSTOP);
        side->acts();
        _exit(wrong != NULL);
    }
    if (child < 0 || waitpid(child, &status, 0) < 0)
        exit(1);
    if (!WIFSTOPPED(status))
        exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
    return child;
}

/* `steps` instructions further: 1; 0: it ended before. */
static int step(pid_t child, uint32_t steps)
{
    int status;

    while (steps--)
        if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) || waitpid(child, &status, 0) < 0 || !WIFSTOPPED(status)) {
            if (!WIFEXITED(status) || WEXITSTATUS(status))
                violation("left alone it did not end well");
            return 0;
        }
    return 1;
}

int main(int argc, char **argv)
{
    const struct side *side = sides, *end = sides + sizeof sides / sizeof *sides;
    uint32_t every = argc == 3 ? (uint32_t)strtoul(argv[2], NULL, 0) : 0, points = 0, violations = 0;
    const char *first = NULL;
    int alive = 1;

    while (side < end && argc == 3 && strcmp(side->name, argv[1]))
        side++;
    if (!every || side == end)
        return 2;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return 1;
    for (uint32_t at = 0; alive; at += every, points++) {
        pid_t child;

        prepare();
        write_text(0, side->written);
        if (side->acts == answerer_acts)
            answerer_prepares();
        child = start(side);
        alive = step(child, at);
        if (alive) {
            kill(child, SIGKILL);
            waitpid(child, NULL, 0);
        }
        side->remains();
        violations += wrong != NULL;
        first = first ? first : wrong;
        wrong = NULL;
    }
    printf("%u points, %u violations%s%s\n", points, violations, first ? ": " : "", first ? first : "");
    return 0;
}
