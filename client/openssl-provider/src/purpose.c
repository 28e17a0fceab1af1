#include "purpose.h"

#include <string.h>

/* RFC 8446 4.4.3 */
#define PAD_BYTES 64
#define PAD_BYTE 0x20
#define SERVER_LABEL "TLS 1.3, server CertificateVerify"
#define CLIENT_LABEL "TLS 1.3, client CertificateVerify"
#define LABEL_BYTES (sizeof(SERVER_LABEL)) /* with its 0x00, which stands on the wire too */

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
    if (is_request_info(message, len))
        return KEYREEVE_PURPOSE_CERTIFICATE_REQUEST;
    return KEYREEVE_PURPOSE_UNSPECIFIED;
}
