#include "verify.h"

#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/rsa.h>

static int is_verified_by_the_peer(keyreeve_purpose purpose)
{
    switch (purpose) {
    case KEYREEVE_PURPOSE_TLS13_SERVER_VERIFY:
    case KEYREEVE_PURPOSE_TLS13_CLIENT_VERIFY:
    case KEYREEVE_PURPOSE_TLS12_SERVER_KEY_EXCHANGE:
    case KEYREEVE_PURPOSE_TLS12_CLIENT_VERIFY:
        return 1;
    case KEYREEVE_PURPOSE_UNSPECIFIED:
    case KEYREEVE_PURPOSE_CERTIFICATE_REQUEST:
    default:
        return 0;
    }
}

int keyreeve_verify_is_due(keyreeve_key *key, keyreeve_purpose purpose)
{
    keyreeve_key_type type = keyreeve_key_get_type(key);
    int is_ecdsa = type == KEYREEVE_KEY_P256 || type == KEYREEVE_KEY_P384;

    return keyreeve_provider_verifies_always(keyreeve_key_provider(key)) || !is_ecdsa ||
           !is_verified_by_the_peer(purpose) || !keyreeve_key_skip_verification(key);
}

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
