#ifndef KEYREEVE_KEY_H
#define KEYREEVE_KEY_H

#include "status.h"

#include <stddef.h>

enum keyreeve_kind {
    KEYREEVE_P256,
    KEYREEVE_P384,
    KEYREEVE_ED25519,
    KEYREEVE_RSA_2048,
    KEYREEVE_RSA_3072,
    KEYREEVE_RSA_4096,
    KEYREEVE_KINDS
};

/* A private key in the arena. `words` are little-endian: EC: the scalar; Ed25519: seed, public key; RSA: p,
 * q, d mod p-1, d mod q-1, 1/q mod p, each `half` words, and n; p is the larger prime. */
struct keyreeve_key {
    enum keyreeve_kind kind;
    size_t half;
    size_t size; /* of all, in bytes */
    unsigned long long words[];
};

static inline const unsigned long long *keyreeve_rsa_part(const struct keyreeve_key *key, size_t part)
{
    return key->words + part * key->half;
}
enum {
    KEYREEVE_RSA_P,
    KEYREEVE_RSA_Q,
    KEYREEVE_RSA_DP,
    KEYREEVE_RSA_DQ,
    KEYREEVE_RSA_QINV,
    KEYREEVE_RSA_N,
    KEYREEVE_RSA_PARTS = 7
};

/* Bits of the modulus; 0 for other kinds. */
int keyreeve_kind_rsa_bits(enum keyreeve_kind kind);

/* Reads a PKCS#8 PrivateKeyInfo (RFC 5208) in DER into the arena, and checks that its parts belong together:
 * EC 0 < d < n and its public point; RSA n = pq, both primes by Fermat's test, the exponents and the
 * coefficient. Keys with another public exponent than 65537, more primes than two or primes of unlike lengths
 * are KEYREEVE_UNSUITED. `*loaded` is given back by `keyreeve_key_free`. */
enum keyreeve_status keyreeve_key_load(enum keyreeve_kind kind, const unsigned char *pkcs8, size_t length,
                                       struct keyreeve_key **loaded);
struct keyreeve_key *keyreeve_key_new(enum keyreeve_kind kind);
void keyreeve_key_free(struct keyreeve_key *key);

#endif
