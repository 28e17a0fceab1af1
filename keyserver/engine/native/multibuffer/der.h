#ifndef KEYREEVE_DER_H
#define KEYREEVE_DER_H

#include <stddef.h>

enum { KEYREEVE_ECDSA_DER_MAX = 2 + 2 * (2 + 1 + 48) };

/* Ecdsa-Sig-Value of r and s, each `width` (at most 48) bytes, big-endian: RFC 3279 2.2.3. Returns the
 * length; r and s are not zero. */
size_t keyreeve_ecdsa_der_encode(const unsigned char *r, const unsigned char *s, size_t width,
                                 unsigned char *out);

#endif
