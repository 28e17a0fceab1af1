#ifndef KEYREEVE_DIGEST_H
#define KEYREEVE_DIGEST_H

#include <openssl/evp.h>
#include <stddef.h>

enum keyreeve_hash {
    KEYREEVE_NO_HASH = 0,
    KEYREEVE_SHA256 = 1,
    KEYREEVE_SHA384 = 2,
    KEYREEVE_SHA512 = 3,
    KEYREEVE_HASHES
};
enum { KEYREEVE_DIGEST_MAX = 64 };

/* Looks the hashes up in libcrypto, once, before the signer locks itself in; 0 where one is missing. */
int keyreeve_digest_init(void);
size_t keyreeve_digest_size(enum keyreeve_hash hash);

struct keyreeve_bytes {
    const unsigned char *data;
    size_t length;
};

/* The digest of `parts` one after another; 0 on a fault of libcrypto. */
int keyreeve_digest(EVP_MD_CTX *context, enum keyreeve_hash hash, const struct keyreeve_bytes *parts,
                    size_t count, unsigned char *out);

#endif
