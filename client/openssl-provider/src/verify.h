/* Checking what came back, before anybody uses it: a wrong key behind the reference, or a faulty signer. */
#ifndef KEYREEVE_VERIFY_H
#define KEYREEVE_VERIFY_H

#include "key.h"
#include "scheme.h"

/* 1 when the signature of this scheme over the message fits the key's public part. Leaves no errors behind.
 */
int keyreeve_verify(const keyreeve_key *key, const keyreeve_scheme *scheme, const uint8_t *signature,
                    size_t signature_len, const uint8_t *message, size_t message_len);

#endif
