/* What a message is for, told from its form alone. Spec: docs/protocol/sign-socket.md, Purposes */
#ifndef KEYREEVE_PURPOSE_H
#define KEYREEVE_PURPOSE_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    KEYREEVE_PURPOSE_UNSPECIFIED = 0,
    KEYREEVE_PURPOSE_TLS13_SERVER_VERIFY = 1,
    KEYREEVE_PURPOSE_TLS13_CLIENT_VERIFY = 2,
    KEYREEVE_PURPOSE_CERTIFICATE_REQUEST = 4,
    KEYREEVE_PURPOSE_TLS12_SERVER_KEY_EXCHANGE = 5,
    KEYREEVE_PURPOSE_TLS12_CLIENT_VERIFY = 6
} keyreeve_purpose;

/* A claim: the signer parses the message again. */
keyreeve_purpose keyreeve_purpose_of(const uint8_t *message, size_t len);

#endif
