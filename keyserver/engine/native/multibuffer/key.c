#include "key.h"

#include "arena.h"
#include "nonce.h"
#include "pkcs8.h"

#include <openssl/bn.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/obj_mac.h>
#include <string.h>

enum { WORD_BITS = 64, PUBLIC_EXPONENT = 65537, ED25519_BYTES = 32, POINT_MAX = 97, UNCOMPRESSED = 4 };

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

static const enum keyreeve_algorithm ALGORITHMS[KEYREEVE_KINDS] = {
    [KEYREEVE_P256] = KEYREEVE_ALGORITHM_P256,       [KEYREEVE_P384] = KEYREEVE_ALGORITHM_P384,
    [KEYREEVE_ED25519] = KEYREEVE_ALGORITHM_ED25519, [KEYREEVE_RSA_2048] = KEYREEVE_ALGORITHM_RSA,
    [KEYREEVE_RSA_3072] = KEYREEVE_ALGORITHM_RSA,    [KEYREEVE_RSA_4096] = KEYREEVE_ALGORITHM_RSA,
};

/* Whether the scalar's public point is the one that was written beside it. */
static int point_belongs(int curve, const BIGNUM *scalar, struct keyreeve_span written)
{
    unsigned char octets[POINT_MAX];
    EC_GROUP *group = EC_GROUP_new_by_curve_name(curve);
    EC_POINT *point = group != NULL ? EC_POINT_new(group) : NULL;
    BN_CTX *scratch = BN_CTX_new();
    point_conversion_form_t form =
        written.data[0] == UNCOMPRESSED ? POINT_CONVERSION_UNCOMPRESSED : POINT_CONVERSION_COMPRESSED;
    size_t length;
    int belongs = 0;
    if (point == NULL || scratch == NULL || EC_POINT_mul(group, point, scalar, NULL, NULL, scratch) != 1)
        goto done;
    length = EC_POINT_point2oct(group, point, form, octets, sizeof(octets), scratch);
    belongs = length == written.length && memcmp(octets, written.data, length) == 0;
done:
    BN_CTX_free(scratch);
    EC_POINT_clear_free(point);
    EC_GROUP_free(group);
    return belongs;
}

static enum keyreeve_status load_ec(const struct keyreeve_pkcs8 *parsed, struct keyreeve_key *key)
{
    const struct keyreeve_order *order =
        key->kind == KEYREEVE_P256 ? &KEYREEVE_P256_ORDER : &KEYREEVE_P384_ORDER;
    int curve = key->kind == KEYREEVE_P256 ? NID_X9_62_prime256v1 : NID_secp384r1;
    size_t width = order->words * sizeof(*key->words), byte;
    unsigned char *out = (unsigned char *)key->words;
    enum keyreeve_status status = KEYREEVE_BAD_KEY;
    BIGNUM *scalar = NULL;
    if (parsed->secret.length != width)
        return status;
    for (byte = 0; byte < width; byte++)
        out[byte] = parsed->secret.data[width - 1 - byte];
    if (!keyreeve_scalar_in_range(order, key->words))
        return status;
    scalar = BN_lebin2bn(out, (int)width, NULL);
    if (scalar == NULL)
        return KEYREEVE_NO_MEMORY;
    BN_set_flags(scalar, BN_FLG_CONSTTIME);
    if (parsed->point.length == 0 || point_belongs(curve, scalar, parsed->point))
        status = KEYREEVE_OK;
    BN_clear_free(scalar);
    return status;
}

static enum keyreeve_status load_ed25519(const struct keyreeve_pkcs8 *parsed, struct keyreeve_key *key)
{
    unsigned char *seed = (unsigned char *)key->words;
    size_t length = ED25519_BYTES;
    EVP_PKEY *pkey;
    int derived;
    if (parsed->secret.length != ED25519_BYTES)
        return KEYREEVE_BAD_KEY;
    memcpy(seed, parsed->secret.data, ED25519_BYTES);
    pkey = EVP_PKEY_new_raw_private_key(EVP_PKEY_ED25519, NULL, seed, ED25519_BYTES);
    derived = pkey != NULL && EVP_PKEY_get_raw_public_key(pkey, seed + ED25519_BYTES, &length) == 1;
    EVP_PKEY_free(pkey);
    return derived && length == ED25519_BYTES ? KEYREEVE_OK : KEYREEVE_NO_MEMORY;
}

/* The places of the numbers that lanes want, among those of RSAPrivateKey. */
enum { P, Q, DP, DQ, QINV, N, E, NUMBERS };
static const size_t PLACES[NUMBERS] = {[P] = 3, [Q] = 4, [DP] = 5, [DQ] = 6, [QINV] = 7, [N] = 0, [E] = 1};

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

static enum keyreeve_status load_rsa(const struct keyreeve_pkcs8 *parsed, struct keyreeve_key *key)
{
    enum keyreeve_status status = KEYREEVE_NO_MEMORY;
    BIGNUM *numbers[NUMBERS] = {NULL};
    BN_CTX *scratch = BN_CTX_new();
    int number, half = (int)(key->half * sizeof(*key->words));
    if (scratch == NULL)
        goto done;
    if (parsed->more_primes) {
        status = KEYREEVE_UNSUITED;
        goto done;
    }
    for (number = 0; number < NUMBERS; number++) {
        struct keyreeve_span place = parsed->integers[PLACES[number]];
        if (place.length > (size_t)half * 2) {
            status = KEYREEVE_BAD_KEY;
            goto done;
        }
        if ((numbers[number] = BN_bin2bn(place.data, (int)place.length, NULL)) == NULL)
            goto done;
    }
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
    BN_CTX_free(scratch); /* which clears its numbers */
    return status;
}

enum keyreeve_status keyreeve_key_load(enum keyreeve_kind kind, const unsigned char *pkcs8, size_t length,
                                       struct keyreeve_key **loaded)
{
    enum keyreeve_status status;
    struct keyreeve_pkcs8 parsed;
    struct keyreeve_key *key;
    *loaded = NULL;
    if (!keyreeve_pkcs8_parse(pkcs8, length, &parsed) || parsed.algorithm != ALGORITHMS[kind])
        return KEYREEVE_BAD_KEY;
    key = keyreeve_key_new(kind);
    if (key == NULL)
        return KEYREEVE_NO_MEMORY;
    if (kind == KEYREEVE_ED25519)
        status = load_ed25519(&parsed, key);
    else
        status = SIZES[kind].half == 0 ? load_ec(&parsed, key) : load_rsa(&parsed, key);
    ERR_clear_error(); /* of this thread: nobody reads it */
    if (status == KEYREEVE_OK)
        *loaded = key;
    else
        keyreeve_key_free(key);
    return status;
}
