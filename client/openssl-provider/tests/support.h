/* What the unit tests share: checks that say where they failed, and the vectors of tests/vectors. */
#ifndef KEYREEVE_TEST_SUPPORT_H
#define KEYREEVE_TEST_SUPPORT_H

#include <stddef.h>
#include <stdint.h>

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition))                                                                                    \
            test_failed(__FILE__, __LINE__, #condition);                                                     \
    } while (0)

void test_failed(const char *file, int line, const char *what) __attribute__((noreturn));

/* A string member of a flat JSON file in the directory of the vectors; the caller frees it. */
char *test_vector_text(const char *directory, const char *file, const char *name);

/* The same, from hexadecimal. */
uint8_t *test_vector_bytes(const char *directory, const char *file, const char *name, size_t *len);

#endif
