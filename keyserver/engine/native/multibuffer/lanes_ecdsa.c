#include "lanes.h"

#include <crypto_mb/ec_nistp256.h>
#include <crypto_mb/ec_nistp384.h>
#include <crypto_mb/status.h>

enum { WIDTH_MAX = 48, WORD_BYTES = 8 };

/* The digest modulo n: crypto_mb refuses e >= n, which one digest in 2^32 is for P-256. Both have the length
 * of n, so that n is to be taken off once at most. Digests are public: time may tell. Spec: FIPS 186-5 6.4.1;
 * SEC 1 4.1.3. */
static void reduce(unsigned char *digest, const struct keyreeve_order *order)
{
    unsigned long long words[6] = {0}, borrow = 0;
    size_t width = order->words * WORD_BYTES, byte, word;
    for (byte = 0; byte < width; byte++)
        words[byte / WORD_BYTES] |= (unsigned long long)digest[width - 1 - byte] << (byte % WORD_BYTES * 8);
    for (word = 0; word < order->words; word++) {
        unsigned long long partial = words[word] - order->value[word];
        unsigned long long below = words[word] < order->value[word];
        words[word] = partial - borrow;
        borrow = below | (partial < borrow);
    }
    for (byte = 0; borrow == 0 && byte < width; byte++)
        digest[width - 1 - byte] = (unsigned char)(words[byte / WORD_BYTES] >> (byte % WORD_BYTES * 8));
}

void keyreeve_lanes_ecdsa(enum keyreeve_kind kind, struct keyreeve_item **items, size_t count,
                          unsigned char (*digests)[KEYREEVE_DIGEST_MAX], const unsigned long long *nonces)
{
    const struct keyreeve_order *order = kind == KEYREEVE_P256 ? &KEYREEVE_P256_ORDER : &KEYREEVE_P384_ORDER;
    const size_t words = order->words;
    unsigned char r[KEYREEVE_LANES][WIDTH_MAX], s[KEYREEVE_LANES][WIDTH_MAX];
    unsigned char *to_r[KEYREEVE_LANES] = {NULL}, *to_s[KEYREEVE_LANES] = {NULL};
    const unsigned char *from[KEYREEVE_LANES] = {NULL};
    const unsigned long long *nonce[KEYREEVE_LANES] = {NULL}, *scalar[KEYREEVE_LANES] = {NULL};
    mbx_status status;
    size_t lane;
    for (lane = 0; lane < count; lane++) {
        to_r[lane] = r[lane];
        to_s[lane] = s[lane];
        reduce(digests[lane], order);
        from[lane] = digests[lane];
        nonce[lane] = nonces + lane * words;
        scalar[lane] = items[lane]->key->words;
    }
    if (kind == KEYREEVE_P256)
        status = mbx_nistp256_ecdsa_sign_mb8(to_r, to_s, from, nonce, scalar, NULL);
    else
        status = mbx_nistp384_ecdsa_sign_mb8(to_r, to_s, from, nonce, scalar, NULL);
    for (lane = 0; lane < count; lane++) {
        if (MBX_GET_STS(status, (int)lane) != MBX_STATUS_OK)
            items[lane]->status = KEYREEVE_LANE_FAILED;
        else
            items[lane]->signature_length =
                keyreeve_ecdsa_der_encode(r[lane], s[lane], words * sizeof(**nonce), items[lane]->signature);
    }
}
