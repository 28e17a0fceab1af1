#include "reference.h"

#include <string.h>

#define TAG_INTEGER 0x02
#define TAG_BIT_STRING 0x03
#define TAG_OCTET_STRING 0x04
#define TAG_UTF8_STRING 0x0c
#define TAG_SEQUENCE 0x30
#define RSA_EXPONENT_MAX_BYTES 8

/* What is left of the bytes being read. */
typedef struct {
    const uint8_t *at;
    size_t left;
} der_span;

/* Takes one element with this tag off the front. DER: definite, shortest-form length of at most two octets,
 * which is plenty below KEYREEVE_ENVELOPE_MAX. */
static int der_take(der_span *from, uint8_t tag, der_span *content)
{
    size_t header = 2;
    size_t length;

    if (from->left < 2 || from->at[0] != tag)
        return 0;
    length = from->at[1];
    if (length == 0x81) {
        if (from->left < 3 || from->at[2] < 0x80)
            return 0;
        length = from->at[2];
        header = 3;
    } else if (length == 0x82) {
        if (from->left < 4 || from->at[2] == 0)
            return 0;
        length = ((size_t)from->at[2] << 8) | from->at[3];
        header = 4;
    } else if (length >= 0x80) {
        return 0;
    }
    if (length > from->left - header)
        return 0;
    content->at = from->at + header;
    content->left = length;
    from->at += header + length;
    from->left -= header + length;
    return 1;
}

/* Takes an INTEGER that is positive and in shortest form, without its sign octet. */
static int der_take_positive(der_span *from, der_span *magnitude)
{
    der_span body;

    if (!der_take(from, TAG_INTEGER, &body) || body.left == 0 || (body.at[0] & 0x80) != 0)
        return 0;
    if (body.at[0] == 0) {
        if (body.left == 1 || (body.at[1] & 0x80) == 0)
            return 0;
        body.at++;
        body.left--;
    }
    *magnitude = body;
    return 1;
}

static int span_equals(const der_span *span, const uint8_t *bytes, size_t len)
{
    return span->left == len && memcmp(span->at, bytes, len) == 0;
}

/* RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF. */
static int is_utf8(const uint8_t *text, size_t len)
{
    size_t at = 0;

    while (at < len) {
        uint8_t lead = text[at];
        uint8_t low = 0x80;
        uint8_t high = 0xbf;
        size_t more;

        if (lead < 0x80)
            more = 0;
        else if (lead >= 0xc2 && lead <= 0xdf)
            more = 1;
        else if (lead >= 0xe0 && lead <= 0xef)
            more = 2;
        else if (lead >= 0xf0 && lead <= 0xf4)
            more = 3;
        else
            return 0;
        if (lead == 0xe0)
            low = 0xa0;
        else if (lead == 0xed)
            high = 0x9f;
        else if (lead == 0xf0)
            low = 0x90;
        else if (lead == 0xf4)
            high = 0x8f;
        if (more > len - at - 1)
            return 0;
        for (at++; more > 0; more--, at++) {
            if (text[at] < low || text[at] > high)
                return 0;
            low = 0x80;
            high = 0xbf;
        }
    }
    return 1;
}

int keyreeve_socket_path_is_valid(const uint8_t *path, size_t len)
{
    return len >= 1 && len <= KEYREEVE_SOCKET_MAX && path[0] == '/' && memchr(path, 0, len) == NULL &&
           is_utf8(path, len);
}

