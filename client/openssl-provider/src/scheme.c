#include "scheme.h"

#include <strings.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define RSA_PKCS1_ALGORITHM(last)                                                                            \
    {                                                                                                        \
        0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, last, 0x05, 0x00             \
    }
/* RSASSA-PSS-params, RFC 4055 3.1: hash, MGF1 with the same hash, salt length. */
#define RSA_PSS_ALGORITHM(hash, salt)                                                                        \
    {                                                                                                        \
        0x30, 0x41, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a, 0x30, 0x34, 0xa0,      \
            0x0f, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, hash, 0x05, 0x00,  \
            0xa1, 0x1c, 0x30, 0x1a, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08, 0x30,  \
            0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, hash, 0x05, 0x00, 0xa2, 0x03,  \
            0x02, 0x01, salt                                                                                 \
    }

static const uint8_t ECDSA_SHA256[] = {0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86,
                                       0x48, 0xce, 0x3d, 0x04, 0x03, 0x02};
static const uint8_t ECDSA_SHA384[] = {0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86,
                                       0x48, 0xce, 0x3d, 0x04, 0x03, 0x03};
static const uint8_t ED25519[] = {0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70};
static const uint8_t PKCS1_SHA256[] = RSA_PKCS1_ALGORITHM(0x0b);
static const uint8_t PKCS1_SHA384[] = RSA_PKCS1_ALGORITHM(0x0c);
static const uint8_t PKCS1_SHA512[] = RSA_PKCS1_ALGORITHM(0x0d);
static const uint8_t PSS_SHA256[] = RSA_PSS_ALGORITHM(0x01, 32);
static const uint8_t PSS_SHA384[] = RSA_PSS_ALGORITHM(0x02, 48);
static const uint8_t PSS_SHA512[] = RSA_PSS_ALGORITHM(0x03, 64);

#define ALGORITHM(bytes) (bytes), sizeof(bytes)
static const keyreeve_scheme SCHEMES[] = {
    {0x0403, KEYREEVE_KEY_P256, KEYREEVE_DIGEST_SHA256, KEYREEVE_PADDING_NONE, ALGORITHM(ECDSA_SHA256)},
    {0x0503, KEYREEVE_KEY_P384, KEYREEVE_DIGEST_SHA384, KEYREEVE_PADDING_NONE, ALGORITHM(ECDSA_SHA384)},
    {0x0807, KEYREEVE_KEY_ED25519, KEYREEVE_DIGEST_NONE, KEYREEVE_PADDING_NONE, ALGORITHM(ED25519)},
    {0x0804, KEYREEVE_KEY_RSA, KEYREEVE_DIGEST_SHA256, KEYREEVE_PADDING_PSS, ALGORITHM(PSS_SHA256)},
    {0x0805, KEYREEVE_KEY_RSA, KEYREEVE_DIGEST_SHA384, KEYREEVE_PADDING_PSS, ALGORITHM(PSS_SHA384)},
    {0x0806, KEYREEVE_KEY_RSA, KEYREEVE_DIGEST_SHA512, KEYREEVE_PADDING_PSS, ALGORITHM(PSS_SHA512)},
    {0x0401, KEYREEVE_KEY_RSA, KEYREEVE_DIGEST_SHA256, KEYREEVE_PADDING_PKCS1, ALGORITHM(PKCS1_SHA256)},
    {0x0501, KEYREEVE_KEY_RSA, KEYREEVE_DIGEST_SHA384, KEYREEVE_PADDING_PKCS1, ALGORITHM(PKCS1_SHA384)},
    {0x0601, KEYREEVE_KEY_RSA, KEYREEVE_DIGEST_SHA512, KEYREEVE_PADDING_PKCS1, ALGORITHM(PKCS1_SHA512)},
};

static const struct {
    keyreeve_digest digest;
    size_t size;
    const char *names[4]; /* the first is the one we answer with */
} DIGESTS[] = {
    {KEYREEVE_DIGEST_SHA256, 32, {"SHA256", "SHA2-256", "SHA-256", "2.16.840.1.101.3.4.2.1"}},
    {KEYREEVE_DIGEST_SHA384, 48, {"SHA384", "SHA2-384", "SHA-384", "2.16.840.1.101.3.4.2.2"}},
    {KEYREEVE_DIGEST_SHA512, 64, {"SHA512", "SHA2-512", "SHA-512", "2.16.840.1.101.3.4.2.3"}},
};

const keyreeve_scheme *keyreeve_scheme_select(keyreeve_key_type type, keyreeve_digest digest,
                                              keyreeve_padding padding)
{
    size_t i;

    for (i = 0; i < COUNT(SCHEMES); i++)
        if (SCHEMES[i].type == type && SCHEMES[i].digest == digest && SCHEMES[i].padding == padding)
            return &SCHEMES[i];
    return NULL;
}

keyreeve_digest keyreeve_digest_default(keyreeve_key_type type)
{
    if (type == KEYREEVE_KEY_P384)
        return KEYREEVE_DIGEST_SHA384;
    return type == KEYREEVE_KEY_ED25519 ? KEYREEVE_DIGEST_NONE : KEYREEVE_DIGEST_SHA256;
}

const char *keyreeve_digest_name(keyreeve_digest digest)
{
    size_t i;

    for (i = 0; i < COUNT(DIGESTS); i++)
        if (DIGESTS[i].digest == digest)
            return DIGESTS[i].names[0];
    return NULL;
}

size_t keyreeve_digest_size(keyreeve_digest digest)
{
    size_t i;

    for (i = 0; i < COUNT(DIGESTS); i++)
        if (DIGESTS[i].digest == digest)
            return DIGESTS[i].size;
    return 0;
}

int keyreeve_digest_by_name(const char *name, keyreeve_digest *digest)
{
    size_t i, j;

    for (i = 0; i < COUNT(DIGESTS); i++)
        for (j = 0; j < COUNT(DIGESTS[i].names); j++)
            if (strcasecmp(name, DIGESTS[i].names[j]) == 0) {
                *digest = DIGESTS[i].digest;
                return 1;
            }
    return 0;
}
