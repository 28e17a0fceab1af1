/* Decoders: PEM to DER for our label, and DER to key for both envelopes.
 *
 * A decoder that finds nothing of its own returns 1 without calling back ("empty handed"), so that libcrypto
 * goes on to the next; 0 ends the decoding and shows our error. The PEM decoder consumes exactly one block,
 * whoever's it is: libcrypto reads on from where the last decoder stopped, thus a certificate before the key
 * stays readable. */
#include <openssl/core_dispatch.h>
#include <openssl/core_names.h>
#include <openssl/core_object.h>
#include <openssl/params.h>
#include <string.h>

#include "key.h"
#include "pem.h"

#define STRUCTURE "KeyreeveKeyReference"
#define PROPERTIES_PEM KEYREEVE_PROPERTIES ",input=pem"
#define PROPERTIES_RAW KEYREEVE_PROPERTIES ",input=der,structure=" STRUCTURE
#define PROPERTIES_PKCS8 KEYREEVE_PROPERTIES ",input=der,structure=PrivateKeyInfo"
#define DER_HEADER_MAX 4

typedef struct {
    const keyreeve_provider *provider;
    OSSL_CORE_BIO *bio;
} line_source;

typedef keyreeve_reference_status reference_parser(const uint8_t *der, size_t der_len,
                                                   keyreeve_reference *out, const char **why);

/* Decoders have no state of their own. */
static void *decoder_newctx(void *provctx)
{
    return provctx;
}

static void decoder_freectx(void *ctx)
{
    (void)ctx;
}

static int gets_from_core(void *source, char *line, int size)
{
    const line_source *from = source;

    return keyreeve_provider_gets(from->provider, from->bio, line, size);
}

static int refuse(const keyreeve_provider *provider, const char *why)
{
    keyreeve_provider_raise(provider, KEYREEVE_ERROR_REFERENCE_INVALID, "%s", why);
    return 0;
}

static int pem_decode(void *ctx, OSSL_CORE_BIO *bio, int selection, OSSL_CALLBACK *callback,
                      void *callback_arg, OSSL_PASSPHRASE_CALLBACK *passphrase, void *passphrase_arg)
{
    const keyreeve_provider *provider = ctx;
    line_source source = {provider, bio};
    uint8_t der[KEYREEVE_REFERENCE_MAX];
    size_t der_len;
    const char *why;
    keyreeve_reference reference;
    keyreeve_pem_status status = keyreeve_pem_read(gets_from_core, &source, der, &der_len, &why);
    int object_type = OSSL_OBJECT_PKEY;
    OSSL_PARAM params[5];

    (void)selection;
    (void)passphrase;
    (void)passphrase_arg;
    if (status == KEYREEVE_PEM_BROKEN)
        return refuse(provider, why);
    if (status != KEYREEVE_PEM_OURS)
        return 1;
    if (keyreeve_reference_parse(der, der_len, &reference, &why) != KEYREEVE_REFERENCE_OK)
        return refuse(provider, why);
    if (!keyreeve_provider_is_configured(provider))
        return 0;
    params[0] = OSSL_PARAM_construct_int(OSSL_OBJECT_PARAM_TYPE, &object_type);
    params[1] = OSSL_PARAM_construct_utf8_string(OSSL_OBJECT_PARAM_DATA_TYPE,
                                                 (char *)(uintptr_t)keyreeve_algorithm_of(reference.type), 0);
    params[2] =
        OSSL_PARAM_construct_utf8_string(OSSL_OBJECT_PARAM_DATA_STRUCTURE, (char *)(uintptr_t)STRUCTURE, 0);
    params[3] = OSSL_PARAM_construct_octet_string(OSSL_OBJECT_PARAM_DATA, der, der_len);
    params[4] = OSSL_PARAM_construct_end();
    return callback(params, callback_arg);
}

/* References stand in for private keys: a caller that wants just a public key or parameters is not served. */
static int der_does_selection(void *provctx, int selection)
{
    (void)provctx;
    return selection == 0 || (selection & OSSL_KEYMGMT_SELECT_PRIVATE_KEY) != 0;
}

static int read_exactly(const keyreeve_provider *provider, OSSL_CORE_BIO *bio, uint8_t *data, size_t len)
{
    size_t at = 0;

    while (at < len) {
        size_t got = 0;

        if (!keyreeve_provider_read(provider, bio, data + at, len - at, &got) || got == 0)
            return 0;
        at += got;
    }
    return 1;
}

/* Reads one SEQUENCE of at most KEYREEVE_ENVELOPE_MAX bytes: its size, or 0 for anything else. */
static size_t read_sequence(const keyreeve_provider *provider, OSSL_CORE_BIO *bio,
                            uint8_t der[KEYREEVE_ENVELOPE_MAX])
{
    size_t header = 2;
    size_t length;
    size_t i;

    if (!read_exactly(provider, bio, der, header) || der[0] != 0x30)
        return 0;
    length = der[1];
    if (length >= 0x80) {
        size_t octets = length & 0x7f;

        if (octets < 1 || octets > DER_HEADER_MAX - 2 || !read_exactly(provider, bio, der + header, octets))
            return 0;
        for (length = 0, i = 0; i < octets; i++)
            length = (length << 8) | der[header + i];
        header += octets;
    }
    if (length > KEYREEVE_ENVELOPE_MAX - header || !read_exactly(provider, bio, der + header, length))
        return 0;
    return header + length;
}

