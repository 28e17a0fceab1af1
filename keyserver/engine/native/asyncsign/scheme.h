/* The TLS SignatureSchemes that a provider may be asked for. Spec: RFC 8446 4.2.3. */
#ifndef KEYREEVE_ASYNC_SCHEME_H
#define KEYREEVE_ASYNC_SCHEME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <openssl/evp.h>

#define KEYREEVE_DIGEST_MAX 64

typedef struct {
    uint16_t code_point;
    const char *key_type; /* the name that OpenSSL gives it: "RSA", "EC" */
    const char *group;    /* the curve, NULL for RSA */
    const char *digest;
    size_t digest_size;
    int padding; /* RSA_PKCS1_PADDING, RSA_PKCS1_PSS_PADDING, 0 for ECDSA */
} keyreeve_scheme;

/* NULL for a code point that is not served here. */
const keyreeve_scheme *keyreeve_scheme_find(uint16_t code_point);

bool keyreeve_scheme_fits(const keyreeve_scheme *scheme, const EVP_PKEY *key);

/* The digest of a message, by the default provider of `libctx`. */
bool keyreeve_scheme_hash(const keyreeve_scheme *scheme, OSSL_LIB_CTX *libctx, const unsigned char *message,
                          size_t size, unsigned char digest[KEYREEVE_DIGEST_MAX]);

/* Sets hash, padding and length of salt on a context that is ready to sign or verify. */
bool keyreeve_scheme_apply(const keyreeve_scheme *scheme, EVP_PKEY_CTX *ctx);

#endif
