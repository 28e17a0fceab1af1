/* Key management. Everything public is answered by the default provider in our own library context; a private
 * part is neither given out nor taken in.
 *
 * import and match are what lets X509_check_private_key compare a certificate's key with a reference. export
 * refuses any selection that has the private part, even though there is none to leak: were it to succeed,
 * libcrypto would take the exported key to the default provider and try to sign there. */
#include <openssl/core_dispatch.h>
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/params.h>

#include "key.h"
#include "scheme.h"

static void *new_rsa(void *provctx)
{
    return keyreeve_key_new(provctx, "RSA");
}

static void *new_ec(void *provctx)
{
    return keyreeve_key_new(provctx, "EC");
}

static void *new_ed25519(void *provctx)
{
    return keyreeve_key_new(provctx, "ED25519");
}

static void keymgmt_free(void *keydata)
{
    keyreeve_key_free(keydata);
}

/* Takes over the key that our decoder put into its object reference. */
static void *keymgmt_load(const void *reference, size_t reference_size)
{
    keyreeve_key **from = (keyreeve_key **)(uintptr_t)reference;
    keyreeve_key *key;

    if (reference_size != sizeof(*from))
        return NULL;
    key = *from;
    *from = NULL;
    return key;
}

static int keymgmt_has(const void *keydata, int selection)
{
    const keyreeve_key *key = keydata;

    if (key == NULL || keyreeve_key_public(key) == NULL)
        return 0;
    return (selection & OSSL_KEYMGMT_SELECT_PRIVATE_KEY) == 0 || keyreeve_key_id(key) != NULL;
}

static int keymgmt_match(const void *keydata1, const void *keydata2, int selection)
{
    EVP_PKEY *one = keyreeve_key_public(keydata1);
    EVP_PKEY *other = keyreeve_key_public(keydata2);

    if (one == NULL || other == NULL)
        return 0;
    if ((selection & OSSL_KEYMGMT_SELECT_KEYPAIR) != 0)
        return EVP_PKEY_eq(one, other) == 1;
    if ((selection & OSSL_KEYMGMT_SELECT_ALL_PARAMETERS) != 0)
        return EVP_PKEY_parameters_eq(one, other) == 1;
    return 1;
}

static void *keymgmt_dup(const void *keydata, int selection)
{
    keyreeve_key *key = (keyreeve_key *)(uintptr_t)keydata;

    (void)selection;
    return keyreeve_key_public(key) != NULL ? keyreeve_key_up_ref(key) : NULL;
}

static int has_private_part(const OSSL_PARAM params[])
{
    return OSSL_PARAM_locate_const(params, OSSL_PKEY_PARAM_PRIV_KEY) != NULL ||
           OSSL_PARAM_locate_const(params, OSSL_PKEY_PARAM_RSA_D) != NULL;
}

static int keymgmt_import(void *keydata, int selection, const OSSL_PARAM params[])
{
    keyreeve_key *key = keydata;
    EVP_PKEY_CTX *ctx = NULL;
    EVP_PKEY *public_key = NULL;
    int ok = 0;

    if ((selection & OSSL_KEYMGMT_SELECT_PUBLIC_KEY) == 0 || has_private_part(params))
        return 0;
    ctx = EVP_PKEY_CTX_new_from_name(keyreeve_provider_libctx(keyreeve_key_provider(key)),
                                     keyreeve_key_algorithm(key), NULL);
    ok = ctx != NULL && EVP_PKEY_fromdata_init(ctx) > 0 &&
         EVP_PKEY_fromdata(ctx, &public_key, EVP_PKEY_PUBLIC_KEY, (OSSL_PARAM *)(uintptr_t)params) > 0 &&
         keyreeve_key_fill(key, public_key);
    if (!ok)
        EVP_PKEY_free(public_key);
    EVP_PKEY_CTX_free(ctx);
    return ok;
}

static int keymgmt_export(void *keydata, int selection, OSSL_CALLBACK *callback, void *arg)
{
    const keyreeve_key *key = keydata;

    if (keyreeve_key_public(key) == NULL || (selection & OSSL_KEYMGMT_SELECT_PRIVATE_KEY) != 0)
        return 0;
    return EVP_PKEY_export(keyreeve_key_public(key), selection, callback, arg);
}

#define RSA_TYPES OSSL_PARAM_BN(OSSL_PKEY_PARAM_RSA_N, NULL, 0), OSSL_PARAM_BN(OSSL_PKEY_PARAM_RSA_E, NULL, 0)
#define EC_TYPES                                                                                             \
    OSSL_PARAM_utf8_string(OSSL_PKEY_PARAM_GROUP_NAME, NULL, 0),                                             \
        OSSL_PARAM_octet_string(OSSL_PKEY_PARAM_PUB_KEY, NULL, 0)
#define COMMON_TYPES                                                                                         \
    OSSL_PARAM_int(OSSL_PKEY_PARAM_BITS, NULL), OSSL_PARAM_int(OSSL_PKEY_PARAM_SECURITY_BITS, NULL),         \
        OSSL_PARAM_int(OSSL_PKEY_PARAM_MAX_SIZE, NULL),                                                      \
        OSSL_PARAM_utf8_string(OSSL_PKEY_PARAM_DEFAULT_DIGEST, NULL, 0),                                     \
        OSSL_PARAM_utf8_string(OSSL_PKEY_PARAM_MANDATORY_DIGEST, NULL, 0)

