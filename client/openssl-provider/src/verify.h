/* Checking what came back, before anybody uses it: a wrong key behind the reference, or a faulty signer. */
#ifndef KEYREEVE_VERIFY_H
#define KEYREEVE_VERIFY_H

#include "key.h"
#include "purpose.h"
#include "scheme.h"

/* 1 when the signature of this scheme over the message fits the key's public part. Leaves no errors behind.
 */
/* Whether a signature is to be verified before it is used. One of ECDSA that a handshake is signed with need
 * not be: the peer verifies it next, and what a wrong one could do is to fail that handshake. It is verified
 * for the first signature of a key and then now and again, so that a wrong key behind a reference is named
 * here. RSA and Ed25519 always are: a faulty one beside a right one gives the key away (docs/adr/0032). */
int keyreeve_verify_is_due(keyreeve_key *key, keyreeve_purpose purpose);

int keyreeve_verify(const keyreeve_key *key, const keyreeve_scheme *scheme, const uint8_t *signature,
                    size_t signature_len, const uint8_t *message, size_t message_len);

#endif
