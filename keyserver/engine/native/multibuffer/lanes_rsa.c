#include "emsa.h"
#include "lanes.h"

#include <crypto_mb/rsa.h>
#include <crypto_mb/status.h>
#include <openssl/crypto.h>
#include <string.h>

int keyreeve_lanes_rsa_fits(enum keyreeve_kind kind)
{
    int bits = keyreeve_kind_rsa_bits(kind);
    const mbx_RSA_Method *private = mbx_RSA_private_crt_Method(bits), *public = mbx_RSA_pub65537_Method(bits);
    return private != NULL && public != NULL && mbx_RSA_Method_BufSize(private) <= KEYREEVE_METHOD_BUFFER &&
           mbx_RSA_Method_BufSize(public) <= KEYREEVE_METHOD_BUFFER;
}

static void pad(struct keyreeve_item *item, EVP_MD_CTX *context, const unsigned char *digest,
                const unsigned char *salt, unsigned char *out, size_t length)
{
    enum keyreeve_hash hash = item->form & KEYREEVE_FORM_HASH;
    if ((item->form & KEYREEVE_FORM_PSS) == 0)
        keyreeve_emsa_pkcs1(hash, digest, out, length);
    else if (!keyreeve_emsa_pss(context, hash, digest, salt, out, length))
        item->status = KEYREEVE_LANE_FAILED;
}

/* A fault in one half of the CRT gives a result from which anyone can factor n, so each result is raised to e
 * and compared before it leaves (RFC 8017 does not ask for it; Boneh, DeMillo and Lipton 1997 do). */
void keyreeve_lanes_rsa(enum keyreeve_kind kind, struct keyreeve_item **items, size_t count,
                        EVP_MD_CTX *context, unsigned char (*digests)[KEYREEVE_DIGEST_MAX],
                        unsigned char (*salts)[KEYREEVE_DIGEST_MAX], struct keyreeve_rsa_scratch *scratch)
{
    const int bits = keyreeve_kind_rsa_bits(kind);
    const size_t length = (size_t)bits / 8;
    const unsigned char *padded[KEYREEVE_LANES] = {NULL}, *powers_in[KEYREEVE_LANES] = {NULL};
    unsigned char *powers[KEYREEVE_LANES] = {NULL}, *opened[KEYREEVE_LANES] = {NULL};
    const unsigned long long *parts[KEYREEVE_RSA_N + 1][KEYREEVE_LANES] = {{NULL}};
    mbx_status signing, opening;
    size_t lane, part;
    for (lane = 0; lane < count; lane++) {
        pad(items[lane], context, digests[lane], salts[lane], scratch->padded[lane], length);
        padded[lane] = scratch->padded[lane];
        powers[lane] = scratch->powers[lane];
        powers_in[lane] = scratch->powers[lane];
        opened[lane] = scratch->opened[lane];
        for (part = KEYREEVE_RSA_P; part <= KEYREEVE_RSA_N; part++)
            parts[part][lane] = keyreeve_rsa_part(items[lane]->key, part);
    }
    signing =
        mbx_rsa_private_crt_mb8(padded, powers, parts[KEYREEVE_RSA_P], parts[KEYREEVE_RSA_Q],
                                parts[KEYREEVE_RSA_DP], parts[KEYREEVE_RSA_DQ], parts[KEYREEVE_RSA_QINV],
                                bits, mbx_RSA_private_crt_Method(bits), scratch->method_buffer);
    opening = mbx_rsa_public_mb8(powers_in, opened, parts[KEYREEVE_RSA_N], bits,
                                 mbx_RSA_pub65537_Method(bits), scratch->method_buffer);
    for (lane = 0; lane < count; lane++) {
        if (items[lane]->status != KEYREEVE_OK)
            continue;
        if (MBX_GET_STS(signing, (int)lane) != MBX_STATUS_OK ||
            MBX_GET_STS(opening, (int)lane) != MBX_STATUS_OK)
            items[lane]->status = KEYREEVE_LANE_FAILED;
        else if (CRYPTO_memcmp(opened[lane], padded[lane], length) != 0)
            items[lane]->status = KEYREEVE_MISMATCH;
        else {
            memcpy(items[lane]->signature, powers[lane], length);
            items[lane]->signature_length = length;
        }
    }
}
