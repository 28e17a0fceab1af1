/* The provider as libcrypto sees it, linked in so that the sanitizers watch it too. No agent runs: what this
 * file asks for is answered without one, or fails for want of one. */
#include <openssl/core_names.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/provider.h>
#include <openssl/rsa.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "errors.h"
#include "support.h"

#define VECTORS "key_reference.json"

OSSL_provider_init_fn OSSL_provider_init;

static OSSL_LIB_CTX *libctx;

static EVP_PKEY *read_pem(const char *text, size_t len)
{
    BIO *bio = BIO_new_mem_buf(text, (int)len);
    EVP_PKEY *key = PEM_read_bio_PrivateKey_ex(bio, NULL, NULL, NULL, libctx, NULL);

    BIO_free(bio);
    return key;
}

static EVP_PKEY *read_vector(const char *directory)
{
    char *pem = test_vector_text(directory, VECTORS, "pem");
    EVP_PKEY *key = read_pem(pem, strlen(pem));

    CHECK(key != NULL);
    free(pem);
    return key;
}

static EVP_PKEY *public_of_vector(const char *directory)
{
    size_t len;
    uint8_t *spki = test_vector_bytes(directory, VECTORS, "spki_der", &len);
    const unsigned char *at = spki;
    EVP_PKEY *key = d2i_PUBKEY_ex(NULL, &at, (long)len, libctx, NULL);

    CHECK(key != NULL);
    free(spki);
    return key;
}

static void test_key_answers_without_an_agent(const char *directory)
{
    EVP_PKEY *key = read_vector(directory);
    EVP_PKEY *public_key = public_of_vector(directory);
    EVP_PKEY *copy = EVP_PKEY_dup(key);
    EVP_PKEY *other = EVP_EC_gen("P-256");
    char text[32];
    size_t len = 0;
    OSSL_PARAM *params = NULL;

    CHECK(EVP_PKEY_is_a(key, "EC") && EVP_PKEY_get_id(key) == EVP_PKEY_EC);
    CHECK(EVP_PKEY_get_bits(key) == 256 && EVP_PKEY_get_security_bits(key) == 128);
    CHECK(EVP_PKEY_get_size(key) == 72);
    CHECK(EVP_PKEY_get_group_name(key, text, sizeof(text), &len) == 1 && strcmp(text, "prime256v1") == 0);
    CHECK(EVP_PKEY_get_default_digest_name(key, text, sizeof(text)) == 1 && strcmp(text, "SHA256") == 0);
    CHECK(EVP_PKEY_eq(key, public_key) == 1 && EVP_PKEY_eq(public_key, key) == 1);
    CHECK(copy != NULL && EVP_PKEY_eq(copy, key) == 1);
    CHECK(EVP_PKEY_eq(key, other) != 1);
    CHECK(EVP_PKEY_todata(key, EVP_PKEY_PUBLIC_KEY, &params) == 1);
    CHECK(OSSL_PARAM_locate(params, OSSL_PKEY_PARAM_PRIV_KEY) == NULL);
    OSSL_PARAM_free(params);
    params = NULL;
    CHECK(EVP_PKEY_todata(key, EVP_PKEY_KEYPAIR, &params) != 1);
    EVP_PKEY_free(key);
    EVP_PKEY_free(copy);
    EVP_PKEY_free(other);
    EVP_PKEY_free(public_key);
    ERR_clear_error();
}

static void test_every_envelope_decodes(const char *directory)
{
    static const char *const NAMES[] = {"der", "pkcs8_der"};
    size_t i;

    for (i = 0; i < 2; i++) {
        size_t len;
        uint8_t *der = test_vector_bytes(directory, VECTORS, NAMES[i], &len);
        const unsigned char *at = der;
        EVP_PKEY *key = d2i_AutoPrivateKey_ex(NULL, &at, (long)len, libctx, NULL);

        CHECK(key != NULL);
        EVP_PKEY_free(key);
        free(der);
    }
    ERR_clear_error();
}

/* Never a key, never a crash, and where the label is whole an error of ours. */
static void test_cut_and_changed_files(const char *directory)
{
    char *pem = test_vector_text(directory, VECTORS, "pem");
    size_t begin = strlen("-----BEGIN KEYREEVE KEY REFERENCE-----\n");
    size_t end = (size_t)(strstr(pem, "-----END") - pem) + strlen("-----END KEYREEVE KEY REFERENCE-----");
    size_t i;

    for (i = 0; i < end; i++) {
        CHECK(read_pem(pem, i) == NULL);
        CHECK(i < begin ||
              strcmp(ERR_reason_error_string(ERR_peek_error()), "key reference is invalid") == 0);
        ERR_clear_error();
    }
    for (i = begin; i < end; i++) {
        char kept = pem[i];

        pem[i] = kept == 'A' ? 'B' : 'A';
        EVP_PKEY_free(read_pem(pem, strlen(pem)));
        pem[i] = kept;
        ERR_clear_error();
    }
    free(pem);
}

