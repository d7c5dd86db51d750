/* Where there is no libFuzzer: RUNS random plays, the same ones for the same SEED, or the plays in files.
 *
 *     program RUNS SEED
 *     program FILE ...
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { LONGEST = 400 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t state;

static uint32_t dice(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}

static int replay(const char *path)
{
    uint8_t *play = malloc(LONGEST);
    FILE *file = fopen(path, "rb");
    size_t size = file && play ? fread(play, 1, LONGEST, file) : 0;

    if (!file || !play)
        return 1;
    fclose(file);
    LLVMFuzzerTestOneInput(play, size);
    free(play);
    return 0;
}

int main(int argc, char **argv)
{
    char *end;
    unsigned long runs = argc == 3 ? strtoul(argv[1], &end, 0) : 0;

    if (argc != 3 || *end) {
        for (int i = 1; i < argc; i++)
            if (replay(argv[i]))
                return 1;
        return 0;
    }
    state = strtoul(argv[2], NULL, 0) * 0x9e3779b97f4a7c15 + 1;
    for (unsigned long run = 0; run < runs; run++) {
        size_t size = 1 + dice() % LONGEST;
        uint8_t *play = malloc(size); /* so that a byte behind it is noticed */

        if (!play)
            return 1;
        for (size_t i = 0; i < size; i++)
            play[i] = (uint8_t)(dice() & (dice() % 4 ? 0xff : 0x07)); /* small numbers more often */
        LLVMFuzzerTestOneInput(play, size);
        free(play);
    }
    printf("Done %lu runs\n", runs);
    return 0;
}
