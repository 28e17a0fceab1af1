#include "emsa.h"

#include <string.h>

enum { TRAILER = 0xBC, PREFIX = 19, COUNTER = 4 };

/* DigestInfo up to the digest: RFC 8017 9.2, note 1. */
static const unsigned char PREFIXES[KEYREEVE_HASHES][PREFIX] = {
    {0},
    {0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00,
     0x04, 0x20},
    {0x30, 0x41, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00,
     0x04, 0x30},
    {0x30, 0x51, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03, 0x05, 0x00,
     0x04, 0x40},
};

void keyreeve_emsa_pkcs1(enum keyreeve_hash hash, const unsigned char *digest, unsigned char *out,
                         size_t length)
{
    size_t size = keyreeve_digest_size(hash), filled = length - 3 - PREFIX - size;
    out[0] = 0;
    out[1] = 1;
    memset(out + 2, 0xFF, filled);
    out[2 + filled] = 0;
    memcpy(out + 3 + filled, PREFIXES[hash], PREFIX);
    memcpy(out + 3 + filled + PREFIX, digest, size);
}

int keyreeve_emsa_pss(EVP_MD_CTX *context, enum keyreeve_hash hash, const unsigned char *digest,
                      const unsigned char *salt, unsigned char *out, size_t length)
{
    static const unsigned char ZEROS[8] = {0};
    size_t size = keyreeve_digest_size(hash), db = length - size - 1, at, byte;
    const struct keyreeve_bytes salted[] = {{ZEROS, sizeof(ZEROS)}, {digest, size}, {salt, size}};
    unsigned char *h = out + db, mask[KEYREEVE_DIGEST_MAX], counter[COUNTER] = {0};
    const struct keyreeve_bytes seed[] = {{h, size}, {counter, COUNTER}};
    if (!keyreeve_digest(context, hash, salted, 3, h))
        return 0;
    memset(out, 0, db);
    out[db - size - 1] = 1;
    memcpy(out + db - size, salt, size);
    for (at = 0; at < db; at += size, counter[COUNTER - 1]++) {
        if (!keyreeve_digest(context, hash, seed, 2, mask))
            return 0;
        for (byte = 0; byte < size && at + byte < db; byte++)
            out[at + byte] ^= mask[byte];
    }
    out[0] &= 0x7F; /* emBits is one less than the bits of the modulus */
    out[length - 1] = TRAILER;
    return 1;
}
