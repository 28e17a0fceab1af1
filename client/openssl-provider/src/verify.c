#include "verify.h"

#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/rsa.h>

int keyreeve_verify(const keyreeve_key *key, const keyreeve_scheme *scheme, const uint8_t *signature,
                    size_t signature_len, const uint8_t *message, size_t message_len)
{
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    EVP_PKEY_CTX *pkey_ctx = NULL; /* belongs to ctx */
    OSSL_LIB_CTX *libctx = keyreeve_provider_libctx(keyreeve_key_provider(key));
    int ok = 0;

    (void)ERR_set_mark();
    if (ctx == NULL || EVP_DigestVerifyInit_ex(ctx, &pkey_ctx, keyreeve_digest_name(scheme->digest), libctx,
                                               NULL, keyreeve_key_public(key), NULL) <= 0)
        goto done;
    if (scheme->padding == KEYREEVE_PADDING_PSS &&
        (EVP_PKEY_CTX_set_rsa_padding(pkey_ctx, RSA_PKCS1_PSS_PADDING) <= 0 ||
         EVP_PKEY_CTX_set_rsa_pss_saltlen(pkey_ctx, RSA_PSS_SALTLEN_DIGEST) <= 0))
        goto done;
    ok = EVP_DigestVerify(ctx, signature, signature_len, message, message_len) == 1;
done:
    EVP_MD_CTX_free(ctx);
    (void)ERR_pop_to_mark();
    return ok;
}
