/* Keys are loaded whole or not at all, whatever the bytes. */
#include "arena.h"
#include "key.h"
#include "support.h"

#include <openssl/bn.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <string.h>

static void test_good_and_cut(enum keyreeve_kind kind)
{
    EVP_PKEY *pkey = test_key(kind);
    size_t length, cut;
    unsigned char *der = test_pkcs8(pkey, &length);
    struct keyreeve_key *key;
    int other;
    CHECK(keyreeve_key_load(kind, der, length, &key) == KEYREEVE_OK && key->kind == kind);
    keyreeve_key_free(key);
    for (cut = 0; cut<length; cut += length> 300 ? 13 : 1)
        CHECK(keyreeve_key_load(kind, der, cut, &key) == KEYREEVE_BAD_KEY && key == NULL);
    for (other = 0; other < KEYREEVE_KINDS; other++)
        if (other != (int)kind)
            CHECK(keyreeve_key_load((enum keyreeve_kind)other, der, length, &key) == KEYREEVE_BAD_KEY &&
                  key == NULL);
    OPENSSL_clear_free(der, length);
    EVP_PKEY_free(pkey);
}

/* One bit of an RSA key changed: the key is refused wherever the bit is part of a number that signing uses.
 */
static void test_damaged_rsa(void)
{
    EVP_PKEY *pkey = test_key(KEYREEVE_RSA_2048);
    size_t length, at, part, found = 0;
    unsigned char *der = test_pkcs8(pkey, &length);
    static const char *const PARTS[] = {OSSL_PKEY_PARAM_RSA_N,         OSSL_PKEY_PARAM_RSA_FACTOR1,
                                        OSSL_PKEY_PARAM_RSA_FACTOR2,   OSSL_PKEY_PARAM_RSA_EXPONENT1,
                                        OSSL_PKEY_PARAM_RSA_EXPONENT2, OSSL_PKEY_PARAM_RSA_COEFFICIENT1};
    for (part = 0; part < sizeof(PARTS) / sizeof(PARTS[0]); part++) {
        BIGNUM *number = NULL;
        unsigned char bytes[256];
        int width;
        CHECK(EVP_PKEY_get_bn_param(pkey, PARTS[part], &number) == 1);
        width = BN_bn2bin(number, bytes);
        BN_clear_free(number);
        for (at = 0; at + (size_t)width <= length; at++)
            if (memcmp(der + at, bytes, (size_t)width) == 0) {
                struct keyreeve_key *key;
                size_t middle = at + (size_t)width / 2;
                der[middle] ^= 0x10;
                CHECK(keyreeve_key_load(KEYREEVE_RSA_2048, der, length, &key) == KEYREEVE_BAD_KEY &&
                      key == NULL);
                der[middle] ^= 0x10;
                found++;
                break;
            }
    }
    CHECK(found == 6);
    OPENSSL_clear_free(der, length);
    EVP_PKEY_free(pkey);
}

/* Every single byte of small keys changed: none crashes, and none is taken for another scalar. */
static void test_damaged_small(enum keyreeve_kind kind)
{
    EVP_PKEY *pkey = test_key(kind);
    size_t length, at;
    unsigned char *der = test_pkcs8(pkey, &length);
    struct keyreeve_key *good, *key;
    CHECK(keyreeve_key_load(kind, der, length, &good) == KEYREEVE_OK);
    for (at = 0; at < length; at++) {
        der[at] ^= 0x01;
        if (keyreeve_key_load(kind, der, length, &key) == KEYREEVE_OK) {
            /* Ed25519 has no second part to compare with: the record's public key finds that. */
            CHECK(kind == KEYREEVE_ED25519 || memcmp(key->words, good->words, 32) == 0);
            keyreeve_key_free(key);
        }
        der[at] ^= 0x01;
    }
    keyreeve_key_free(good);
    OPENSSL_clear_free(der, length);
    EVP_PKEY_free(pkey);
}

int main(void)
{
    enum keyreeve_kind kind;
    CHECK(keyreeve_piece_init());
    for (kind = KEYREEVE_P256; kind <= KEYREEVE_RSA_2048; kind++)
        test_good_and_cut(kind);
    test_damaged_rsa();
    for (kind = KEYREEVE_P256; kind <= KEYREEVE_ED25519; kind++)
        test_damaged_small(kind);
    CHECK(keyreeve_arena_use().taken == 0);
    puts("key: ok");
    return 0;
}
