/* Signatures: a whole message goes to the agent, and what comes back is verified before it is used.
 *
 * There is no plain `sign`, so nothing can hand us a bare digest. The question for the size of a signature,
 * which libssl asks before each one, is answered here and never by the agent. */
#include <openssl/core_dispatch.h>
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <openssl/rsa.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "key.h"
#include "purpose.h"
#include "scheme.h"
#include "verify.h"

#define MESSAGE_FIRST_CAPACITY 512
#define DECIMAL 10
#define SALT_AUTO_DIGEST_MAX (-4) /* of OpenSSL 3.1: as long as possible, at most the digest */

typedef struct {
    keyreeve_provider *provider;
    keyreeve_key *key;
    keyreeve_digest digest;
    keyreeve_digest mgf1_digest; /* NONE: the same as digest */
    keyreeve_padding padding;
    int salt; /* RSA_PSS_SALTLEN_DIGEST, or a number of bytes */
    uint8_t *message;
    size_t message_len;
    size_t message_capacity;
} signature_ctx;

static void *signature_newctx(void *provctx, const char *properties)
{
    signature_ctx *ctx = calloc(1, sizeof(*ctx));

    (void)properties;
    if (ctx != NULL) {
        ctx->provider = provctx;
        ctx->salt = RSA_PSS_SALTLEN_DIGEST;
    }
    return ctx;
}

static void signature_freectx(void *vctx)
{
    signature_ctx *ctx = vctx;

    if (ctx == NULL)
        return;
    keyreeve_key_free(ctx->key);
    free(ctx->message);
    free(ctx);
}

/* EVP_DigestSignFinal works on a duplicate. */
static void *signature_dupctx(void *vctx)
{
    const signature_ctx *from = vctx;
    signature_ctx *copy = calloc(1, sizeof(*copy));

    if (copy == NULL)
        return NULL;
    *copy = *from;
    copy->message = NULL;
    copy->message_capacity = 0;
    if (from->message_len > 0) {
        if ((copy->message = malloc(from->message_len)) == NULL) {
            free(copy);
            return NULL;
        }
        memcpy(copy->message, from->message, from->message_len);
        copy->message_capacity = from->message_len;
    }
    if (copy->key != NULL)
        (void)keyreeve_key_up_ref(copy->key);
    return copy;
}

static int set_digest(signature_ctx *ctx, const char *name)
{
    if (keyreeve_digest_by_name(name, &ctx->digest))
        return 1;
    keyreeve_provider_raise(ctx->provider, KEYREEVE_ERROR_SCHEME_NOT_SUPPORTED, "digest %.32s", name);
    return 0;
}

static int signature_set_ctx_params(void *vctx, const OSSL_PARAM params[]);

static int signature_init(void *vctx, const char *digest_name, void *keydata, const OSSL_PARAM params[])
{
    signature_ctx *ctx = vctx;
    keyreeve_key *key = keydata;

    if (key != NULL) {
        if (keyreeve_key_id(key) == NULL) {
            keyreeve_provider_raise(ctx->provider, KEYREEVE_ERROR_NOT_A_REFERENCE,
                                    "it was not made from a reference");
            return 0;
        }
        (void)keyreeve_key_up_ref(key);
        keyreeve_key_free(ctx->key);
        ctx->key = key;
        ctx->digest = keyreeve_digest_default(keyreeve_key_get_type(key));
        ctx->mgf1_digest = KEYREEVE_DIGEST_NONE;
        ctx->padding =
            keyreeve_key_get_type(key) == KEYREEVE_KEY_RSA ? KEYREEVE_PADDING_PKCS1 : KEYREEVE_PADDING_NONE;
        ctx->salt = RSA_PSS_SALTLEN_DIGEST;
    }
    if (ctx->key == NULL)
        return 0;
    ctx->message_len = 0;
    if (digest_name != NULL && digest_name[0] != '\0' && !set_digest(ctx, digest_name))
        return 0;
    return signature_set_ctx_params(ctx, params);
}

