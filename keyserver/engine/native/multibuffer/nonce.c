#include "nonce.h"

#include <errno.h>
#include <limits.h>
#include <openssl/crypto.h>
#include <sys/random.h>

/* A good generator is rejected once in 2^32 draws for P-256; one that is rejected this often in a row is
 * broken. */
enum { MOST_DRAWS = 64 };

const struct keyreeve_order KEYREEVE_P256_ORDER = {
    4, {0xF3B9CAC2FC632551ULL, 0xBCE6FAADA7179E84ULL, 0xFFFFFFFFFFFFFFFFULL, 0xFFFFFFFF00000000ULL}};
const struct keyreeve_order KEYREEVE_P384_ORDER = {6,
                                                   {0xECEC196ACCC52973ULL, 0x581A0DB248B0A77AULL,
                                                    0xC7634D81F4372DDFULL, 0xFFFFFFFFFFFFFFFFULL,
                                                    0xFFFFFFFFFFFFFFFFULL, 0xFFFFFFFFFFFFFFFFULL}};

int keyreeve_random_system(void *context, unsigned char *out, size_t length)
{
    (void)context;
    while (length > 0) {
        ssize_t got = getrandom(out, length, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return 0;
        out += got;
        length -= (size_t)got;
    }
    return 1;
}

int keyreeve_scalar_in_range(const struct keyreeve_order *order, const unsigned long long *scalar)
{
    unsigned long long borrow = 0, any = 0;
    size_t word;
    for (word = 0; word < order->words; word++) {
        unsigned long long partial = scalar[word] - order->value[word];
        unsigned long long below = scalar[word] < order->value[word];
        borrow = below | (partial < borrow);
        any |= scalar[word];
    }
    return (int)(borrow & ((any | (0 - any)) >> (sizeof(any) * CHAR_BIT - 1)));
}

enum keyreeve_status keyreeve_nonces_sample(const struct keyreeve_order *order, keyreeve_generator *generator,
                                            void *context, unsigned long long *out, size_t count)
{
    size_t width = order->words * sizeof(*out), number;
    int draws;
    if (!generator(context, (unsigned char *)out, width * count))
        goto failed;
    for (number = 0; number < count; number++) {
        unsigned long long *nonce = out + number * order->words;
        for (draws = 1; !keyreeve_scalar_in_range(order, nonce); draws++)
            if (draws == MOST_DRAWS || !generator(context, (unsigned char *)nonce, width))
                goto failed;
    }
    return KEYREEVE_OK;
failed:
    OPENSSL_cleanse(out, width * count);
    return KEYREEVE_NO_RANDOM;
}
