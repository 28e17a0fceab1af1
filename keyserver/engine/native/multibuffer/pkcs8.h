#ifndef KEYREEVE_PKCS8_H
#define KEYREEVE_PKCS8_H

#include <stddef.h>

/* What a PKCS#8 holds, as places in it: nothing is copied. libcrypto's decoders leave copies of their input
 * on the heap, so they are not used. */
struct keyreeve_span {
    const unsigned char *data;
    size_t length;
};

enum keyreeve_algorithm {
    KEYREEVE_ALGORITHM_OTHER,
    KEYREEVE_ALGORITHM_P256,
    KEYREEVE_ALGORITHM_P384,
    KEYREEVE_ALGORITHM_ED25519,
    KEYREEVE_ALGORITHM_RSA
};

enum { KEYREEVE_RSA_INTEGERS = 8 };

struct keyreeve_pkcs8 {
    enum keyreeve_algorithm algorithm;
    struct keyreeve_span secret; /* EC: the scalar, big-endian; Ed25519: the seed */
    struct keyreeve_span point;  /* EC: the public point as it was written, or empty */
    struct keyreeve_span integers[KEYREEVE_RSA_INTEGERS]; /* RSA: n, e, d, p, q, dP, dQ, qInv, big-endian */
    int more_primes;                                      /* RSA: there are others beside p and q */
};

/* Reads a PrivateKeyInfo in DER to its last byte; attributes and the public key of RFC 5958 may follow the
 * key. 0 where it is not one. Spec: RFC 5208 5 (PKCS#8), RFC 5915 3 (EC), RFC 8410 7 (Ed25519), RFC 8017
 * A.1.2 (RSA). */
int keyreeve_pkcs8_parse(const unsigned char *der, size_t length, struct keyreeve_pkcs8 *out);

#endif
