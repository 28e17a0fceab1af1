#include "arena.h"

#include <openssl/crypto.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>

enum {
    GRAIN = 64, /* a cache line, and the alignment that AVX-512 likes */
    LARGEST_BLOCK = 4096,
    SLAB = 65536,
    CLASSES = LARGEST_BLOCK / GRAIN
};

/* A free block holds the link to the next one of its size, and zeros. */
struct free_block {
    struct free_block *next;
};

static pthread_mutex_t arena_lock = PTHREAD_MUTEX_INITIALIZER;
static struct free_block *free_blocks[CLASSES + 1];
static struct keyreeve_arena_use use;

static size_t rounded(size_t size, size_t grain)
{
    return (size + grain - 1) / grain * grain;
}

static void *map_pages(size_t size)
{
    void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        return NULL;
    /* Both make less of a leak that needs another fault; neither is a reason not to sign. */
    (void)madvise(pages, size, MADV_DONTDUMP);
    (void)madvise(pages, size, MADV_DONTFORK);
    use.mapped += size;
    if (mlock(pages, size) == 0)
        use.locked += size;
    return pages;
}

static int add_slab(size_t class)
{
    size_t size = class * GRAIN, at;
    unsigned char *slab = map_pages(SLAB);
    if (slab == NULL)
        return 0;
    for (at = 0; at + size <= SLAB; at += size) {
        struct free_block *block = (struct free_block *)(void *)(slab + at);
        block->next = free_blocks[class];
        free_blocks[class] = block;
    }
    return 1;
}

/* Larger blocks are scratch space of one size, of which as many are mapped as threads ever needed at once. */
static struct free_block *large_blocks;
static size_t large_size;

void *keyreeve_arena_take(size_t size)
{
    struct free_block *block = NULL;
    size_t class = rounded(size, GRAIN) / GRAIN;
    if (size == 0)
        return NULL;
    pthread_mutex_lock(&arena_lock);
    if (class <= CLASSES) {
        if (free_blocks[class] != NULL || add_slab(class)) {
            block = free_blocks[class];
            free_blocks[class] = block->next;
        }
    } else if (large_size == 0 || large_size == size) {
        large_size = size;
        block = large_blocks;
        if (block != NULL)
            large_blocks = block->next;
        else
            block = map_pages(rounded(size, LARGEST_BLOCK));
    }
    if (block != NULL) {
        block->next = NULL;
        use.taken += size;
    }
    pthread_mutex_unlock(&arena_lock);
    return block;
}

void keyreeve_arena_give(void *given, size_t size)
{
    struct free_block **list, *block = given;
    size_t class = rounded(size, GRAIN) / GRAIN;
    if (given == NULL)
        return;
    OPENSSL_cleanse(given, size);
    pthread_mutex_lock(&arena_lock);
    list = class <= CLASSES ? &free_blocks[class] : &large_blocks;
    block->next = *list;
    *list = block;
    use.taken -= size;
    pthread_mutex_unlock(&arena_lock);
}

struct keyreeve_arena_use keyreeve_arena_use(void)
{
    struct keyreeve_arena_use now;
    pthread_mutex_lock(&arena_lock);
    now = use;
    pthread_mutex_unlock(&arena_lock);
    return now;
}
