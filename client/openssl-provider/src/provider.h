/* The provider's context: what every operation reaches through its `provctx`. */
#ifndef KEYREEVE_PROVIDER_H
#define KEYREEVE_PROVIDER_H

#include <openssl/core.h>
#include <openssl/types.h>
#include <stddef.h>
#include <stdint.h>

#include "connection.h"
#include "errors.h"
#include "reference.h"

#define KEYREEVE_PROVIDER_NAME "keyreeve"
#define KEYREEVE_DEADLINE_MS_DEFAULT 3000

typedef struct keyreeve_provider_st keyreeve_provider;

/* A library context of our own, with only the default provider: public-key work in it never comes back to us.
 */
OSSL_LIB_CTX *keyreeve_provider_libctx(const keyreeve_provider *provider);
keyreeve_pool *keyreeve_provider_pool(const keyreeve_provider *provider);

/* Whether every signature is verified here, also one that the peer of a handshake verifies next. */
int keyreeve_provider_verifies_always(const keyreeve_provider *provider);
uint32_t keyreeve_provider_deadline_ms(const keyreeve_provider *provider);

/* The configured socket, or the reference's own where none is configured. */
const char *keyreeve_provider_socket(const keyreeve_provider *provider, const char *of_reference);

/* 1, or 0 with an error on the queue where a setting in openssl.cnf is wrong. */
int keyreeve_provider_is_configured(const keyreeve_provider *provider);

/* BIO_gets and BIO_read_ex of the core. */
int keyreeve_provider_gets(const keyreeve_provider *provider, OSSL_CORE_BIO *bio, char *line, int size);
int keyreeve_provider_read(const keyreeve_provider *provider, OSSL_CORE_BIO *bio, uint8_t *data, size_t len,
                           size_t *got);

/* Puts an error on the queue of the calling thread. */
void keyreeve_provider_raise(const keyreeve_provider *provider, keyreeve_error error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

extern const OSSL_ALGORITHM keyreeve_decoders[];
extern const OSSL_ALGORITHM keyreeve_keymgmts[];
extern const OSSL_ALGORITHM keyreeve_signatures[];

/* The default provider's names for the algorithms: libcrypto takes equal names as the same algorithm. */
#define KEYREEVE_NAMES_RSA "RSA:rsaEncryption:1.2.840.113549.1.1.1"
#define KEYREEVE_NAMES_EC "EC:id-ecPublicKey:1.2.840.10045.2.1"
#define KEYREEVE_NAMES_ED25519 "ED25519:1.3.101.112"
#define KEYREEVE_NAMES_ECDSA "ECDSA"
#define KEYREEVE_PROPERTIES "provider=" KEYREEVE_PROVIDER_NAME

/* A member of a dispatch table. */
#define KEYREEVE_DISPATCH(id, function)                                                                      \
    {                                                                                                        \
        (id), (void (*)(void))(function)                                                                     \
    }
#define KEYREEVE_DISPATCH_END                                                                                \
    {                                                                                                        \
        0, NULL                                                                                              \
    }

#endif
