#include "scheme.h"

#include <string.h>

#include <openssl/core_names.h>
#include <openssl/params.h>
#include <openssl/rsa.h>

#define COUNT_OF(array) (sizeof(array) / sizeof((array)[0]))

static const keyreeve_scheme schemes[] = {
    {0x0401, "RSA", NULL, "SHA256", 32, RSA_PKCS1_PADDING},
    {0x0501, "RSA", NULL, "SHA384", 48, RSA_PKCS1_PADDING},
    {0x0601, "RSA", NULL, "SHA512", 64, RSA_PKCS1_PADDING},
    {0x0403, "EC", "prime256v1", "SHA256", 32, 0},
    {0x0503, "EC", "secp384r1", "SHA384", 48, 0},
    {0x0804, "RSA", NULL, "SHA256", 32, RSA_PKCS1_PSS_PADDING},
    {0x0805, "RSA", NULL, "SHA384", 48, RSA_PKCS1_PSS_PADDING},
    {0x0806, "RSA", NULL, "SHA512", 64, RSA_PKCS1_PSS_PADDING},
};

const keyreeve_scheme *keyreeve_scheme_find(uint16_t code_point)
{
    for (size_t i = 0; i < COUNT_OF(schemes); i++)
        if (schemes[i].code_point == code_point)
            return &schemes[i];
    return NULL;
}

bool keyreeve_scheme_fits(const keyreeve_scheme *scheme, const EVP_PKEY *key)
{
    char group[64];
    size_t size = 0;
    if (!EVP_PKEY_is_a(key, scheme->key_type))
        return false;
    if (scheme->group == NULL)
        return true;
    return EVP_PKEY_get_group_name(key, group, sizeof(group), &size) == 1 &&
           strcmp(group, scheme->group) == 0;
}

bool keyreeve_scheme_hash(const keyreeve_scheme *scheme, OSSL_LIB_CTX *libctx, const unsigned char *message,
                          size_t size, unsigned char digest[KEYREEVE_DIGEST_MAX])
{
    size_t made = 0;
    return EVP_Q_digest(libctx, scheme->digest, "provider=default", message, size, digest, &made) == 1 &&
           made == scheme->digest_size;
}

/* By OSSL_PARAM and not by EVP_PKEY_CTX_set_..., which would look the hash up in the default library context.
 */
bool keyreeve_scheme_apply(const keyreeve_scheme *scheme, EVP_PKEY_CTX *ctx)
{
    char *digest = (char *)(uintptr_t)scheme->digest; /* read only: OSSL_PARAM has no const */
    int padding = scheme->padding, salt = (int)scheme->digest_size;
    OSSL_PARAM params[5], *next = params;
    *next++ = OSSL_PARAM_construct_utf8_string(OSSL_SIGNATURE_PARAM_DIGEST, digest, 0);
    if (padding != 0)
        *next++ = OSSL_PARAM_construct_int(OSSL_SIGNATURE_PARAM_PAD_MODE, &padding);
    if (padding == RSA_PKCS1_PSS_PADDING) {
        *next++ = OSSL_PARAM_construct_int(OSSL_SIGNATURE_PARAM_PSS_SALTLEN, &salt);
        *next++ = OSSL_PARAM_construct_utf8_string(OSSL_SIGNATURE_PARAM_MGF1_DIGEST, digest, 0);
    }
    *next = OSSL_PARAM_construct_end();
    return EVP_PKEY_CTX_set_params(ctx, params) == 1;
}
