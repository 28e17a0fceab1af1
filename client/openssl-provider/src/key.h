/* A key object: the public part, and for a reference also whom to ask for signatures. Shared by counting, and
 * not changed any more once it is filled. */
#ifndef KEYREEVE_KEY_H
#define KEYREEVE_KEY_H

#include "provider.h"
#include "reference.h"

typedef struct keyreeve_key_st keyreeve_key;

/* An empty key of the algorithm ("RSA", "EC", "ED25519"; a static text), to be filled by import. */
keyreeve_key *keyreeve_key_new(keyreeve_provider *provider, const char *algorithm);

/* The key that a reference names; NULL where its public key does not decode, and on lack of memory. */
keyreeve_key *keyreeve_key_from_reference(keyreeve_provider *provider, const keyreeve_reference *reference);
keyreeve_key *keyreeve_key_up_ref(keyreeve_key *key);
void keyreeve_key_free(keyreeve_key *key);

/* Fills an empty key with a public key; takes the reference to `public_key` over. */
int keyreeve_key_fill(keyreeve_key *key, EVP_PKEY *public_key);

/* NULL while the key is empty; in the provider's own library context. */
EVP_PKEY *keyreeve_key_public(const keyreeve_key *key);
const char *keyreeve_key_algorithm(const keyreeve_key *key);
keyreeve_key_type keyreeve_key_get_type(const keyreeve_key *key);
keyreeve_provider *keyreeve_key_provider(const keyreeve_key *key);

/* NULL unless the key came from a reference. */
const char *keyreeve_key_id(const keyreeve_key *key);
const char *keyreeve_key_socket(const keyreeve_key *key);

/* Counts a signature that may go out unverified: 1 for one that may, 0 for one that is to be verified, which
 * are the first and then each KEYREEVE_VERIFY_EVERY-th. `keyreeve_key_mistrust` makes the next one the first
 * again. */
#define KEYREEVE_VERIFY_EVERY 64
int keyreeve_key_skip_verification(keyreeve_key *key);
void keyreeve_key_mistrust(keyreeve_key *key);

/* The algorithm name of a key type, NULL for UNKNOWN. */
const char *keyreeve_algorithm_of(keyreeve_key_type type);

#endif
