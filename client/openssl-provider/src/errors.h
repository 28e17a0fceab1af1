/* What goes wrong, on OpenSSL's error queue, where nginx and the others log it from. */
#ifndef KEYREEVE_ERRORS_H
#define KEYREEVE_ERRORS_H

#include <openssl/core.h>
#include <stdint.h>

typedef enum {
    KEYREEVE_ERROR_REFERENCE_INVALID = 1,
    KEYREEVE_ERROR_CONFIG_INVALID,
    KEYREEVE_ERROR_PARAMETER_INVALID,
    KEYREEVE_ERROR_SCHEME_NOT_SUPPORTED,
    KEYREEVE_ERROR_MESSAGE_TOO_LARGE,
    KEYREEVE_ERROR_NOT_A_REFERENCE,
    KEYREEVE_ERROR_AGENT_UNREACHABLE,
    KEYREEVE_ERROR_AGENT_CLOSED,
    KEYREEVE_ERROR_AGENT_PROTOCOL,
    KEYREEVE_ERROR_AGENT_REFUSED,
    KEYREEVE_ERROR_DEADLINE_EXCEEDED,
    KEYREEVE_ERROR_SIGNATURE_WRONG,
    KEYREEVE_ERROR_BUFFER_TOO_SMALL,
    KEYREEVE_ERROR_OUT_OF_MEMORY
} keyreeve_error;

/* The texts that libcrypto shows for our reasons. */
const OSSL_ITEM *keyreeve_error_reasons(void);

/* The name of an error in the agent's vocabulary (docs/errors.md); "unknown_error" for a number we do not
 * know. */
const char *keyreeve_error_code_name(uint8_t wire);

#endif
