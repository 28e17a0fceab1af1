#include "pkcs8.h"

#include <string.h>

enum {
    TAG_INTEGER = 0x02,
    TAG_BIT_STRING = 0x03,
    TAG_OCTET_STRING = 0x04,
    TAG_NULL = 0x05,
    TAG_OID = 0x06,
    TAG_SEQUENCE = 0x30,
    TAG_CONTEXT_0 = 0xA0,
    TAG_CONTEXT_1 = 0xA1,
    TAG_CONTEXT_1_PRIMITIVE = 0x81,
    LONG_FORM = 0x80,
    SIGN_BIT = 0x80
};

static const unsigned char OID_EC[] = {0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x02, 0x01};
static const unsigned char OID_P256[] = {0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07};
static const unsigned char OID_P384[] = {0x2B, 0x81, 0x04, 0x00, 0x22};
static const unsigned char OID_ED25519[] = {0x2B, 0x65, 0x70};
static const unsigned char OID_RSA[] = {0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x01};

static int is(struct keyreeve_span span, const unsigned char *expected, size_t length)
{
    return span.length == length && memcmp(span.data, expected, length) == 0;
}
#define IS(span, oid) is(span, oid, sizeof(oid))

/* The length of an element, which takes one to three bytes here: DER has each in one form only, and no key of
 * ours has 64 KiB. */
static int take_length(struct keyreeve_span *from, size_t *length)
{
    unsigned char first;
    if (from->length < 1)
        return 0;
    first = from->data[0];
    if (first < LONG_FORM) {
        *length = first;
        from->data += 1;
        from->length -= 1;
        return 1;
    }
    if (first == (LONG_FORM | 1) && from->length >= 2) {
        *length = from->data[1];
        from->data += 2;
        from->length -= 2;
        return *length >= LONG_FORM;
    }
    if (first == (LONG_FORM | 2) && from->length >= 3) {
        *length = (size_t)from->data[1] << 8 | from->data[2];
        from->data += 3;
        from->length -= 3;
        return *length > 0xFF;
    }
    return 0;
}

/* The content of the next element, which has this tag. */
static int take(struct keyreeve_span *from, unsigned char tag, struct keyreeve_span *content)
{
    size_t length;
    if (from->length < 2 || from->data[0] != tag)
        return 0;
    from->data += 1;
    from->length -= 1;
    if (!take_length(from, &length) || length > from->length)
        return 0;
    content->data = from->data;
    content->length = length;
    from->data += length;
    from->length -= length;
    return 1;
}

/* A number that is not negative, without its sign byte. */
static int take_integer(struct keyreeve_span *from, struct keyreeve_span *number)
{
    if (!take(from, TAG_INTEGER, number) || number->length == 0 || (number->data[0] & SIGN_BIT) != 0)
        return 0;
    if (number->length > 1 && number->data[0] == 0) {
        if ((number->data[1] & SIGN_BIT) == 0)
            return 0;
        number->data += 1;
        number->length -= 1;
    }
    return 1;
}

static int take_version(struct keyreeve_span *from, unsigned char most)
{
    struct keyreeve_span version;
    return take_integer(from, &version) && version.length == 1 && version.data[0] <= most;
}

static enum keyreeve_algorithm algorithm_of(struct keyreeve_span identifier)
{
    struct keyreeve_span oid, parameters;
    enum keyreeve_algorithm found = KEYREEVE_ALGORITHM_OTHER;
    if (!take(&identifier, TAG_OID, &oid))
        return found;
    if (IS(oid, OID_ED25519))
        found = KEYREEVE_ALGORITHM_ED25519;
    else if (IS(oid, OID_RSA) && take(&identifier, TAG_NULL, &parameters) && parameters.length == 0)
        found = KEYREEVE_ALGORITHM_RSA;
    else if (IS(oid, OID_EC) && take(&identifier, TAG_OID, &parameters)) {
        if (IS(parameters, OID_P256))
            found = KEYREEVE_ALGORITHM_P256;
        else if (IS(parameters, OID_P384))
            found = KEYREEVE_ALGORITHM_P384;
    }
    return identifier.length == 0 ? found : KEYREEVE_ALGORITHM_OTHER;
}

static int parse_ec(struct keyreeve_span from, struct keyreeve_pkcs8 *out)
{
    struct keyreeve_span body, version, tagged, bits;
    if (!take(&from, TAG_SEQUENCE, &body) || from.length != 0)
        return 0;
    if (!take_integer(&body, &version) || version.length != 1 || version.data[0] != 1)
        return 0;
    if (!take(&body, TAG_OCTET_STRING, &out->secret))
        return 0;
    if (take(&body, TAG_CONTEXT_0, &tagged)) {
        struct keyreeve_span curve;
        if (!take(&tagged, TAG_OID, &curve) || tagged.length != 0)
            return 0;
        if (!(out->algorithm == KEYREEVE_ALGORITHM_P256 ? IS(curve, OID_P256) : IS(curve, OID_P384)))
            return 0;
    }
    if (take(&body, TAG_CONTEXT_1, &tagged)) {
        if (!take(&tagged, TAG_BIT_STRING, &bits) || tagged.length != 0 || bits.length < 2 ||
            bits.data[0] != 0)
            return 0;
        out->point.data = bits.data + 1;
        out->point.length = bits.length - 1;
    }
    return body.length == 0;
}

static int parse_rsa(struct keyreeve_span from, struct keyreeve_pkcs8 *out)
{
    struct keyreeve_span body, others;
    size_t number;
    if (!take(&from, TAG_SEQUENCE, &body) || from.length != 0 || !take_version(&body, 1))
        return 0;
    for (number = 0; number < KEYREEVE_RSA_INTEGERS; number++)
        if (!take_integer(&body, &out->integers[number]))
            return 0;
    out->more_primes = take(&body, TAG_SEQUENCE, &others);
    return body.length == 0;
}

int keyreeve_pkcs8_parse(const unsigned char *der, size_t length, struct keyreeve_pkcs8 *out)
{
    struct keyreeve_span from = {der, length}, body, identifier, key, rest;
    memset(out, 0, sizeof(*out));
    if (!take(&from, TAG_SEQUENCE, &body) || from.length != 0 || !take_version(&body, 1) ||
        !take(&body, TAG_SEQUENCE, &identifier) || !take(&body, TAG_OCTET_STRING, &key))
        return 0;
    (void)take(&body, TAG_CONTEXT_0, &rest);
    (void)take(&body, TAG_CONTEXT_1_PRIMITIVE, &rest);
    if (body.length != 0)
        return 0;
    out->algorithm = algorithm_of(identifier);
    switch (out->algorithm) {
    case KEYREEVE_ALGORITHM_P256:
    case KEYREEVE_ALGORITHM_P384:
        return parse_ec(key, out);
    case KEYREEVE_ALGORITHM_ED25519:
        return take(&key, TAG_OCTET_STRING, &out->secret) && key.length == 0;
    case KEYREEVE_ALGORITHM_RSA:
        return parse_rsa(key, out);
    default:
        return 0;
    }
}