static size_t salt_size(const signature_ctx *ctx)
{
    return ctx->salt == RSA_PSS_SALTLEN_DIGEST ? keyreeve_digest_size(ctx->digest) : (size_t)ctx->salt;
}

/* NULL, and an error on the queue, where key, digest, padding and salt amount to no TLS scheme. */
static const keyreeve_scheme *scheme_of(const signature_ctx *ctx)
{
    const keyreeve_scheme *scheme = NULL;
    int mgf1_fits = ctx->mgf1_digest == KEYREEVE_DIGEST_NONE || ctx->mgf1_digest == ctx->digest;

    if (ctx->key == NULL) {
        keyreeve_provider_raise(ctx->provider, KEYREEVE_ERROR_NOT_A_REFERENCE, "no key is set");
        return NULL;
    }
    if (ctx->padding != KEYREEVE_PADDING_PSS ||
        (mgf1_fits && salt_size(ctx) == keyreeve_digest_size(ctx->digest)))
        scheme = keyreeve_scheme_select(keyreeve_key_get_type(ctx->key), ctx->digest, ctx->padding);
    if (scheme == NULL) {
        const char *digest = keyreeve_digest_name(ctx->digest);

        keyreeve_provider_raise(ctx->provider, KEYREEVE_ERROR_SCHEME_NOT_SUPPORTED,
                                "%s key, digest %s, padding %s, salt of %u bytes",
                                keyreeve_key_algorithm(ctx->key), digest != NULL ? digest : "none",
                                ctx->padding == KEYREEVE_PADDING_PSS     ? "pss"
                                : ctx->padding == KEYREEVE_PADDING_PKCS1 ? "pkcs1"
                                                                         : "none",
                                ctx->padding == KEYREEVE_PADDING_PSS ? (unsigned int)salt_size(ctx) : 0U);
    }
    return scheme;
}

static int raise_exchange(const keyreeve_provider *provider, keyreeve_exchange_status status,
                          const char *socket, int system_error)
{
    switch (status) {
    case KEYREEVE_EXCHANGE_UNREACHABLE:
        keyreeve_provider_raise(provider, KEYREEVE_ERROR_AGENT_UNREACHABLE, "%s: %s", socket,
                                strerror(system_error));
        break;
    case KEYREEVE_EXCHANGE_BROKEN:
        keyreeve_provider_raise(provider, KEYREEVE_ERROR_AGENT_CLOSED, "%s", socket);
        break;
    case KEYREEVE_EXCHANGE_TIMEOUT:
        keyreeve_provider_raise(provider, KEYREEVE_ERROR_DEADLINE_EXCEEDED, "%s, %u ms", socket,
                                (unsigned int)keyreeve_provider_deadline_ms(provider));
        break;
    case KEYREEVE_EXCHANGE_PROTOCOL:
        keyreeve_provider_raise(provider, KEYREEVE_ERROR_AGENT_PROTOCOL, "%s", socket);
        break;
    case KEYREEVE_EXCHANGE_INVALID:
        keyreeve_provider_raise(provider, KEYREEVE_ERROR_PARAMETER_INVALID, "the request fits no frame");
        break;
    case KEYREEVE_EXCHANGE_MEMORY:
    case KEYREEVE_EXCHANGE_OK:
    default:
        keyreeve_provider_raise(provider, KEYREEVE_ERROR_OUT_OF_MEMORY, "while asking the agent");
        break;
    }
    return 0;
}

static int raise_refusal(const keyreeve_provider *provider, const keyreeve_answer *answer)
{
    const char *name = keyreeve_error_code_name(answer->code);

    if (answer->retry_after_ms != 0)
        keyreeve_provider_raise(provider, KEYREEVE_ERROR_AGENT_REFUSED, "%s (%u): %s (retry after %u ms)",
                                name, (unsigned int)answer->code, answer->detail,
                                (unsigned int)answer->retry_after_ms);
    else
        keyreeve_provider_raise(provider, KEYREEVE_ERROR_AGENT_REFUSED, "%s (%u): %s", name,
                                (unsigned int)answer->code, answer->detail);
    return 0;
}

