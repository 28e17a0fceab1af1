#include "errors.h"

#include <stddef.h>

#define REASON(number, text)                                                                                 \
    {                                                                                                        \
        (unsigned int)(number), (void *)(uintptr_t)(text)                                                    \
    }

static const OSSL_ITEM REASONS[] = {
    REASON(KEYREEVE_ERROR_REFERENCE_INVALID, "key reference is invalid"),
    REASON(KEYREEVE_ERROR_CONFIG_INVALID, "provider configuration is invalid"),
    REASON(KEYREEVE_ERROR_PARAMETER_INVALID, "signature parameter is invalid"),
    REASON(KEYREEVE_ERROR_SCHEME_NOT_SUPPORTED, "no TLS signature scheme for this key and parameters"),
    REASON(KEYREEVE_ERROR_MESSAGE_TOO_LARGE, "message is too large"),
    REASON(KEYREEVE_ERROR_NOT_A_REFERENCE, "key has only a public part"),
    REASON(KEYREEVE_ERROR_AGENT_UNREACHABLE, "agent cannot be reached"),
    REASON(KEYREEVE_ERROR_AGENT_CLOSED, "agent closed the connection"),
    REASON(KEYREEVE_ERROR_AGENT_PROTOCOL, "answer of the agent breaks the protocol"),
    REASON(KEYREEVE_ERROR_AGENT_REFUSED, "agent refused to sign"),
    REASON(KEYREEVE_ERROR_DEADLINE_EXCEEDED, "agent did not answer within the deadline"),
    REASON(KEYREEVE_ERROR_SIGNATURE_WRONG, "signature does not fit the public key of the reference"),
    REASON(KEYREEVE_ERROR_BUFFER_TOO_SMALL, "buffer is too small for a signature"),
    REASON(KEYREEVE_ERROR_OUT_OF_MEMORY, "out of memory"),
    {0, NULL},
};

/* Wire numbers never change meaning: keyreeve_common.errors.RENDERINGS is where they come from. */
static const struct {
    uint8_t wire;
    const char *name;
} CODES[] = {
    {1, "invalid_request"},
    {2, "unauthenticated"},
    {3, "permission_denied"},
    {4, "not_found"},
    {5, "conflict"},
    {6, "failed_precondition"},
    {7, "rate_limited"},
    {8, "unavailable"},
    {9, "internal"},
    {10, "deadline_exceeded"},
    {16, "purpose_mismatch"},
    {17, "purpose_not_permitted"},
    {18, "scheme_not_supported"},
    {19, "message_too_large"},
    {20, "key_not_found"},
    {21, "svid_expired"},
    {22, "foreign_trust_domain"},
    {23, "attestation_failed"},
    {24, "token_unavailable"},
    {25, "token_pin_incorrect"},
    {26, "storage_full"},
    {27, "storage_busy"},
    {28, "malformed_frame"},
    {29, "config_invalid"},
    {30, "key_reference_invalid"},
    {31, "key_type_not_supported"},
    {32, "profile_violation"},
    {33, "key_disabled"},
    {34, "join_token_invalid"},
    {35, "agent_banned"},
    {36, "spiffe_id_invalid"},
    {37, "svid_invalid"},
    {38, "sealed_record_invalid"},
    {43, "vault_access_denied"},
    {44, "overloaded"},
};

const OSSL_ITEM *keyreeve_error_reasons(void)
{
    return REASONS;
}

const char *keyreeve_error_code_name(uint8_t wire)
{
    size_t i;

    for (i = 0; i < sizeof(CODES) / sizeof(CODES[0]); i++)
        if (CODES[i].wire == wire)
            return CODES[i].name;
    return "unknown_error";
}
