#include "job.h"

#include <stdlib.h>
#include <string.h>

#include <openssl/bn.h>
#include <openssl/crypto.h>
#include <openssl/ec.h>
#include <openssl/err.h>

keyreeve_job *keyreeve_job_make(OSSL_LIB_CTX *libctx, keyreeve_async_request *request)
{
    const keyreeve_scheme *scheme = keyreeve_scheme_find(request->scheme);
    request->status = KEYREEVE_ASYNC_BAD_REQUEST;
    request->signature_size = 0;
    request->paused = false;
    if (scheme == NULL || !keyreeve_scheme_fits(scheme, keyreeve_async_key_get(request->key)))
        return NULL;
    if (request->prehashed && request->message_size != scheme->digest_size)
        return NULL;
    keyreeve_job *job = calloc(1, sizeof(*job));
    if (job == NULL) {
        request->status = KEYREEVE_ASYNC_NO_MEMORY;
        return NULL;
    }
    if (request->prehashed) {
        memcpy(job->digest, request->message, request->message_size);
    } else if (!keyreeve_scheme_hash(scheme, libctx, request->message, request->message_size, job->digest)) {
        request->status = KEYREEVE_ASYNC_FAILED;
        free(job);
        return NULL;
    }
    job->scheme = scheme;
    job->key = keyreeve_async_key_hold(request->key);
    job->status = KEYREEVE_ASYNC_FAILED;
    return job;
}

keyreeve_async_status keyreeve_job_sign(keyreeve_job *job, OSSL_LIB_CTX *libctx,
                                        const OSSL_PROVIDER *provider, const char *preference)
{
    keyreeve_async_status status = KEYREEVE_ASYNC_FAILED;
    EVP_PKEY_CTX *ctx = EVP_PKEY_CTX_new_from_pkey(libctx, keyreeve_async_key_get(job->key), preference);
    if (ctx == NULL || EVP_PKEY_sign_init(ctx) != 1)
        goto done;
    /* A provider that lets a key type go is a fault to be seen, not work for OpenSSL's own code behind our
     * back. */
    if (EVP_PKEY_CTX_get0_provider(ctx) != provider) {
        status = KEYREEVE_ASYNC_NOT_OFFERED;
        goto done;
    }
    if (!keyreeve_scheme_apply(job->scheme, ctx))
        goto done;
    size_t size = sizeof(job->signature);
    if (EVP_PKEY_sign(ctx, job->signature, &size, job->digest, job->scheme->digest_size) != 1)
        goto done;
    if (size == 0 || size > sizeof(job->signature))
        goto done;
    job->signature_size = size;
    status = KEYREEVE_ASYNC_OK;
done:
    EVP_PKEY_CTX_free(ctx);
    return status;
}

/* By OpenSSL's own code: a card that signs wrong would verify wrong. Spec: RFC 8017 (a fault in one half of
 * the CRT gives the key away). */
static bool verifies(const keyreeve_job *job, OSSL_LIB_CTX *libctx)
{
    bool valid = false;
    EVP_PKEY *pkey = keyreeve_async_key_get(job->key);
    ERR_set_mark();
    EVP_PKEY_CTX *ctx = EVP_PKEY_CTX_new_from_pkey(libctx, pkey, "provider=default");
    if (ctx != NULL && EVP_PKEY_verify_init(ctx) == 1 && keyreeve_scheme_apply(job->scheme, ctx))
        valid = EVP_PKEY_verify(ctx, job->signature, job->signature_size, job->digest,
                                job->scheme->digest_size) == 1;
    EVP_PKEY_CTX_free(ctx);
    ERR_pop_to_mark();
    return valid;
}

/* Whether it is a whole ECDSA-Sig-Value with numbers in it. Spec: RFC 3279 2.2.3 */
static bool is_ecdsa_value(const unsigned char *der, size_t size)
{
    const unsigned char *end = der;
    ERR_set_mark();
    ECDSA_SIG *value = d2i_ECDSA_SIG(NULL, &end, (long)size);
    bool whole = value != NULL && end == der + size && !BN_is_zero(ECDSA_SIG_get0_r(value)) &&
                 !BN_is_zero(ECDSA_SIG_get0_s(value));
    ECDSA_SIG_free(value);
    ERR_pop_to_mark();
    return whole;
}

/* ECDSA of a card is held to its form alone, since verifying P-384 costs the processor more than the card
 * saves it. What was never with a card is verified: qatprovider 2.0.0 says that it signed, and has not, where
 * it finds no card for ECDSA. */
static bool may_be_released(const keyreeve_job *job, OSSL_LIB_CTX *libctx)
{
    bool is_rsa = job->scheme->padding != 0;
    if (!is_rsa && !is_ecdsa_value(job->signature, job->signature_size))
        return false;
    return (!is_rsa && job->paused) || verifies(job, libctx);
}

void keyreeve_job_collect(const keyreeve_job *job, OSSL_LIB_CTX *libctx, keyreeve_async_request *request)
{
    request->status = job->status;
    request->paused = job->paused;
    if (job->status != KEYREEVE_ASYNC_OK)
        return;
    if (!may_be_released(job, libctx)) {
        request->status = KEYREEVE_ASYNC_MISMATCH;
        return;
    }
    memcpy(request->signature, job->signature, job->signature_size);
    request->signature_size = job->signature_size;
}

void keyreeve_job_free(keyreeve_job *job)
{
    if (job == NULL)
        return;
    keyreeve_async_key_release(job->key);
    OPENSSL_cleanse(job, sizeof(*job)); /* a faulty RSA signature is as good as the key */
    free(job);
}