/* The story of one signature: choose the scheme, ask, verify, hand over. */
static int sign_message(const signature_ctx *ctx, unsigned char *out, size_t *out_len, size_t out_size,
                        const uint8_t *message, size_t message_len)
{
    const keyreeve_scheme *scheme = scheme_of(ctx);
    keyreeve_sign_frame frame;
    keyreeve_answer answer;
    keyreeve_exchange_status status;
    const char *socket;
    int system_error;
    int max_size;

    if (scheme == NULL)
        return 0;
    max_size = EVP_PKEY_get_size(keyreeve_key_public(ctx->key));
    if (out == NULL) {
        *out_len = (size_t)max_size;
        return max_size > 0;
    }
    if (message_len > KEYREEVE_MESSAGE_MAX) {
        keyreeve_provider_raise(ctx->provider, KEYREEVE_ERROR_MESSAGE_TOO_LARGE, "more than %d bytes",
                                KEYREEVE_MESSAGE_MAX);
        return 0;
    }
    memset(&frame, 0, sizeof(frame));
    frame.deadline_ms = keyreeve_provider_deadline_ms(ctx->provider);
    frame.scheme = scheme->code;
    frame.purpose = (uint8_t)keyreeve_purpose_of(message, message_len);
    frame.key_id = keyreeve_key_id(ctx->key);
    frame.message = message;
    frame.message_len = message_len;
    socket = keyreeve_provider_socket(ctx->provider, keyreeve_key_socket(ctx->key));
    status =
        keyreeve_pool_exchange(keyreeve_provider_pool(ctx->provider), socket, &frame, &answer, &system_error);
    if (status != KEYREEVE_EXCHANGE_OK)
        return raise_exchange(ctx->provider, status, socket, system_error);
    if (answer.kind == KEYREEVE_ANSWER_REFUSED)
        return raise_refusal(ctx->provider, &answer);
    if (keyreeve_verify_is_due(ctx->key, (keyreeve_purpose)frame.purpose) &&
        !keyreeve_verify(ctx->key, scheme, answer.signature, answer.signature_len, message, message_len)) {
        keyreeve_key_mistrust(ctx->key);
        keyreeve_provider_raise(ctx->provider, KEYREEVE_ERROR_SIGNATURE_WRONG,
                                "key %s: another key stands behind the reference, or the signer is faulty",
                                frame.key_id);
        return 0;
    }
    if (answer.signature_len > out_size) {
        keyreeve_provider_raise(ctx->provider, KEYREEVE_ERROR_BUFFER_TOO_SMALL, "%u bytes are needed",
                                (unsigned int)answer.signature_len);
        return 0;
    }
    memcpy(out, answer.signature, answer.signature_len);
    *out_len = answer.signature_len;
    return 1;
}

static int signature_digest_sign(void *vctx, unsigned char *out, size_t *out_len, size_t out_size,
                                 const unsigned char *message, size_t message_len)
{
    return sign_message(vctx, out, out_len, out_size, message, message_len);
}

static int signature_update(void *vctx, const unsigned char *data, size_t len)
{
    signature_ctx *ctx = vctx;
    size_t needed;

    if (len > KEYREEVE_MESSAGE_MAX - ctx->message_len) {
        keyreeve_provider_raise(ctx->provider, KEYREEVE_ERROR_MESSAGE_TOO_LARGE, "more than %d bytes",
                                KEYREEVE_MESSAGE_MAX);
        return 0;
    }
    needed = ctx->message_len + len;
    if (needed > ctx->message_capacity) {
        size_t capacity = ctx->message_capacity > 0 ? ctx->message_capacity : MESSAGE_FIRST_CAPACITY;
        uint8_t *grown;

        while (capacity < needed)
            capacity *= 2;
        if ((grown = realloc(ctx->message, capacity)) == NULL) {
            keyreeve_provider_raise(ctx->provider, KEYREEVE_ERROR_OUT_OF_MEMORY,
                                    "while collecting the message");
            return 0;
        }
        ctx->message = grown;
        ctx->message_capacity = capacity;
    }
    if (len > 0)
        memcpy(ctx->message + ctx->message_len, data, len);
    ctx->message_len = needed;
    return 1;
}

