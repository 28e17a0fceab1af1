#include "key.h"

#include "arena.h"
#include "nonce.h"

#include <limits.h>
#include <openssl/bn.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/x509.h>
#include <string.h>

enum { WORD_BITS = 64, PUBLIC_EXPONENT = 65537, ED25519_BYTES = 32, GROUP_NAME_MAX = 32 };

static const struct {
    size_t half, words;
} SIZES[KEYREEVE_KINDS] = {
    [KEYREEVE_P256] = {0, 4},        [KEYREEVE_P384] = {0, 6},        [KEYREEVE_ED25519] = {0, 8},
    [KEYREEVE_RSA_2048] = {16, 112}, [KEYREEVE_RSA_3072] = {24, 168}, [KEYREEVE_RSA_4096] = {32, 224},
};

int keyreeve_kind_rsa_bits(enum keyreeve_kind kind)
{
    return (int)SIZES[kind].half * 2 * WORD_BITS;
}

struct keyreeve_key *keyreeve_key_new(enum keyreeve_kind kind)
{
    size_t size = sizeof(struct keyreeve_key) + SIZES[kind].words * sizeof(unsigned long long);
    struct keyreeve_key *key = keyreeve_arena_take(size);
    if (key == NULL)
        return NULL;
    key->kind = kind;
    key->half = SIZES[kind].half;
    key->size = size;
    return key;
}

void keyreeve_key_free(struct keyreeve_key *key)
{
    if (key != NULL)
        keyreeve_arena_give(key, key->size);
}

static enum keyreeve_status load_ec(EVP_PKEY *pkey, struct keyreeve_key *key)
{
    const struct keyreeve_order *order =
        key->kind == KEYREEVE_P256 ? &KEYREEVE_P256_ORDER : &KEYREEVE_P384_ORDER;
    const char *expected = key->kind == KEYREEVE_P256 ? "prime256v1" : "secp384r1";
    char group[GROUP_NAME_MAX];
    int width = (int)(order->words * sizeof(*key->words));
    enum keyreeve_status status = KEYREEVE_BAD_KEY;
    EVP_PKEY_CTX *check = NULL;
    BIGNUM *scalar = NULL;
    if (EVP_PKEY_get_group_name(pkey, group, sizeof(group), NULL) != 1 || strcmp(group, expected) != 0)
        goto done;
    if (EVP_PKEY_get_bn_param(pkey, OSSL_PKEY_PARAM_PRIV_KEY, &scalar) != 1)
        goto done;
    if (BN_bn2lebinpad(scalar, (unsigned char *)key->words, width) != width ||
        !keyreeve_scalar_in_range(order, key->words))
        goto done;
    check = EVP_PKEY_CTX_new_from_pkey(NULL, pkey, NULL);
    if (check == NULL || EVP_PKEY_check(check) != 1)
        goto done;
    status = KEYREEVE_OK;
done:
    EVP_PKEY_CTX_free(check);
    BN_clear_free(scalar);
    return status;
}

static enum keyreeve_status load_ed25519(EVP_PKEY *pkey, struct keyreeve_key *key)
{
    unsigned char *seed = (unsigned char *)key->words;
    size_t seed_length = ED25519_BYTES, public_length = ED25519_BYTES;
    if (!EVP_PKEY_is_a(pkey, "ED25519") || EVP_PKEY_get_raw_private_key(pkey, seed, &seed_length) != 1 ||
        EVP_PKEY_get_raw_public_key(pkey, seed + ED25519_BYTES, &public_length) != 1)
        return KEYREEVE_BAD_KEY;
    return seed_length == ED25519_BYTES && public_length == ED25519_BYTES ? KEYREEVE_OK : KEYREEVE_BAD_KEY;
}

enum { P, Q, DP, DQ, QINV, N, E, NUMBERS };
static const char *const NAMES[NUMBERS] = {
    OSSL_PKEY_PARAM_RSA_FACTOR1,   OSSL_PKEY_PARAM_RSA_FACTOR2,      OSSL_PKEY_PARAM_RSA_EXPONENT1,
    OSSL_PKEY_PARAM_RSA_EXPONENT2, OSSL_PKEY_PARAM_RSA_COEFFICIENT1, OSSL_PKEY_PARAM_RSA_N,
    OSSL_PKEY_PARAM_RSA_E,
};

/* Whether `prime` is odd, passes Fermat's test to base 2, and `exponent` inverts e modulo prime - 1. It finds
 * damage, not a forger: what is loaded was sealed by us. */
static int prime_is_sound(const BIGNUM *prime, const BIGNUM *exponent, const BIGNUM *e, BN_CTX *scratch)
{
    int sound = 0;
    BIGNUM *less, *two, *result;
    BN_CTX_start(scratch);
    less = BN_CTX_get(scratch);
    two = BN_CTX_get(scratch);
    result = BN_CTX_get(scratch);
    if (result == NULL || !BN_is_odd(prime) || !BN_sub(less, prime, BN_value_one()) || !BN_set_word(two, 2))
        goto done;
    BN_set_flags(less, BN_FLG_CONSTTIME);
    if (!BN_mod_exp_mont_consttime(result, two, less, prime, scratch, NULL) || !BN_is_one(result))
        goto done;
    if (BN_cmp(exponent, prime) >= 0 || !BN_mod_mul(result, exponent, e, less, scratch) || !BN_is_one(result))
        goto done;
    sound = 1;
done:
    BN_CTX_end(scratch);
    return sound;
}

