/* Pieces: mixed keys in every length of piece, a lane that fails beside lanes that do not, faults in the
 * halves of the CRT. */
#include "arena.h"
#include "support.h"

#include <openssl/crypto.h>
#include <stdio.h>
#include <string.h>

enum { KEYS = 3 };

static unsigned char signatures[KEYREEVE_PIECE_MAX][KEYREEVE_SIGNATURE_MAX];
static const unsigned char MESSAGE[200] = "a message that was judged";

struct fixture {
    EVP_PKEY *pkeys[KEYS];
    struct keyreeve_key *keys[KEYS];
    struct keyreeve_item items[KEYREEVE_PIECE_MAX];
};

static void open_fixture(struct fixture *all, enum keyreeve_kind kind)
{
    size_t at, length;
    for (at = 0; at < KEYS; at++) {
        unsigned char *der;
        all->pkeys[at] = test_key(kind);
        der = test_pkcs8(all->pkeys[at], &length);
        CHECK(keyreeve_key_load(kind, der, length, &all->keys[at]) == KEYREEVE_OK);
        OPENSSL_clear_free(der, length);
    }
    for (at = 0; at < KEYREEVE_PIECE_MAX; at++)
        all->items[at] = (struct keyreeve_item){.key = all->keys[at % KEYS],
                                                .message = MESSAGE,
                                                .length = at,
                                                .form = test_form(kind),
                                                .signature = signatures[at]};
}

static void close_fixture(struct fixture *all)
{
    size_t at;
    for (at = 0; at < KEYS; at++) {
        keyreeve_key_free(all->keys[at]);
        EVP_PKEY_free(all->pkeys[at]);
    }
    CHECK(keyreeve_arena_use().taken == 0);
}

static void check_right(struct fixture *all, size_t at)
{
    struct keyreeve_item *item = &all->items[at];
    CHECK(item->status == KEYREEVE_OK);
    CHECK(test_verifies(all->pkeys[at % KEYS], item->form, item->message, item->length, item->signature,
                        item->signature_length));
}

static void test_lengths(struct fixture *all, enum keyreeve_kind kind)
{
    const size_t counts[] = {0, 1, 7, 8, 9, 16, 63, 64};
    size_t at, which;
    for (which = 0; which < sizeof(counts) / sizeof(counts[0]); which++) {
        if (keyreeve_kind_rsa_bits(kind) > 0 && counts[which] > 16)
            continue; /* slow under the sanitizers; Python's tests have them */
        keyreeve_piece_sign(kind, all->items, counts[which]);
        for (at = 0; at < counts[which]; at++)
            check_right(all, at);
    }
}

/* A form that does not fit, a digest of the wrong length, a key of another kind. */
static void test_bad_neighbours(struct fixture *all, enum keyreeve_kind kind)
{
    struct keyreeve_item kept[3] = {all->items[1], all->items[4], all->items[6]};
    struct keyreeve_key *foreign = keyreeve_key_new(kind == KEYREEVE_P384 ? KEYREEVE_P256 : KEYREEVE_P384);
    size_t at;
    all->items[1].form = 0x0F;
    all->items[4].form |= KEYREEVE_FORM_PREHASHED;
    all->items[6].key = foreign;
    keyreeve_piece_sign(kind, all->items, 12);
    for (at = 0; at < 12; at++) {
        if (at == 1 || at == 4 || at == 6)
            CHECK(all->items[at].status == KEYREEVE_BAD_FORM && all->items[at].signature_length == 0);
        else
            check_right(all, at);
    }
    all->items[1] = kept[0];
    all->items[4] = kept[1];
    all->items[6] = kept[2];
    keyreeve_key_free(foreign);
}

/* A scalar of zero: no signature exists, and crypto_mb says so of that lane alone. */
static void test_failing_lane(struct fixture *all, enum keyreeve_kind kind)
{
    struct keyreeve_item kept = all->items[3];
    struct keyreeve_key *zero = keyreeve_key_new(kind);
    size_t at;
    all->items[3].key = zero;
    keyreeve_piece_sign(kind, all->items, 8);
    CHECK(all->items[3].status == KEYREEVE_LANE_FAILED && all->items[3].signature_length == 0);
    for (at = 0; at < 8; at++)
        if (at != 3)
            check_right(all, at);
    all->items[3] = kept;
    keyreeve_key_free(zero);
}

/* A fault in one half of the CRT: gcd(s^e - m, n) would be a prime. It is withheld, and its neighbours are
 * not touched. */
static void test_crt_fault(struct fixture *all, enum keyreeve_kind kind)
{
    const size_t half = all->keys[0]->half;
    static const unsigned char zeros[KEYREEVE_SIGNATURE_MAX];
    size_t part, at;
    for (part = KEYREEVE_RSA_DP; part <= KEYREEVE_RSA_QINV; part++) {
        unsigned long long *word = &all->keys[1]->words[part * half + 2];
        *word ^= 4;
        memset(signatures, 0, sizeof(signatures));
        keyreeve_piece_sign(kind, all->items, 8);
        for (at = 0; at < 8; at++) {
            if (at % KEYS != 1)
                check_right(all, at);
            else {
                CHECK(all->items[at].status == KEYREEVE_MISMATCH && all->items[at].signature_length == 0);
                CHECK(memcmp(all->items[at].signature, zeros, sizeof(zeros)) == 0);
            }
        }
        *word ^= 4;
    }
    keyreeve_piece_sign(kind, all->items, 8);
    check_right(all, 1);
}

static int no_random(void *context, unsigned char *out, size_t length)
{
    (void)context;
    (void)out;
    (void)length;
    return 0;
}

static int same_each_time(void *context, unsigned char *out, size_t length)
{
    (void)context;
    while (length-- > 0)
        *out++ = 0x42;
    return 1;
}

/* Nothing is signed without randomness; and the nonce that is drawn is the one that signs (the same one gives
 * the same r). */
static void test_generator(struct fixture *all, enum keyreeve_kind kind)
{
    size_t at;
    keyreeve_piece_sign_with(no_random, NULL, kind, all->items, 9);
    for (at = 0; at < 9; at++)
        CHECK(all->items[at].status == KEYREEVE_NO_RANDOM && all->items[at].signature_length == 0);
    if (keyreeve_kind_rsa_bits(kind) > 0)
        return;
    keyreeve_piece_sign_with(same_each_time, NULL, kind, all->items, 2);
    CHECK(memcmp(signatures[0] + 4, signatures[1] + 4, 30) == 0);
    keyreeve_piece_sign(kind, all->items, 2);
    CHECK(memcmp(signatures[0] + 4, signatures[1] + 4, 30) != 0);
}

int main(void)
{
    struct fixture all;
    enum keyreeve_kind kind;
    CHECK(keyreeve_piece_init());
    for (kind = KEYREEVE_P256; kind <= KEYREEVE_RSA_2048; kind++) {
        if (!keyreeve_kind_is_supported(kind)) {
            printf("piece: skipped, this processor does not sign with kind %d in lanes\n", (int)kind);
            continue;
        }
        open_fixture(&all, kind);
        test_lengths(&all, kind);
        test_bad_neighbours(&all, kind);
        if (kind == KEYREEVE_P256 || kind == KEYREEVE_P384)
            test_failing_lane(&all, kind);
        if (kind != KEYREEVE_ED25519)
            test_generator(&all, kind);
        if (kind == KEYREEVE_RSA_2048)
            test_crt_fault(&all, kind);
        close_fixture(&all);
    }
    puts("piece: ok");
    return 0;
}