static const uint8_t *collected(const signature_ctx *ctx)
{
    static const uint8_t NOTHING[1] = {0};

    return ctx->message != NULL ? ctx->message : NOTHING;
}

static int signature_digest_sign_final(void *vctx, unsigned char *out, size_t *out_len, size_t out_size)
{
    const signature_ctx *ctx = vctx;

    return sign_message(ctx, out, out_len, out_size, collected(ctx), ctx->message_len);
}

/* Verification asks nobody: `openssl req -verify` and the like use the key that they signed with. */
static int signature_digest_verify(void *vctx, const unsigned char *signature, size_t signature_len,
                                   const unsigned char *message, size_t message_len)
{
    const signature_ctx *ctx = vctx;
    const keyreeve_scheme *scheme = scheme_of(ctx);

    return scheme != NULL &&
           keyreeve_verify(ctx->key, scheme, signature, signature_len, message, message_len);
}

static int signature_digest_verify_final(void *vctx, const unsigned char *signature, size_t signature_len)
{
    const signature_ctx *ctx = vctx;

    return signature_digest_verify(vctx, signature, signature_len, collected(ctx), ctx->message_len);
}

static int invalid_parameter(const signature_ctx *ctx, const char *what)
{
    keyreeve_provider_raise(ctx->provider, KEYREEVE_ERROR_PARAMETER_INVALID, "%s", what);
    return 0;
}

/* By number or by name: libssl uses either, depending on its version. */
static int set_padding(signature_ctx *ctx, const OSSL_PARAM *param)
{
    const char *name = NULL;
    int mode = 0;

    if (param->data_type == OSSL_PARAM_UTF8_STRING && OSSL_PARAM_get_utf8_string_ptr(param, &name)) {
        if (strcasecmp(name, OSSL_PKEY_RSA_PAD_MODE_PSS) == 0)
            mode = RSA_PKCS1_PSS_PADDING;
        else if (strcasecmp(name, OSSL_PKEY_RSA_PAD_MODE_PKCSV15) == 0)
            mode = RSA_PKCS1_PADDING;
    } else if (!OSSL_PARAM_get_int(param, &mode)) {
        return invalid_parameter(ctx, "padding mode");
    }
    if (mode == RSA_PKCS1_PSS_PADDING)
        ctx->padding = KEYREEVE_PADDING_PSS;
    else if (mode == RSA_PKCS1_PADDING)
        ctx->padding = KEYREEVE_PADDING_PKCS1;
    else
        return invalid_parameter(ctx, "padding mode is neither pss nor pkcs1");
    return 1;
}

static int salt_of_text(const char *text, int *salt)
{
    char *end = NULL;
    long value;

    if (strcmp(text, OSSL_PKEY_RSA_PSS_SALT_LEN_DIGEST) == 0) {
        *salt = RSA_PSS_SALTLEN_DIGEST;
        return 1;
    }
    value = strtol(text, &end, DECIMAL);
    if (end == text || *end != '\0' || value < SALT_AUTO_DIGEST_MAX || value > KEYREEVE_SIGNATURE_MAX)
        return 0;
    *salt = (int)value;
    return 1;
}

static int set_salt(signature_ctx *ctx, const OSSL_PARAM *param)
{
    const char *text = NULL;
    int salt = 0;
    int got = param->data_type == OSSL_PARAM_UTF8_STRING
                  ? OSSL_PARAM_get_utf8_string_ptr(param, &text) && salt_of_text(text, &salt)
                  : OSSL_PARAM_get_int(param, &salt);

    if (got && salt == SALT_AUTO_DIGEST_MAX)
        salt = RSA_PSS_SALTLEN_DIGEST;
    if (!got || salt < RSA_PSS_SALTLEN_DIGEST || salt > KEYREEVE_SIGNATURE_MAX)
        return invalid_parameter(ctx, "salt length: TLS has only that of the digest");
    ctx->salt = salt;
    return 1;
}

