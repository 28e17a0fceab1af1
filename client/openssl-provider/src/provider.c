/* Loading: reads the configuration, opens nothing. The default provider of our own library context is built
 * into libcrypto, so that no file is read for it either. */
#include "provider.h"

#include <openssl/core_dispatch.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/params.h>
#include <openssl/provider.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#ifndef KEYREEVE_VERSION
#define KEYREEVE_VERSION "0.1.0"
#endif
#define PARAM_SOCKET "socket"
#define PARAM_DEADLINE_MS "deadline_ms"
#define PARAM_VERIFY "verify"
#define DECIMAL 10

struct keyreeve_provider_st {
    const OSSL_CORE_HANDLE *handle;
    OSSL_FUNC_core_get_params_fn *core_get_params;
    OSSL_FUNC_core_new_error_fn *core_new_error;
    OSSL_FUNC_core_vset_error_fn *core_vset_error;
    OSSL_FUNC_BIO_gets_fn *bio_gets;
    OSSL_FUNC_BIO_read_ex_fn *bio_read_ex;
    OSSL_LIB_CTX *libctx;
    OSSL_PROVIDER *default_provider;
    keyreeve_pool *pool;
    const char *fault; /* what is wrong with the configuration, or NULL */
    uint32_t deadline_ms;
    int verify_always;
    char socket[KEYREEVE_SOCKET_MAX + 1]; /* "" where none is configured */
};

OSSL_LIB_CTX *keyreeve_provider_libctx(const keyreeve_provider *provider)
{
    return provider->libctx;
}

keyreeve_pool *keyreeve_provider_pool(const keyreeve_provider *provider)
{
    return provider->pool;
}

int keyreeve_provider_verifies_always(const keyreeve_provider *provider)
{
    return provider->verify_always;
}

uint32_t keyreeve_provider_deadline_ms(const keyreeve_provider *provider)
{
    return provider->deadline_ms;
}

const char *keyreeve_provider_socket(const keyreeve_provider *provider, const char *of_reference)
{
    return provider->socket[0] != '\0' ? provider->socket : of_reference;
}

int keyreeve_provider_is_configured(const keyreeve_provider *provider)
{
    if (provider->fault != NULL)
        keyreeve_provider_raise(provider, KEYREEVE_ERROR_CONFIG_INVALID, "%s", provider->fault);
    return provider->fault == NULL;
}

int keyreeve_provider_gets(const keyreeve_provider *provider, OSSL_CORE_BIO *bio, char *line, int size)
{
    return provider->bio_gets(bio, line, size);
}

int keyreeve_provider_read(const keyreeve_provider *provider, OSSL_CORE_BIO *bio, uint8_t *data, size_t len,
                           size_t *got)
{
    return provider->bio_read_ex(bio, data, len, got);
}

void keyreeve_provider_raise(const keyreeve_provider *provider, keyreeve_error error, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    provider->core_new_error(provider->handle);
    provider->core_vset_error(provider->handle, (uint32_t)error, format, arguments);
    va_end(arguments);
}

static int take_core_functions(keyreeve_provider *provider, const OSSL_DISPATCH *in)
{
    for (; in->function_id != 0; in++) {
        switch (in->function_id) {
        case OSSL_FUNC_CORE_GET_PARAMS:
            provider->core_get_params = OSSL_FUNC_core_get_params(in);
            break;
        case OSSL_FUNC_CORE_NEW_ERROR:
            provider->core_new_error = OSSL_FUNC_core_new_error(in);
            break;
        case OSSL_FUNC_CORE_VSET_ERROR:
            provider->core_vset_error = OSSL_FUNC_core_vset_error(in);
            break;
        case OSSL_FUNC_BIO_GETS:
            provider->bio_gets = OSSL_FUNC_BIO_gets(in);
            break;
        case OSSL_FUNC_BIO_READ_EX:
            provider->bio_read_ex = OSSL_FUNC_BIO_read_ex(in);
            break;
        default:
            break;
        }
    }
    return provider->core_get_params != NULL && provider->core_new_error != NULL &&
           provider->core_vset_error != NULL && provider->bio_gets != NULL && provider->bio_read_ex != NULL;
}

static void read_deadline(keyreeve_provider *provider, const char *text)
{
    char *end = NULL;
    unsigned long value = text[0] >= '0' && text[0] <= '9' ? strtoul(text, &end, DECIMAL) : 0;

    if (value < 1 || value > KEYREEVE_DEADLINE_MS_MAX || *end != '\0')
        provider->fault = PARAM_DEADLINE_MS " is not 1 to 60000";
    else
        provider->deadline_ms = (uint32_t)value;
}

static void read_verify(keyreeve_provider *provider, const char *text)
{
    if (strcmp(text, "always") == 0)
        provider->verify_always = 1;
    else if (strcmp(text, "sampled") != 0)
        provider->fault = PARAM_VERIFY " is neither sampled nor always";
}

static void read_socket(keyreeve_provider *provider, const char *text)
{
    size_t len = strlen(text);

    if (!keyreeve_socket_path_is_valid((const uint8_t *)text, len))
        provider->fault = PARAM_SOCKET " is not an absolute path of at most 107 bytes";
    else
        memcpy(provider->socket, text, len + 1);
}

/* The settings of the provider's own section in openssl.cnf. A wrong one does not keep the provider from
 * loading: libcrypto would drop it without a word, and programs would say that a key reference is no key. It
 * is reported when a reference is read. */
