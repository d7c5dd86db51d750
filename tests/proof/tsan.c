/* Two threads over one ring: requests with room in every byte for a race, answers the other way, sleeps between. What is
 * wrong with it is said by the thread sanitizer; what is wrong with the records, by us. */
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>

#include "record.h"
#include "ring.h"

enum { REQUEST = 112, RESPONSE = 16, BATCH = 32 };

static _Alignas(64) char page[4096];
static struct ring_front front;
static struct ring_back back;
static sem_t to_back, to_front; /* the events */
static uint32_t requests;

static void must(int holds, const char *what, uint32_t at)
{
    if (!holds) {
        fprintf(stderr, "request %u: %s\n", at, what);
        exit(2);
    }
}

static void check(const char *record, uint32_t size, uint32_t number)
{
    must(whole(record, size, number), "another came, or half of it", number);
}

static void *ask(void *unused)
{
    char out[BATCH * REQUEST], in[BATCH * RESPONSE];
    uint32_t sent = 0, got = 0;

    while (got < requests) {
        uint32_t n = 1 + (sent * 2654435761u >> 16) % BATCH;
        int32_t r;

        n = n < requests - sent ? n : requests - sent;
        n = n < ring_front_free(&front) ? n : ring_front_free(&front);
        for (uint32_t i = 0; i < n; i++)
            fill(out + i * REQUEST, REQUEST, sent + i);
        if (n && ring_front_publish(&front, out, n) == 1)
            sem_post(&to_back);
        sent += n;
        r = ring_front_take(&front, in, BATCH);
        must(r >= 0, "the answers' index cannot be", got);
        for (int32_t i = 0; i < r; i++)
            check(in + i * RESPONSE, RESPONSE, got++);
        if (got < requests && !n && !r && !ring_front_recheck(&front))
            sem_wait(&to_front);
    }
    return unused;
}

static void *answer(void *unused)
{
    char in[BATCH * REQUEST], out[BATCH * RESPONSE];
    uint32_t got = 0;

    while (got < requests) {
        int32_t r = ring_back_take(&back, in, 1 + got % BATCH);

        must(r >= 0, "the requests' index cannot be", got);
        for (int32_t i = 0; i < r; i++, got++) {
            check(in + i * REQUEST, REQUEST, got);
            fill(out + i * RESPONSE, RESPONSE, got);
        }
        if (r && ring_back_publish(&back, out, (uint32_t)r) == 1)
            sem_post(&to_front);
        if (!r && !ring_back_recheck(&back))
            sem_wait(&to_back);
    }
    return unused;
}

int main(int argc, char **argv)
{
    pthread_t threads[2];

    requests = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 0) : 0;
    sem_init(&to_back, 0, 0);
    sem_init(&to_front, 0, 0);
    if (ring_front_init(&front, page, sizeof page, REQUEST, RESPONSE) ||
        ring_back_attach(&back, page, sizeof page, REQUEST, RESPONSE))
        return 1;
    if (pthread_create(&threads[0], NULL, ask, NULL) || pthread_create(&threads[1], NULL, answer, NULL))
        return 1;
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    printf("%u requests answered\n", requests);
    return 0;
}
