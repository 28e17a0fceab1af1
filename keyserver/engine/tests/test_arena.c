/* Blocks are zero and aligned, and wiped when given back; also when threads take and give at once. */
#include "arena.h"
#include "support.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { THREADS = 4, ROUNDS = 20000, LARGE = 130000 };

static int is_zero(const unsigned char *block, size_t from, size_t size)
{
    for (; from < size; from++)
        if (block[from] != 0)
            return 0;
    return 1;
}

static void test_wiped(size_t size)
{
    struct keyreeve_arena_use before = keyreeve_arena_use();
    unsigned char *block = keyreeve_arena_take(size), *again;
    CHECK(block != NULL && (uintptr_t)block % 64 == 0 && is_zero(block, 0, size));
    CHECK(keyreeve_arena_use().taken == before.taken + size);
    memset(block, 0xA5, size);
    keyreeve_arena_give(block, size);
    CHECK(is_zero(block, sizeof(void *), size)); /* the pages stay; the first bytes link free blocks */
    CHECK(keyreeve_arena_use().taken == before.taken);
    again = keyreeve_arena_take(size);
    CHECK(again == block && is_zero(again, 0, size));
    keyreeve_arena_give(again, size);
}

static void *work(void *mark)
{
    unsigned char byte = *(unsigned char *)mark, *blocks[8];
    size_t round, at, sizes[8] = {40, 64, 65, 900, 1800, 3072, 4096, LARGE};
    for (round = 0; round < ROUNDS / 8; round++) {
        for (at = 0; at < 8; at++) {
            blocks[at] = keyreeve_arena_take(sizes[at]);
            CHECK(blocks[at] != NULL && is_zero(blocks[at], 0, sizes[at] < 256 ? sizes[at] : 256));
            memset(blocks[at], byte, sizes[at] < 256 ? sizes[at] : 256);
        }
        for (at = 0; at < 8; at++) {
            CHECK(blocks[at][0] == byte && blocks[at][39] == byte);
            keyreeve_arena_give(blocks[at], sizes[at]);
        }
    }
    return NULL;
}

int main(void)
{
    const size_t sizes[] = {8, 64, 100, 1816, 4096, LARGE};
    unsigned char marks[THREADS] = {1, 2, 3, 4};
    pthread_t threads[THREADS];
    size_t at;
    for (at = 0; at < sizeof(sizes) / sizeof(sizes[0]); at++)
        test_wiped(sizes[at]);
    CHECK(keyreeve_arena_take(0) == NULL);
    CHECK(keyreeve_arena_take(LARGE + 1) ==
          NULL); /* one size of large blocks, so that none is given out too small */
    keyreeve_arena_give(NULL, 8);
    for (at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, work, &marks[at]) == 0);
    for (at = 0; at < THREADS; at++)
        CHECK(pthread_join(threads[at], NULL) == 0);
    CHECK(keyreeve_arena_use().taken == 0);
    puts("arena: ok");
    return 0;
}