static void test_signing_without_an_agent(const char *directory)
{
    EVP_PKEY *key = read_vector(directory);
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    EVP_PKEY_CTX *plain = EVP_PKEY_CTX_new_from_pkey(libctx, key, NULL);
    uint8_t *large = calloc(1, 65537);
    unsigned char signature[128];
    size_t len = 0;

    CHECK(EVP_DigestSignInit_ex(ctx, NULL, "SHA256", libctx, NULL, key, NULL) == 1);
    CHECK(EVP_DigestSign(ctx, NULL, &len, (const unsigned char *)"m", 1) == 1 && len == 72);
    len = sizeof(signature);
    CHECK(EVP_DigestSign(ctx, signature, &len, (const unsigned char *)"m", 1) != 1);
    CHECK(strcmp(ERR_reason_error_string(ERR_peek_last_error()), "agent cannot be reached") == 0);
    ERR_clear_error();
    len = sizeof(signature);
    CHECK(EVP_DigestSign(ctx, signature, &len, large, 65537) != 1);
    CHECK(strcmp(ERR_reason_error_string(ERR_peek_last_error()), "message is too large") == 0);
    EVP_MD_CTX_free(ctx);

    ctx = EVP_MD_CTX_new();
    CHECK(EVP_DigestSignInit_ex(ctx, NULL, "SHA256", libctx, NULL, key, NULL) == 1);
    CHECK(EVP_DigestSignUpdate(ctx, large, 65536) == 1);
    CHECK(EVP_DigestSignFinal(ctx, NULL, &len) == 1 && len == 72);
    CHECK(EVP_DigestSignFinal(ctx, signature, &len) != 1); /* works on a duplicate */
    CHECK(EVP_DigestSignUpdate(ctx, large, 1) != 1);
    EVP_MD_CTX_free(ctx);

    ctx = EVP_MD_CTX_new();
    CHECK(EVP_DigestSignInit_ex(ctx, NULL, "SHA384", libctx, NULL, key, NULL) == 1);
    CHECK(EVP_DigestSign(ctx, NULL, &len, (const unsigned char *)"m", 1) !=
          1); /* TLS 1.3 has no such scheme */
    EVP_MD_CTX_free(ctx);

    CHECK(EVP_PKEY_sign_init(plain) != 1); /* a bare digest */
    EVP_PKEY_CTX_free(plain);
    EVP_PKEY_free(key);
    free(large);
    ERR_clear_error();
}

/* With equal names in two providers, software keys stay where they are. */
static void test_software_keys_are_left_alone(void)
{
    EVP_PKEY *key = EVP_PKEY_Q_keygen(libctx, NULL, "EC", "P-256");
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    unsigned char signature[128];
    size_t len = sizeof(signature);

    CHECK(key != NULL);
    CHECK(EVP_DigestSignInit_ex(ctx, NULL, "SHA384", libctx, NULL, key, NULL) == 1);
    CHECK(EVP_DigestSign(ctx, signature, &len, (const unsigned char *)"m", 1) == 1);
    EVP_MD_CTX_free(ctx);
    EVP_PKEY_free(key);
}

int main(int argc, char **argv)
{
    OSSL_PROVIDER *default_provider, *ours;

    CHECK(argc == 2);
    libctx = OSSL_LIB_CTX_new();
    CHECK(libctx != NULL);
    default_provider = OSSL_PROVIDER_load(libctx, "default");
    CHECK(OSSL_PROVIDER_add_builtin(libctx, "keyreeve", OSSL_provider_init) == 1);
    ours = OSSL_PROVIDER_load(libctx, "keyreeve");
    CHECK(default_provider != NULL && ours != NULL);
    test_key_answers_without_an_agent(argv[1]);
    test_every_envelope_decodes(argv[1]);
    test_cut_and_changed_files(argv[1]);
    test_signing_without_an_agent(argv[1]);
    test_software_keys_are_left_alone();
    CHECK(OSSL_PROVIDER_unload(ours) == 1 && OSSL_PROVIDER_unload(default_provider) == 1);
    OSSL_LIB_CTX_free(libctx);
    puts("provider: ok");
    return 0;
}