static const OSSL_PARAM *types_rsa(int selection)
{
    static const OSSL_PARAM TABLE[] = {RSA_TYPES, OSSL_PARAM_END};

    (void)selection;
    return TABLE;
}

static const OSSL_PARAM *types_ec(int selection)
{
    static const OSSL_PARAM TABLE[] = {EC_TYPES, OSSL_PARAM_END};

    (void)selection;
    return TABLE;
}

static const OSSL_PARAM *types_ed25519(int selection)
{
    static const OSSL_PARAM TABLE[] = {OSSL_PARAM_octet_string(OSSL_PKEY_PARAM_PUB_KEY, NULL, 0),
                                       OSSL_PARAM_END};

    (void)selection;
    return TABLE;
}

static const OSSL_PARAM *gettable_rsa(void *provctx)
{
    static const OSSL_PARAM TABLE[] = {COMMON_TYPES, RSA_TYPES, OSSL_PARAM_END};

    (void)provctx;
    return TABLE;
}

static const OSSL_PARAM *gettable_ec(void *provctx)
{
    static const OSSL_PARAM TABLE[] = {COMMON_TYPES,
                                       EC_TYPES,
                                       OSSL_PARAM_octet_string(OSSL_PKEY_PARAM_ENCODED_PUBLIC_KEY, NULL, 0),
                                       OSSL_PARAM_BN(OSSL_PKEY_PARAM_EC_PUB_X, NULL, 0),
                                       OSSL_PARAM_BN(OSSL_PKEY_PARAM_EC_PUB_Y, NULL, 0),
                                       OSSL_PARAM_utf8_string(OSSL_PKEY_PARAM_EC_ENCODING, NULL, 0),
                                       OSSL_PARAM_END};

    (void)provctx;
    return TABLE;
}

static const OSSL_PARAM *gettable_ed25519(void *provctx)
{
    static const OSSL_PARAM TABLE[] = {
        COMMON_TYPES, OSSL_PARAM_octet_string(OSSL_PKEY_PARAM_PUB_KEY, NULL, 0),
        OSSL_PARAM_octet_string(OSSL_PKEY_PARAM_ENCODED_PUBLIC_KEY, NULL, 0), OSSL_PARAM_END};

    (void)provctx;
    return TABLE;
}

/* The default provider names SHA-256 for every EC key; ours signs with the digest of the key's one scheme. */
static int keymgmt_get_params(void *keydata, OSSL_PARAM params[])
{
    const keyreeve_key *key = keydata;
    OSSL_PARAM *param = OSSL_PARAM_locate(params, OSSL_PKEY_PARAM_DEFAULT_DIGEST);
    const char *digest = keyreeve_digest_name(keyreeve_digest_default(keyreeve_key_get_type(key)));

    if (keyreeve_key_public(key) == NULL || !EVP_PKEY_get_params(keyreeve_key_public(key), params))
        return 0;
    return param == NULL || digest == NULL || OSSL_PARAM_set_utf8_string(param, digest);
}

static const char *operation_name_rsa(int operation)
{
    return operation == OSSL_OP_SIGNATURE ? "RSA" : NULL;
}

static const char *operation_name_ec(int operation)
{
    return operation == OSSL_OP_SIGNATURE ? KEYREEVE_NAMES_ECDSA : NULL;
}

static const char *operation_name_ed25519(int operation)
{
    return operation == OSSL_OP_SIGNATURE ? "ED25519" : NULL;
}

#define KEYMGMT_FUNCTIONS(kind)                                                                              \
    KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_NEW, new_##kind),                                                    \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_FREE, keymgmt_free),                                             \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_LOAD, keymgmt_load),                                             \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_HAS, keymgmt_has),                                               \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_MATCH, keymgmt_match),                                           \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_DUP, keymgmt_dup),                                               \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_IMPORT, keymgmt_import),                                         \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_IMPORT_TYPES, types_##kind),                                     \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_EXPORT, keymgmt_export),                                         \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_EXPORT_TYPES, types_##kind),                                     \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_GET_PARAMS, keymgmt_get_params),                                 \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_GETTABLE_PARAMS, gettable_##kind),                               \
        KEYREEVE_DISPATCH(OSSL_FUNC_KEYMGMT_QUERY_OPERATION_NAME, operation_name_##kind),                    \
        KEYREEVE_DISPATCH_END

static const OSSL_DISPATCH RSA_FUNCTIONS[] = {KEYMGMT_FUNCTIONS(rsa)};
static const OSSL_DISPATCH EC_FUNCTIONS[] = {KEYMGMT_FUNCTIONS(ec)};
static const OSSL_DISPATCH ED25519_FUNCTIONS[] = {KEYMGMT_FUNCTIONS(ed25519)};

const OSSL_ALGORITHM keyreeve_keymgmts[] = {
    {KEYREEVE_NAMES_RSA, KEYREEVE_PROPERTIES, RSA_FUNCTIONS, "Keyreeve RSA key reference"},
    {KEYREEVE_NAMES_EC, KEYREEVE_PROPERTIES, EC_FUNCTIONS, "Keyreeve EC key reference"},
    {KEYREEVE_NAMES_ED25519, KEYREEVE_PROPERTIES, ED25519_FUNCTIONS, "Keyreeve Ed25519 key reference"},
    {NULL, NULL, NULL, NULL},
};
