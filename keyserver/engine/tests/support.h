/* What the unit tests share: checks that say where they failed, and keys from libcrypto. */
#ifndef KEYREEVE_TEST_SUPPORT_H
#define KEYREEVE_TEST_SUPPORT_H

#include "piece.h"

#include <openssl/evp.h>
#include <stddef.h>

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition))                                                                                    \
            test_failed(__FILE__, __LINE__, #condition);                                                     \
    } while (0)

void test_failed(const char *file, int line, const char *what) __attribute__((noreturn));

/* A new key of this kind, made by libcrypto; the caller frees it. */
EVP_PKEY *test_key(enum keyreeve_kind kind);

/* Its PKCS#8 in DER; the caller frees it with OPENSSL_free. */
unsigned char *test_pkcs8(const EVP_PKEY *pkey, size_t *length);

/* Whether libcrypto finds the signature right. */
int test_verifies(EVP_PKEY *pkey, unsigned char form, const unsigned char *message, size_t length,
                  const unsigned char *signature, size_t signature_length);

/* The form that most tests sign with. */
unsigned char test_form(enum keyreeve_kind kind);

#endif