static int set_mgf1_digest(signature_ctx *ctx, const OSSL_PARAM *param)
{
    const char *name = NULL;

    if (!OSSL_PARAM_get_utf8_string_ptr(param, &name) || !keyreeve_digest_by_name(name, &ctx->mgf1_digest))
        return invalid_parameter(ctx, "MGF1 digest");
    return 1;
}

static int signature_set_ctx_params(void *vctx, const OSSL_PARAM params[])
{
    signature_ctx *ctx = vctx;
    const OSSL_PARAM *param;
    const char *name = NULL;
    int is_rsa = ctx->key != NULL && keyreeve_key_get_type(ctx->key) == KEYREEVE_KEY_RSA;

    if (params == NULL)
        return 1;
    if ((param = OSSL_PARAM_locate_const(params, OSSL_SIGNATURE_PARAM_DIGEST)) != NULL &&
        (!OSSL_PARAM_get_utf8_string_ptr(param, &name) || !set_digest(ctx, name)))
        return 0;
    if (!is_rsa)
        return 1;
    if ((param = OSSL_PARAM_locate_const(params, OSSL_SIGNATURE_PARAM_PAD_MODE)) != NULL &&
        !set_padding(ctx, param))
        return 0;
    if ((param = OSSL_PARAM_locate_const(params, OSSL_SIGNATURE_PARAM_PSS_SALTLEN)) != NULL &&
        !set_salt(ctx, param))
        return 0;
    if ((param = OSSL_PARAM_locate_const(params, OSSL_SIGNATURE_PARAM_MGF1_DIGEST)) != NULL &&
        !set_mgf1_digest(ctx, param))
        return 0;
    return 1;
}

static const OSSL_PARAM *signature_settable_ctx_params(void *vctx, void *provctx)
{
    static const OSSL_PARAM TABLE[] = {
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_DIGEST, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_PAD_MODE, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_PSS_SALTLEN, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_MGF1_DIGEST, NULL, 0),
        OSSL_PARAM_END,
    };

    (void)vctx;
    (void)provctx;
    return TABLE;
}

static int get_algorithm_id(const signature_ctx *ctx, OSSL_PARAM *param)
{
    const keyreeve_scheme *scheme = scheme_of(ctx);

    return scheme != NULL && OSSL_PARAM_set_octet_string(param, scheme->algorithm, scheme->algorithm_len);
}

static int get_padding(const signature_ctx *ctx, OSSL_PARAM *param)
{
    int pss = ctx->padding == KEYREEVE_PADDING_PSS;

    if (param->data_type == OSSL_PARAM_UTF8_STRING)
        return OSSL_PARAM_set_utf8_string(param,
                                          pss ? OSSL_PKEY_RSA_PAD_MODE_PSS : OSSL_PKEY_RSA_PAD_MODE_PKCSV15);
    return OSSL_PARAM_set_int(param, pss ? RSA_PKCS1_PSS_PADDING : RSA_PKCS1_PADDING);
}

static int get_salt(const signature_ctx *ctx, OSSL_PARAM *param)
{
    if (param->data_type == OSSL_PARAM_UTF8_STRING)
        return ctx->salt == RSA_PSS_SALTLEN_DIGEST
                   ? OSSL_PARAM_set_utf8_string(param, OSSL_PKEY_RSA_PSS_SALT_LEN_DIGEST)
                   : 0;
    return OSSL_PARAM_set_int(param, ctx->salt);
}

