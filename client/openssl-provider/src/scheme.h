/* The TLS SignatureScheme registry as far as Keyreeve signs: which one a key, digest and padding amount to.
 * Spec: IANA TLS SignatureScheme; RFC 8446 4.2.3 */
#ifndef KEYREEVE_SCHEME_H
#define KEYREEVE_SCHEME_H

#include <stddef.h>
#include <stdint.h>

#include "reference.h"

typedef enum {
    KEYREEVE_DIGEST_NONE,
    KEYREEVE_DIGEST_SHA256,
    KEYREEVE_DIGEST_SHA384,
    KEYREEVE_DIGEST_SHA512
} keyreeve_digest;

typedef enum { KEYREEVE_PADDING_NONE, KEYREEVE_PADDING_PKCS1, KEYREEVE_PADDING_PSS } keyreeve_padding;

typedef struct {
    uint16_t code; /* IANA code point */
    keyreeve_key_type type;
    keyreeve_digest digest;
    keyreeve_padding padding; /* PSS: salt as long as the digest, MGF1 with the same digest */
    const uint8_t *algorithm; /* DER AlgorithmIdentifier of the signature in X.509 */
    size_t algorithm_len;
} keyreeve_scheme;

/* NULL where no scheme fits. */
const keyreeve_scheme *keyreeve_scheme_select(keyreeve_key_type type, keyreeve_digest digest,
                                              keyreeve_padding padding);

/* The digest that a key of this type signs with unless told otherwise. */
keyreeve_digest keyreeve_digest_default(keyreeve_key_type type);

/* NULL for NONE. */
const char *keyreeve_digest_name(keyreeve_digest digest);
size_t keyreeve_digest_size(keyreeve_digest digest);

/* By any of OpenSSL's names for it: 1, or 0 for a digest that no scheme has. */
int keyreeve_digest_by_name(const char *name, keyreeve_digest *digest);

#endif
