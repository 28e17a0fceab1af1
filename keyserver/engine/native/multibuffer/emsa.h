#ifndef KEYREEVE_EMSA_H
#define KEYREEVE_EMSA_H

#include "digest.h"

/* The padded digest, `length` bytes (those of the modulus, whose length in bits is a multiple of 8), to be
 * signed by RSA. */

/* EMSA-PKCS1-v1_5: RFC 8017 9.2. */
void keyreeve_emsa_pkcs1(enum keyreeve_hash hash, const unsigned char *digest, unsigned char *out,
                         size_t length);

/* EMSA-PSS with MGF1 of the same hash, and a salt as long as the digest: RFC 8017 9.1.1, RFC 8446 4.2.3. 0 on
 * a fault of libcrypto. */
int keyreeve_emsa_pss(EVP_MD_CTX *context, enum keyreeve_hash hash, const unsigned char *digest,
                      const unsigned char *salt, unsigned char *out, size_t length);

#endif
