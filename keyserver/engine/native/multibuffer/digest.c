#include "digest.h"

static EVP_MD *hashes[KEYREEVE_HASHES];
static const char *const NAMES[KEYREEVE_HASHES] = {NULL, "SHA2-256", "SHA2-384", "SHA2-512"};
static const size_t SIZES[KEYREEVE_HASHES] = {0, 32, 48, 64};

int keyreeve_digest_init(void)
{
    int hash;
    for (hash = KEYREEVE_SHA256; hash < KEYREEVE_HASHES; hash++)
        if (hashes[hash] == NULL && (hashes[hash] = EVP_MD_fetch(NULL, NAMES[hash], NULL)) == NULL)
            return 0;
    return 1;
}

size_t keyreeve_digest_size(enum keyreeve_hash hash)
{
    return SIZES[hash];
}

int keyreeve_digest(EVP_MD_CTX *context, enum keyreeve_hash hash, const struct keyreeve_bytes *parts,
                    size_t count, unsigned char *out)
{
    size_t part;
    if (!EVP_DigestInit_ex2(context, hashes[hash], NULL))
        return 0;
    for (part = 0; part < count; part++)
        if (!EVP_DigestUpdate(context, parts[part].data, parts[part].length))
            return 0;
    return EVP_DigestFinal_ex(context, out, NULL);
}
