#include "purpose.h"

#include <string.h>

/* RFC 8446 4.4.3 */
#define PAD_BYTES 64
#define PAD_BYTE 0x20
#define SERVER_LABEL "TLS 1.3, server CertificateVerify"
#define CLIENT_LABEL "TLS 1.3, client CertificateVerify"
#define LABEL_BYTES (sizeof(SERVER_LABEL)) /* with its 0x00, which stands on the wire too */

/* TLS 1.2 */
#define PARAMS_AT 64 /* behind client_random and server_random */
#define PARAMS_HEADER 4
#define NAMED_CURVE 3
#define HANDSHAKE_HEADER 4
#define CLIENT_HELLO 1
#define CLIENT_KEY_EXCHANGE 16

static int is_certificate_verify(const uint8_t *message, size_t len, const char *label)
{
    size_t i;

    if (len != PAD_BYTES + LABEL_BYTES + 32 && len != PAD_BYTES + LABEL_BYTES + 48)
        return 0;
    for (i = 0; i < PAD_BYTES; i++)
        if (message[i] != PAD_BYTE)
            return 0;
    return memcmp(message + PAD_BYTES, label, LABEL_BYTES) == 0;
}

/* RFC 8422 5.4: both randoms, named_curve, the curve, and a point of exactly its length. */
static int is_server_key_exchange(const uint8_t *message, size_t len)
{
    static const struct {
        uint16_t curve;
        uint8_t point_len;
    } CURVES[] = {{0x0017, 65}, {0x0018, 97}, {0x0019, 133}, {0x001d, 32}, {0x001e, 56}};
    size_t i;

    if (len < PARAMS_AT + PARAMS_HEADER || message[PARAMS_AT] != NAMED_CURVE)
        return 0;
    for (i = 0; i < sizeof(CURVES) / sizeof(CURVES[0]); i++)
        if (message[PARAMS_AT + 1] == CURVES[i].curve >> 8 &&
            message[PARAMS_AT + 2] == (CURVES[i].curve & 0xff) &&
            message[PARAMS_AT + 3] == CURVES[i].point_len)
            return len == (size_t)PARAMS_AT + PARAMS_HEADER + CURVES[i].point_len;
    return 0;
}

/* RFC 5246 7.4.8: whole handshake messages, the first a ClientHello and the last a ClientKeyExchange. */
static int is_client_transcript(const uint8_t *message, size_t len)
{
    size_t at = 0;
    size_t body;
    uint8_t type = 0;

    if (len == 0 || message[0] != CLIENT_HELLO)
        return 0;
    while (len - at >= HANDSHAKE_HEADER) {
        type = message[at];
        body = (size_t)message[at + 1] << 16 | (size_t)message[at + 2] << 8 | message[at + 3];
        at += HANDSHAKE_HEADER;
        if (body > len - at)
            return 0;
        at += body;
    }
    return at == len && type == CLIENT_KEY_EXCHANGE;
}

/* A DER SEQUENCE that is the whole message and begins with INTEGER 0, as a CertificationRequestInfo is (RFC
 * 2986 4.1). */
static int is_request_info(const uint8_t *message, size_t len)
{
    size_t header = 2;
    size_t length;
    size_t octets, i;

    if (len < 2 || message[0] != 0x30)
        return 0;
    length = message[1];
    if (length >= 0x80) {
        octets = length & 0x7f;
        if (octets < 1 || octets > 4 || len < 2 + octets || message[2] == 0)
            return 0;
        length = 0;
        for (i = 0; i < octets; i++)
            length = (length << 8) | message[2 + i];
        if (length < 0x80)
            return 0;
        header += octets;
    }
    return length == len - header && length >= 3 && memcmp(message + header, "\x02\x01\x00", 3) == 0;
}

keyreeve_purpose keyreeve_purpose_of(const uint8_t *message, size_t len)
{
    if (is_certificate_verify(message, len, SERVER_LABEL))
        return KEYREEVE_PURPOSE_TLS13_SERVER_VERIFY;
    if (is_certificate_verify(message, len, CLIENT_LABEL))
        return KEYREEVE_PURPOSE_TLS13_CLIENT_VERIFY;
    if (is_server_key_exchange(message, len))
        return KEYREEVE_PURPOSE_TLS12_SERVER_KEY_EXCHANGE;
    if (is_client_transcript(message, len))
        return KEYREEVE_PURPOSE_TLS12_CLIENT_VERIFY;
    if (is_request_info(message, len))
        return KEYREEVE_PURPOSE_CERTIFICATE_REQUEST;
    return KEYREEVE_PURPOSE_UNSPECIFIED;
}
