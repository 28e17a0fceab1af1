#include "key.h"

#include <limits.h>
#include <stdatomic.h>
#include <stdlib.h>

#include <openssl/err.h>
#include <openssl/x509.h>

struct keyreeve_async_key {
    EVP_PKEY *pkey;
    atomic_int holders;
};

/* EVP_PKEY_sign_init hands the key over to the provider that will sign, which OpenSSL keeps for later: so
 * loading pays for it. */
static keyreeve_async_status offered(OSSL_LIB_CTX *libctx, const OSSL_PROVIDER *provider,
                                     const char *preference, EVP_PKEY *pkey)
{
    keyreeve_async_status status = KEYREEVE_ASYNC_NO_MEMORY;
    EVP_PKEY_CTX *ctx = EVP_PKEY_CTX_new_from_pkey(libctx, pkey, preference);
    if (ctx == NULL)
        return status;
    if (EVP_PKEY_sign_init(ctx) != 1)
        status = KEYREEVE_ASYNC_NOT_OFFERED;
    else
        status = EVP_PKEY_CTX_get0_provider(ctx) == provider ? KEYREEVE_ASYNC_OK : KEYREEVE_ASYNC_NOT_OFFERED;
    EVP_PKEY_CTX_free(ctx);
    return status;
}

keyreeve_async_status keyreeve_async_key_load(OSSL_LIB_CTX *libctx, const OSSL_PROVIDER *provider,
                                              const char *preference, const unsigned char *pkcs8, size_t size,
                                              keyreeve_async_key **key)
{
    keyreeve_async_status status = KEYREEVE_ASYNC_BAD_KEY;
    const unsigned char *end = pkcs8;
    EVP_PKEY *pkey = NULL;
    PKCS8_PRIV_KEY_INFO *info = NULL;
    *key = NULL;
    ERR_set_mark();
    if (size > LONG_MAX || (info = d2i_PKCS8_PRIV_KEY_INFO(NULL, &end, (long)size)) == NULL ||
        end != pkcs8 + size)
        goto done;
    if ((pkey = EVP_PKCS82PKEY_ex(info, libctx, "provider=default")) == NULL)
        goto done;
    if ((status = offered(libctx, provider, preference, pkey)) != KEYREEVE_ASYNC_OK)
        goto done;
    status = KEYREEVE_ASYNC_NO_MEMORY;
    if ((*key = calloc(1, sizeof(**key))) == NULL)
        goto done;
    (*key)->pkey = pkey;
    atomic_init(&(*key)->holders, 1);
    pkey = NULL;
    status = KEYREEVE_ASYNC_OK;
done:
    EVP_PKEY_free(pkey);
    PKCS8_PRIV_KEY_INFO_free(info); /* wipes the octets of the key */
    ERR_pop_to_mark();
    return status;
}

keyreeve_async_key *keyreeve_async_key_hold(keyreeve_async_key *key)
{
    atomic_fetch_add(&key->holders, 1);
    return key;
}

void keyreeve_async_key_release(keyreeve_async_key *key)
{
    if (key == NULL || atomic_fetch_sub(&key->holders, 1) != 1)
        return;
    EVP_PKEY_free(
        key->pkey); /* OpenSSL's keys and those of a sound provider clear their numbers as they are freed */
    free(key);
}

EVP_PKEY *keyreeve_async_key_get(keyreeve_async_key *key)
{
    return key->pkey;
}
