#include "support.h"

#include <openssl/rsa.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <stdlib.h>

void test_failed(const char *file, int line, const char *what)
{
    fprintf(stderr, "%s:%d: not so: %s\n", file, line, what);
    exit(1);
}

EVP_PKEY *test_key(enum keyreeve_kind kind)
{
    int bits = keyreeve_kind_rsa_bits(kind);
    EVP_PKEY *pkey;
    if (bits > 0)
        pkey = EVP_PKEY_Q_keygen(NULL, NULL, "RSA", (size_t)bits);
    else if (kind == KEYREEVE_ED25519)
        pkey = EVP_PKEY_Q_keygen(NULL, NULL, "ED25519");
    else
        pkey = EVP_PKEY_Q_keygen(NULL, NULL, "EC", kind == KEYREEVE_P256 ? "P-256" : "P-384");
    CHECK(pkey != NULL);
    return pkey;
}

unsigned char *test_pkcs8(const EVP_PKEY *pkey, size_t *length)
{
    PKCS8_PRIV_KEY_INFO *info = EVP_PKEY2PKCS8(pkey);
    unsigned char *der = NULL;
    int encoded;
    CHECK(info != NULL);
    encoded = i2d_PKCS8_PRIV_KEY_INFO(info, &der);
    CHECK(encoded > 0);
    PKCS8_PRIV_KEY_INFO_free(info);
    *length = (size_t)encoded;
    return der;
}

int test_verifies(EVP_PKEY *pkey, unsigned char form, const unsigned char *message, size_t length,
                  const unsigned char *signature, size_t signature_length)
{
    static const char *const HASHES[] = {NULL, "SHA256", "SHA384", "SHA512"};
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    EVP_PKEY_CTX *parameters = NULL;
    int right;
    CHECK(EVP_DigestVerifyInit_ex(context, &parameters, HASHES[form & KEYREEVE_FORM_HASH], NULL, NULL, pkey,
                                  NULL) == 1);
    if ((form & KEYREEVE_FORM_PSS) != 0) {
        CHECK(EVP_PKEY_CTX_set_rsa_padding(parameters, RSA_PKCS1_PSS_PADDING) == 1);
        CHECK(EVP_PKEY_CTX_set_rsa_pss_saltlen(parameters, RSA_PSS_SALTLEN_DIGEST) == 1);
    }
    right = EVP_DigestVerify(context, signature, signature_length, message, length) == 1;
    EVP_MD_CTX_free(context);
    return right;
}

unsigned char test_form(enum keyreeve_kind kind)
{
    static const unsigned char FORMS[KEYREEVE_KINDS] = {
        KEYREEVE_SHA256,
        KEYREEVE_SHA384,
        KEYREEVE_NO_HASH,
        KEYREEVE_SHA256 | KEYREEVE_FORM_PSS,
        KEYREEVE_SHA384 | KEYREEVE_FORM_PSS,
        KEYREEVE_SHA512,
    };
    return FORMS[kind];
}