static enum keyreeve_status check_rsa(BIGNUM **numbers, int bits, BN_CTX *scratch)
{
    enum keyreeve_status status = KEYREEVE_BAD_KEY;
    BIGNUM *product;
    BN_CTX_start(scratch);
    product = BN_CTX_get(scratch);
    if (product == NULL || BN_num_bits(numbers[N]) != bits || !BN_is_odd(numbers[N]))
        goto done;
    if (!BN_is_word(numbers[E], PUBLIC_EXPONENT)) {
        status = KEYREEVE_UNSUITED;
        goto done;
    }
    if (!BN_mul(product, numbers[P], numbers[Q], scratch) || BN_cmp(product, numbers[N]) != 0 ||
        BN_cmp(numbers[P], numbers[Q]) == 0)
        goto done;
    if (BN_is_one(numbers[P]) || BN_is_one(numbers[Q]) ||
        !prime_is_sound(numbers[P], numbers[DP], numbers[E], scratch) ||
        !prime_is_sound(numbers[Q], numbers[DQ], numbers[E], scratch))
        goto done;
    if (!BN_mod_mul(product, numbers[QINV], numbers[Q], numbers[P], scratch) || !BN_is_one(product) ||
        BN_cmp(numbers[QINV], numbers[P]) >= 0)
        goto done;
    status = BN_num_bits(numbers[P]) == bits / 2 && BN_num_bits(numbers[Q]) == bits / 2 ? KEYREEVE_OK
                                                                                        : KEYREEVE_UNSUITED;
done:
    BN_CTX_end(scratch);
    return status;
}

/* The lanes' recombination wants q < p; a key may come either way. */
static int put_larger_prime_first(BIGNUM **numbers, BN_CTX *scratch)
{
    if (BN_cmp(numbers[P], numbers[Q]) > 0)
        return 1;
    BN_swap(numbers[P], numbers[Q]);
    BN_swap(numbers[DP], numbers[DQ]);
    BN_set_flags(numbers[P], BN_FLG_CONSTTIME);
    BN_set_flags(numbers[Q], BN_FLG_CONSTTIME);
    return BN_mod_inverse(numbers[QINV], numbers[Q], numbers[P], scratch) != NULL;
}

static enum keyreeve_status load_rsa(EVP_PKEY *pkey, struct keyreeve_key *key)
{
    enum keyreeve_status status = KEYREEVE_BAD_KEY;
    BIGNUM *numbers[NUMBERS] = {NULL}, *third = NULL;
    BN_CTX *scratch = BN_CTX_new();
    int number, half = (int)(key->half * sizeof(*key->words));
    if (scratch == NULL || !EVP_PKEY_is_a(pkey, "RSA"))
        goto done;
    if (EVP_PKEY_get_bn_param(pkey, OSSL_PKEY_PARAM_RSA_FACTOR3, &third) == 1) {
        status = KEYREEVE_UNSUITED;
        goto done;
    }
    for (number = 0; number < NUMBERS; number++)
        if (EVP_PKEY_get_bn_param(pkey, NAMES[number], &numbers[number]) != 1)
            goto done;
    status = check_rsa(numbers, keyreeve_kind_rsa_bits(key->kind), scratch);
    if (status != KEYREEVE_OK)
        goto done;
    status = KEYREEVE_NO_MEMORY;
    if (!put_larger_prime_first(numbers, scratch))
        goto done;
    for (number = 0; number <= N; number++) {
        int width = number == N ? 2 * half : half;
        unsigned char *out = (unsigned char *)(key->words + (size_t)number * key->half);
        if (BN_bn2lebinpad(numbers[number], out, width) != width)
            goto done;
    }
    status = KEYREEVE_OK;
done:
    for (number = 0; number < NUMBERS; number++)
        BN_clear_free(numbers[number]);
    BN_clear_free(third);
    BN_CTX_free(scratch); /* which clears its numbers */
    return status;
}

enum keyreeve_status keyreeve_key_load(enum keyreeve_kind kind, const unsigned char *pkcs8, size_t length,
                                       struct keyreeve_key **loaded)
{
    enum keyreeve_status status = KEYREEVE_BAD_KEY;
    const unsigned char *at = pkcs8;
    EVP_PKEY *pkey = NULL;
    struct keyreeve_key *key = NULL;
    *loaded = NULL;
    if (length > LONG_MAX)
        goto done;
    pkey = d2i_AutoPrivateKey(NULL, &at, (long)length);
    if (pkey == NULL || at != pkcs8 + length)
        goto done;
    key = keyreeve_key_new(kind);
    if (key == NULL)
        status = KEYREEVE_NO_MEMORY;
    else if (kind == KEYREEVE_ED25519)
        status = load_ed25519(pkey, key);
    else
        status = SIZES[kind].half == 0 ? load_ec(pkey, key) : load_rsa(pkey, key);
done:
    EVP_PKEY_free(pkey);
    ERR_clear_error(); /* of this thread: nobody reads it */
    if (status == KEYREEVE_OK)
        *loaded = key;
    else
        keyreeve_key_free(key);
    return status;
}