static int read_configuration(keyreeve_provider *provider)
{
    char *socket = NULL;
    char *deadline_ms = NULL;
    char *verify = NULL;
    OSSL_PARAM wanted[] = {
        OSSL_PARAM_construct_utf8_ptr(PARAM_SOCKET, &socket, 0),
        OSSL_PARAM_construct_utf8_ptr(PARAM_DEADLINE_MS, &deadline_ms, 0),
        OSSL_PARAM_construct_utf8_ptr(PARAM_VERIFY, &verify, 0),
        OSSL_PARAM_construct_end(),
    };

    provider->deadline_ms = KEYREEVE_DEADLINE_MS_DEFAULT;
    if (!provider->core_get_params(provider->handle, wanted))
        return 0;
    if (deadline_ms != NULL)
        read_deadline(provider, deadline_ms);
    if (socket != NULL)
        read_socket(provider, socket);
    if (verify != NULL)
        read_verify(provider, verify);
    return 1;
}

static const OSSL_PARAM *provider_gettable_params(void *provctx)
{
    static const OSSL_PARAM TABLE[] = {
        OSSL_PARAM_utf8_ptr(OSSL_PROV_PARAM_NAME, NULL, 0),
        OSSL_PARAM_utf8_ptr(OSSL_PROV_PARAM_VERSION, NULL, 0),
        OSSL_PARAM_utf8_ptr(OSSL_PROV_PARAM_BUILDINFO, NULL, 0),
        OSSL_PARAM_int(OSSL_PROV_PARAM_STATUS, NULL),
        OSSL_PARAM_END,
    };

    (void)provctx;
    return TABLE;
}

static int provider_get_params(void *provctx, OSSL_PARAM params[])
{
    OSSL_PARAM *param;

    (void)provctx;
    if ((param = OSSL_PARAM_locate(params, OSSL_PROV_PARAM_NAME)) != NULL &&
        !OSSL_PARAM_set_utf8_ptr(param, "Keyreeve provider: keys stay in the key cluster"))
        return 0;
    if ((param = OSSL_PARAM_locate(params, OSSL_PROV_PARAM_VERSION)) != NULL &&
        !OSSL_PARAM_set_utf8_ptr(param, KEYREEVE_VERSION))
        return 0;
    if ((param = OSSL_PARAM_locate(params, OSSL_PROV_PARAM_BUILDINFO)) != NULL &&
        !OSSL_PARAM_set_utf8_ptr(param, KEYREEVE_VERSION))
        return 0;
    if ((param = OSSL_PARAM_locate(params, OSSL_PROV_PARAM_STATUS)) != NULL && !OSSL_PARAM_set_int(param, 1))
        return 0;
    return 1;
}

static const OSSL_ITEM *provider_get_reason_strings(void *provctx)
{
    (void)provctx;
    return keyreeve_error_reasons();
}

static const OSSL_ALGORITHM *provider_query_operation(void *provctx, int operation, int *no_cache)
{
    (void)provctx;
    *no_cache = 0;
    switch (operation) {
    case OSSL_OP_DECODER:
        return keyreeve_decoders;
    case OSSL_OP_KEYMGMT:
        return keyreeve_keymgmts;
    case OSSL_OP_SIGNATURE:
        return keyreeve_signatures;
    default:
        return NULL;
    }
}

static void provider_teardown(void *provctx)
{
    keyreeve_provider *provider = provctx;

    if (provider == NULL)
        return;
    keyreeve_pool_free(provider->pool);
    if (provider->default_provider != NULL)
        (void)OSSL_PROVIDER_unload(provider->default_provider);
    OSSL_LIB_CTX_free(provider->libctx);
    free(provider);
}

static const OSSL_DISPATCH PROVIDER_FUNCTIONS[] = {
    KEYREEVE_DISPATCH(OSSL_FUNC_PROVIDER_TEARDOWN, provider_teardown),
    KEYREEVE_DISPATCH(OSSL_FUNC_PROVIDER_GETTABLE_PARAMS, provider_gettable_params),
    KEYREEVE_DISPATCH(OSSL_FUNC_PROVIDER_GET_PARAMS, provider_get_params),
    KEYREEVE_DISPATCH(OSSL_FUNC_PROVIDER_QUERY_OPERATION, provider_query_operation),
    KEYREEVE_DISPATCH(OSSL_FUNC_PROVIDER_GET_REASON_STRINGS, provider_get_reason_strings),
    KEYREEVE_DISPATCH_END,
};

__attribute__((visibility("default"))) int OSSL_provider_init(const OSSL_CORE_HANDLE *handle,
                                                              const OSSL_DISPATCH *in,
                                                              const OSSL_DISPATCH **out, void **provctx)
{
    keyreeve_provider *provider = calloc(1, sizeof(*provider));

    if (provider == NULL)
        return 0;
    provider->handle = handle;
    if (!take_core_functions(provider, in) || !read_configuration(provider))
        goto failed;
    if ((provider->pool = keyreeve_pool_new()) == NULL || (provider->libctx = OSSL_LIB_CTX_new()) == NULL ||
        (provider->default_provider = OSSL_PROVIDER_load(provider->libctx, "default")) == NULL)
        goto failed;
    *out = PROVIDER_FUNCTIONS;
    *provctx = provider;
    return 1;
failed:
    provider_teardown(provider);
    return 0;
}