static int hand_over(keyreeve_key **key, OSSL_CALLBACK *callback, void *callback_arg)
{
    int object_type = OSSL_OBJECT_PKEY;
    OSSL_PARAM params[4];

    params[0] = OSSL_PARAM_construct_int(OSSL_OBJECT_PARAM_TYPE, &object_type);
    params[1] = OSSL_PARAM_construct_utf8_string(OSSL_OBJECT_PARAM_DATA_TYPE,
                                                 (char *)(uintptr_t)keyreeve_key_algorithm(*key), 0);
    params[2] = OSSL_PARAM_construct_octet_string(OSSL_OBJECT_PARAM_REFERENCE, key, sizeof(*key));
    params[3] = OSSL_PARAM_construct_end();
    return callback(params, callback_arg);
}

static int der_decode(const keyreeve_provider *provider, OSSL_CORE_BIO *bio, const char *algorithm,
                      reference_parser *parse, OSSL_CALLBACK *callback, void *callback_arg)
{
    uint8_t der[KEYREEVE_ENVELOPE_MAX];
    size_t der_len = read_sequence(provider, bio, der);
    const char *why;
    keyreeve_reference reference;
    keyreeve_reference_status status;
    keyreeve_key *key;
    int ok;

    if (der_len == 0)
        return 1;
    status = parse(der, der_len, &reference, &why);
    if (status == KEYREEVE_REFERENCE_BROKEN)
        return refuse(provider, why);
    if (status == KEYREEVE_REFERENCE_FOREIGN || strcmp(keyreeve_algorithm_of(reference.type), algorithm) != 0)
        return 1;
    if (!keyreeve_provider_is_configured(provider))
        return 0;
    key = keyreeve_key_from_reference((keyreeve_provider *)(uintptr_t)provider, &reference);
    if (key == NULL)
        return refuse(provider, "its public key does not decode: the point may be off the curve");
    ok = hand_over(&key, callback, callback_arg);
    keyreeve_key_free(key); /* NULL once the key management has taken it */
    return ok;
}

#define DER_DECODER(kind, algorithm)                                                                         \
    static int raw_decode_##kind(void *ctx, OSSL_CORE_BIO *bio, int selection, OSSL_CALLBACK *callback,      \
                                 void *callback_arg, OSSL_PASSPHRASE_CALLBACK *passphrase,                   \
                                 void *passphrase_arg)                                                       \
    {                                                                                                        \
        (void)selection;                                                                                     \
        (void)passphrase;                                                                                    \
        (void)passphrase_arg;                                                                                \
        return der_decode(ctx, bio, algorithm, keyreeve_reference_parse, callback, callback_arg);            \
    }                                                                                                        \
    static int pkcs8_decode_##kind(void *ctx, OSSL_CORE_BIO *bio, int selection, OSSL_CALLBACK *callback,    \
                                   void *callback_arg, OSSL_PASSPHRASE_CALLBACK *passphrase,                 \
                                   void *passphrase_arg)                                                     \
    {                                                                                                        \
        (void)selection;                                                                                     \
        (void)passphrase;                                                                                    \
        (void)passphrase_arg;                                                                                \
        return der_decode(ctx, bio, algorithm, keyreeve_reference_parse_pkcs8, callback, callback_arg);      \
    }                                                                                                        \
    static const OSSL_DISPATCH raw_##kind[] = {DER_FUNCTIONS(raw_decode_##kind)};                            \
    static const OSSL_DISPATCH pkcs8_##kind[] = {DER_FUNCTIONS(pkcs8_decode_##kind)};
#define DER_FUNCTIONS(decode)                                                                                \
    KEYREEVE_DISPATCH(OSSL_FUNC_DECODER_NEWCTX, decoder_newctx),                                             \
        KEYREEVE_DISPATCH(OSSL_FUNC_DECODER_FREECTX, decoder_freectx),                                       \
        KEYREEVE_DISPATCH(OSSL_FUNC_DECODER_DOES_SELECTION, der_does_selection),                             \
        KEYREEVE_DISPATCH(OSSL_FUNC_DECODER_DECODE, decode), KEYREEVE_DISPATCH_END

DER_DECODER(rsa, "RSA")
DER_DECODER(ec, "EC")
DER_DECODER(ed25519, "ED25519")

static const OSSL_DISPATCH PEM_FUNCTIONS[] = {
    KEYREEVE_DISPATCH(OSSL_FUNC_DECODER_NEWCTX, decoder_newctx),
    KEYREEVE_DISPATCH(OSSL_FUNC_DECODER_FREECTX, decoder_freectx),
    KEYREEVE_DISPATCH(OSSL_FUNC_DECODER_DECODE, pem_decode),
    KEYREEVE_DISPATCH_END,
};

const OSSL_ALGORITHM keyreeve_decoders[] = {
    {"DER", PROPERTIES_PEM, PEM_FUNCTIONS, "Keyreeve key reference, PEM to DER"},
    {KEYREEVE_NAMES_RSA, PROPERTIES_RAW, raw_rsa, "Keyreeve key reference, DER"},
    {KEYREEVE_NAMES_EC, PROPERTIES_RAW, raw_ec, "Keyreeve key reference, DER"},
    {KEYREEVE_NAMES_ED25519, PROPERTIES_RAW, raw_ed25519, "Keyreeve key reference, DER"},
    {KEYREEVE_NAMES_RSA, PROPERTIES_PKCS8, pkcs8_rsa, "Keyreeve key reference, PKCS#8"},
    {KEYREEVE_NAMES_EC, PROPERTIES_PKCS8, pkcs8_ec, "Keyreeve key reference, PKCS#8"},
    {KEYREEVE_NAMES_ED25519, PROPERTIES_PKCS8, pkcs8_ed25519, "Keyreeve key reference, PKCS#8"},
    {NULL, NULL, NULL, NULL},
};
