#ifndef KEYREEVE_NONCE_H
#define KEYREEVE_NONCE_H

#include "status.h"

#include <stddef.h>

/* Fills `out`; 0 where it cannot. */
typedef int keyreeve_generator(void *context, unsigned char *out, size_t length);

/* The kernel's generator, getrandom(2): it keeps no state in this process that a copy of its memory could
 * give away. */
keyreeve_generator keyreeve_random_system;

struct keyreeve_order {
    size_t words;
    unsigned long long value[6]; /* little-endian words */
};
extern const struct keyreeve_order KEYREEVE_P256_ORDER, KEYREEVE_P384_ORDER;

/* `count` numbers k with 0 < k < n, each of them equally likely, one after another in `out`, each of
 * `order->words` little-endian words. By rejection: FIPS 186-5 A.3.2. */
enum keyreeve_status keyreeve_nonces_sample(const struct keyreeve_order *order, keyreeve_generator *generator,
                                            void *context, unsigned long long *out, size_t count);

/* 1 where 0 < k < n, else 0; in the same time for every k. */
int keyreeve_scalar_in_range(const struct keyreeve_order *order, const unsigned long long *scalar);

#endif
