/* A private key in the library context of the engine, counted: a job that hangs keeps its key. */
#ifndef KEYREEVE_ASYNC_KEY_H
#define KEYREEVE_ASYNC_KEY_H

#include <stddef.h>

#include <openssl/evp.h>
#include <openssl/provider.h>

#include "status.h"

typedef struct keyreeve_async_key keyreeve_async_key;

/* `libctx` has to outlive the key. `provider` is the one that has to sign; `preference` is the property query
 * that prefers it. KEYREEVE_ASYNC_NOT_OFFERED where it does not sign with keys of this kind. */
keyreeve_async_status keyreeve_async_key_load(OSSL_LIB_CTX *libctx, const OSSL_PROVIDER *provider,
                                              const char *preference, const unsigned char *pkcs8, size_t size,
                                              keyreeve_async_key **key);

keyreeve_async_key *keyreeve_async_key_hold(keyreeve_async_key *key);

/* The last one wipes the key. */
void keyreeve_async_key_release(keyreeve_async_key *key);

EVP_PKEY *keyreeve_async_key_get(keyreeve_async_key *key);

#endif
