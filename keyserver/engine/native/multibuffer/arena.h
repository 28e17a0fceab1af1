#ifndef KEYREEVE_ARENA_H
#define KEYREEVE_ARENA_H

#include <stddef.h>

/* Memory for keys, nonces and scratch: pages of our own that are locked, left out of dumps and of children.
 * Blocks are aligned to 64 bytes, zero when taken, wiped when given back. Thread-safe. Where the limit of
 * locked memory is reached, pages are unlocked and counted as such. */
void *keyreeve_arena_take(size_t size);
void keyreeve_arena_give(void *block, size_t size);

struct keyreeve_arena_use {
    size_t mapped; /* bytes of all pages */
    size_t locked; /* of these, bytes that cannot be swapped */
    size_t taken;  /* bytes of the blocks in use */
};
struct keyreeve_arena_use keyreeve_arena_use(void);

#endif