static int is_key_id(const der_span *text)
{
    size_t i;

    if (text->left < 1 || text->left > KEYREEVE_KEY_ID_MAX)
        return 0;
    for (i = 0; i < text->left; i++) {
        uint8_t c = text->at[i];

        if (!((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-'))
            return 0;
    }
    return 1;
}

/* SubjectPublicKeyInfo whose key has a fixed length: everything before the key is a constant. Spec: RFC 5480,
 * RFC 8410. */
static const uint8_t P256_PREFIX[] = {0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48,
                                      0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48,
                                      0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04};
static const uint8_t P384_PREFIX[] = {0x30, 0x76, 0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02,
                                      0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22, 0x03, 0x62, 0x00, 0x04};
static const uint8_t ED25519_PREFIX[] = {0x30, 0x2a, 0x30, 0x05, 0x06, 0x03,
                                         0x2b, 0x65, 0x70, 0x03, 0x21, 0x00};
static const struct {
    keyreeve_key_type type;
    const uint8_t *prefix;
    size_t prefix_len;
    size_t total;
} FIXED_SPKI[] = {
    {KEYREEVE_KEY_P256, P256_PREFIX, sizeof(P256_PREFIX), 91},
    {KEYREEVE_KEY_P384, P384_PREFIX, sizeof(P384_PREFIX), 120},
    {KEYREEVE_KEY_ED25519, ED25519_PREFIX, sizeof(ED25519_PREFIX), 44},
};

/* rsaEncryption with NULL parameters. Spec: RFC 3279 2.3.1. */
static const uint8_t RSA_ALGORITHM[] = {0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7,
                                        0x0d, 0x01, 0x01, 0x01, 0x05, 0x00};

static int is_rsa_spki(der_span spki)
{
    der_span outer, algorithm, bits, numbers, modulus, exponent;

    if (!der_take(&spki, TAG_SEQUENCE, &outer) || spki.left != 0 ||
        !der_take(&outer, TAG_SEQUENCE, &algorithm) ||
        !span_equals(&algorithm, RSA_ALGORITHM, sizeof(RSA_ALGORITHM)) ||
        !der_take(&outer, TAG_BIT_STRING, &bits) || outer.left != 0 || bits.left < 1 || bits.at[0] != 0)
        return 0;
    bits.at++;
    bits.left--;
    if (!der_take(&bits, TAG_SEQUENCE, &numbers) || bits.left != 0 ||
        !der_take_positive(&numbers, &modulus) || !der_take_positive(&numbers, &exponent) ||
        numbers.left != 0)
        return 0;
    if ((modulus.left != 2048 / 8 && modulus.left != 3072 / 8 && modulus.left != 4096 / 8) ||
        (modulus.at[0] & 0x80) == 0 || (modulus.at[modulus.left - 1] & 1) == 0)
        return 0;
    if (exponent.left > RSA_EXPONENT_MAX_BYTES || (exponent.at[exponent.left - 1] & 1) == 0)
        return 0;
    return exponent.left > 1 || exponent.at[0] >= 3;
}

static keyreeve_key_type type_of_spki(der_span spki)
{
    size_t i;

    for (i = 0; i < sizeof(FIXED_SPKI) / sizeof(FIXED_SPKI[0]); i++)
        if (spki.left == FIXED_SPKI[i].total &&
            memcmp(spki.at, FIXED_SPKI[i].prefix, FIXED_SPKI[i].prefix_len) == 0)
            return FIXED_SPKI[i].type;
    return is_rsa_spki(spki) ? KEYREEVE_KEY_RSA : KEYREEVE_KEY_UNKNOWN;
}

static keyreeve_reference_status broken(const char **why, const char *text)
{
    *why = text;
    return KEYREEVE_REFERENCE_BROKEN;
}

static keyreeve_reference_status foreign(const char **why)
{
    *why = "not a Keyreeve key reference";
    return KEYREEVE_REFERENCE_FOREIGN;
}

/* A SEQUENCE that begins with a one-octet INTEGER and a UTF8String: no other key format begins so, thus what
 * does is ours even when it breaks off later. */
static int looks_like_ours(const uint8_t *der, size_t der_len)
{
    size_t at = 2;

    if (der_len < 2 || der[0] != TAG_SEQUENCE)
        return 0;
    if (der[1] > 0x80)
        at += der[1] & 0x7f;
    return der_len >= 4 && at <= der_len - 4 && der[at] == TAG_INTEGER && der[at + 1] == 1 &&
           der[at + 3] == TAG_UTF8_STRING;
}

keyreeve_reference_status keyreeve_reference_parse(const uint8_t *der, size_t der_len,
                                                   keyreeve_reference *out, const char **why)
{
    der_span all = {der, der_len};
    der_span body, version, key_id, socket, spki, inside;

    memset(out, 0, sizeof(*out));
    if (!looks_like_ours(der, der_len))
        return foreign(why);
    if (der_len > KEYREEVE_REFERENCE_MAX)
        return broken(why, "it is longer than 4096 bytes");
    if (!der_take(&all, TAG_SEQUENCE, &body))
        return broken(why, "it is cut short or is not DER");
    if (all.left != 0)
        return broken(why, "bytes follow its end");
    if (!der_take(&body, TAG_INTEGER, &version) || version.left != 1 || version.at[0] != 1)
        return broken(why, "it is not of version 1");
    if (!der_take(&body, TAG_UTF8_STRING, &key_id) || !is_key_id(&key_id))
        return broken(why, "its key id is not 1 to 64 of a-z, 0-9 and '-'");
    if (!der_take(&body, TAG_UTF8_STRING, &socket) || !keyreeve_socket_path_is_valid(socket.at, socket.left))
        return broken(why, "its socket is not an absolute path of at most 107 bytes");
    spki = body;
    if (!der_take(&body, TAG_SEQUENCE, &inside) || body.left != 0)
        return broken(why, "its public key is not one SubjectPublicKeyInfo");
    out->type = type_of_spki(spki);
    if (out->type == KEYREEVE_KEY_UNKNOWN)
        return broken(why,
                      "its public key is not EC P-256 or P-384, Ed25519, or RSA of 2048, 3072 or 4096 bits");
    memcpy(out->key_id, key_id.at, key_id.left);
    memcpy(out->socket, socket.at, socket.left);
    out->spki = spki.at;
    out->spki_len = spki.left;
    return KEYREEVE_REFERENCE_OK;
}

/* version 0 and 2.25.22403030168460678247198038235698823690, as tests/vectors/key_reference.json has them. */
static const uint8_t ENVELOPE_START[] = {0x02, 0x01, 0x00, 0x30, 0x15, 0x06, 0x13, 0x69, 0xa1,
                                         0xda, 0xd5, 0xaa, 0xd1, 0x8b, 0xfa, 0x8c, 0xf5, 0xb5,
                                         0xda, 0x95, 0x94, 0xb0, 0xe0, 0x88, 0x84, 0x0a};

keyreeve_reference_status keyreeve_reference_parse_pkcs8(const uint8_t *der, size_t der_len,
                                                         keyreeve_reference *out, const char **why)
{
    der_span all = {der, der_len};
    der_span body, inner;
    keyreeve_reference_status status;

    memset(out, 0, sizeof(*out));
    if (der_len > KEYREEVE_ENVELOPE_MAX || !der_take(&all, TAG_SEQUENCE, &body) ||
        body.left < sizeof(ENVELOPE_START) || memcmp(body.at, ENVELOPE_START, sizeof(ENVELOPE_START)) != 0)
        return foreign(why);
    body.at += sizeof(ENVELOPE_START);
    body.left -= sizeof(ENVELOPE_START);
    if (!der_take(&body, TAG_OCTET_STRING, &inner) || body.left != 0 || all.left != 0)
        return broken(why, "its PKCS#8 envelope holds something else than one OCTET STRING");
    status = keyreeve_reference_parse(inner.at, inner.left, out, why);
    return status == KEYREEVE_REFERENCE_FOREIGN ? broken(why, "its PKCS#8 envelope holds no key reference")
                                                : status;
}