static int signature_get_ctx_params(void *vctx, OSSL_PARAM params[])
{
    const signature_ctx *ctx = vctx;
    const char *digest = keyreeve_digest_name(ctx->digest);
    const char *mgf1 = keyreeve_digest_name(ctx->mgf1_digest);
    OSSL_PARAM *param;

    if ((param = OSSL_PARAM_locate(params, OSSL_SIGNATURE_PARAM_ALGORITHM_ID)) != NULL &&
        !get_algorithm_id(ctx, param))
        return 0;
    if ((param = OSSL_PARAM_locate(params, OSSL_SIGNATURE_PARAM_DIGEST)) != NULL &&
        !OSSL_PARAM_set_utf8_string(param, digest != NULL ? digest : ""))
        return 0;
    if ((param = OSSL_PARAM_locate(params, OSSL_SIGNATURE_PARAM_PAD_MODE)) != NULL &&
        !get_padding(ctx, param))
        return 0;
    if ((param = OSSL_PARAM_locate(params, OSSL_SIGNATURE_PARAM_PSS_SALTLEN)) != NULL &&
        !get_salt(ctx, param))
        return 0;
    if ((param = OSSL_PARAM_locate(params, OSSL_SIGNATURE_PARAM_MGF1_DIGEST)) != NULL &&
        !OSSL_PARAM_set_utf8_string(param, mgf1 != NULL     ? mgf1
                                           : digest != NULL ? digest
                                                            : ""))
        return 0;
    return 1;
}

static const OSSL_PARAM *signature_gettable_ctx_params(void *vctx, void *provctx)
{
    static const OSSL_PARAM TABLE[] = {
        OSSL_PARAM_octet_string(OSSL_SIGNATURE_PARAM_ALGORITHM_ID, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_DIGEST, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_PAD_MODE, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_PSS_SALTLEN, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_MGF1_DIGEST, NULL, 0),
        OSSL_PARAM_END,
    };

    (void)vctx;
    (void)provctx;
    return TABLE;
}

#define COMMON_FUNCTIONS                                                                                     \
    KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_NEWCTX, signature_newctx),                                         \
        KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_FREECTX, signature_freectx),                                   \
        KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_DUPCTX, signature_dupctx),                                     \
        KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_DIGEST_SIGN_INIT, signature_init),                             \
        KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_DIGEST_SIGN, signature_digest_sign),                           \
        KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_DIGEST_VERIFY_INIT, signature_init),                           \
        KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_DIGEST_VERIFY, signature_digest_verify),                       \
        KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_GET_CTX_PARAMS, signature_get_ctx_params),                     \
        KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_GETTABLE_CTX_PARAMS, signature_gettable_ctx_params)

static const OSSL_DISPATCH DIGEST_FUNCTIONS[] = {
    COMMON_FUNCTIONS,
    KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_DIGEST_SIGN_UPDATE, signature_update),
    KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_DIGEST_SIGN_FINAL, signature_digest_sign_final),
    KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_DIGEST_VERIFY_UPDATE, signature_update),
    KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_DIGEST_VERIFY_FINAL, signature_digest_verify_final),
    KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_SET_CTX_PARAMS, signature_set_ctx_params),
    KEYREEVE_DISPATCH(OSSL_FUNC_SIGNATURE_SETTABLE_CTX_PARAMS, signature_settable_ctx_params),
    KEYREEVE_DISPATCH_END,
};
/* RFC 8032: Ed25519 takes the message whole, there is no digest to set and nothing to collect. */
static const OSSL_DISPATCH ED25519_FUNCTIONS[] = {COMMON_FUNCTIONS, KEYREEVE_DISPATCH_END};

const OSSL_ALGORITHM keyreeve_signatures[] = {
    {KEYREEVE_NAMES_RSA, KEYREEVE_PROPERTIES, DIGEST_FUNCTIONS, "Keyreeve RSA signature"},
    {KEYREEVE_NAMES_ECDSA, KEYREEVE_PROPERTIES, DIGEST_FUNCTIONS, "Keyreeve ECDSA signature"},
    {KEYREEVE_NAMES_ED25519, KEYREEVE_PROPERTIES, ED25519_FUNCTIONS, "Keyreeve Ed25519 signature"},
    {NULL, NULL, NULL, NULL},
};
