/* Nonces: in range, from the generator's bytes alone, each value equally likely, none twice. */
#include "nonce.h"
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MANY = 100000 };

/* Gives what it was told, draw by draw; then fails. */
struct script {
    const unsigned long long (*draws)[6];
    size_t words, left, calls;
};

static int scripted(void *context, unsigned char *out, size_t length)
{
    struct script *script = context;
    size_t width = script->words * sizeof(unsigned long long);
    script->calls++;
    for (; length > 0; length -= width, out += width) {
        if (script->left == 0)
            return 0;
        memcpy(out, *script->draws, width);
        script->draws++;
        script->left--;
    }
    return 1;
}

static int stuck(void *context, unsigned char *out, size_t length)
{
    memset(out, *(unsigned char *)context, length);
    return 1;
}

static void test_range(const struct keyreeve_order *order)
{
    unsigned long long scalar[6] = {0}, word;
    CHECK(!keyreeve_scalar_in_range(order, scalar));
    scalar[0] = 1;
    CHECK(keyreeve_scalar_in_range(order, scalar));
    memcpy(scalar, order->value, sizeof(scalar));
    CHECK(!keyreeve_scalar_in_range(order, scalar));
    scalar[0] -= 1;
    CHECK(keyreeve_scalar_in_range(order, scalar));
    scalar[0] += 2;
    CHECK(!keyreeve_scalar_in_range(order, scalar));
    memset(scalar, 0xFF, sizeof(scalar));
    CHECK(!keyreeve_scalar_in_range(order, scalar));
    for (word = 0; word < order->words; word++) {
        memset(scalar, 0, sizeof(scalar));
        scalar[word] = 1;
        CHECK(keyreeve_scalar_in_range(order, scalar));
        memcpy(scalar, order->value, sizeof(scalar));
        if (scalar[word] != 0 && word > 0) {
            scalar[word] -= 1;
            CHECK(keyreeve_scalar_in_range(order, scalar));
        }
        memcpy(scalar, order->value, sizeof(scalar));
        if (scalar[word] != ~0ULL) {
            scalar[word] += 1;
            CHECK(!keyreeve_scalar_in_range(order, scalar));
        }
    }
}

/* 0 and n and more are drawn again, singly; nothing else of what the generator gave is changed. */
static void test_rejection(const struct keyreeve_order *order)
{
    unsigned long long draws[8][6] = {{0}}, out[3 * 6];
    struct script script = {(const unsigned long long(*)[6])draws, order->words, 7, 0};
    size_t width = order->words * sizeof(out[0]);
    draws[0][0] = 5;
    memcpy(draws[2], order->value, width); /* draws[1] is zero, draws[2] is n */
    memset(draws[3], 0xFF, width);
    memcpy(draws[4], order->value, width);
    draws[4][0] += 1;
    memcpy(draws[5], order->value, width);
    draws[5][0] -= 1;
    draws[6][0] = 1;
    /* At once 5, 0, n; for 0 then 2^k - 1, n + 1, n - 1; for n then 1. */
    CHECK(keyreeve_nonces_sample(order, scripted, &script, out, 3) == KEYREEVE_OK);
    CHECK(memcmp(out, draws[0], width) == 0);
    CHECK(memcmp(out + order->words, draws[5], width) == 0);
    CHECK(memcmp(out + 2 * order->words, draws[6], width) == 0);
    CHECK(script.calls == 5 && script.left == 0);
}

static void test_broken_generators(const struct keyreeve_order *order)
{
    static const unsigned char zeros[3 * 6 * sizeof(unsigned long long)];
    unsigned long long out[3 * 6], draws[1][6] = {{7}};
    unsigned char byte;
    size_t length = 3 * order->words * sizeof(out[0]);
    struct script script = {(const unsigned long long(*)[6])draws, order->words, 1, 0};
    for (byte = 0; byte != 2; byte++) {
        unsigned char value = byte == 0 ? 0x00 : 0xFF;
        memset(out, 0x55, sizeof(out));
        CHECK(keyreeve_nonces_sample(order, stuck, &value, out, 3) == KEYREEVE_NO_RANDOM);
        CHECK(memcmp(out, zeros, length) == 0);
    }
    CHECK(keyreeve_nonces_sample(order, scripted, &script, out, 3) == KEYREEVE_NO_RANDOM);
    CHECK(memcmp(out, zeros, length) == 0);
}

static int compare(const void *one, const void *other)
{
    return memcmp(one, other, 4 * sizeof(unsigned long long));
}

/* Of MANY nonces each bit is set about half the time (the order of P-256 begins with 32 ones, so all but
 * 2^-32 of the range is even), and each value of the leading byte comes about equally often. The bounds are
 * six and more standard deviations wide. */
static void test_distribution(void)
{
    const struct keyreeve_order *order = &KEYREEVE_P256_ORDER;
    unsigned long long *nonces = calloc(MANY, 4 * sizeof(*nonces));
    size_t number, bit, at;
    static size_t ones[256], leading[256];
    double chi_square = 0, expected = MANY / 256.0;
    CHECK(nonces != NULL);
    for (number = 0; number < MANY; number += 50)
        CHECK(keyreeve_nonces_sample(order, keyreeve_random_system, NULL, nonces + number * 4, 50) ==
              KEYREEVE_OK);
    for (number = 0; number < MANY; number++) {
        for (bit = 0; bit < 256; bit++)
            ones[bit] += nonces[number * 4 + bit / 64] >> (bit % 64) & 1;
        leading[nonces[number * 4 + 3] >> 56]++;
    }
    for (bit = 0; bit < 256; bit++) /* deviation: sqrt(MANY) / 2 = 158 */
        CHECK(ones[bit] > MANY / 2 - 1000 && ones[bit] < MANY / 2 + 1000);
    for (at = 0; at < 256; at++)
        chi_square += ((double)leading[at] - expected) * ((double)leading[at] - expected) / expected;
    CHECK(chi_square > 120 && chi_square < 420); /* 255 degrees of freedom: 255 +- 22.6 */
    qsort(nonces, MANY, 4 * sizeof(*nonces), compare);
    for (number = 1; number < MANY; number++)
        CHECK(memcmp(nonces + number * 4, nonces + (number - 1) * 4, 32) != 0);
    free(nonces);
}

int main(void)
{
    const struct keyreeve_order *const orders[] = {&KEYREEVE_P256_ORDER, &KEYREEVE_P384_ORDER};
    size_t at;
    for (at = 0; at < 2; at++) {
        test_range(orders[at]);
        test_rejection(orders[at]);
        test_broken_generators(orders[at]);
    }
    test_distribution();
    puts("nonce: ok");
    return 0;
}
