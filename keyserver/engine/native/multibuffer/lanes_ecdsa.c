#include "lanes.h"

#include <crypto_mb/ec_nistp256.h>
#include <crypto_mb/ec_nistp384.h>
#include <crypto_mb/status.h>

enum { WIDTH_MAX = 48 };

void keyreeve_lanes_ecdsa(enum keyreeve_kind kind, struct keyreeve_item **items, size_t count,
                          unsigned char (*digests)[KEYREEVE_DIGEST_MAX], const unsigned long long *nonces)
{
    const size_t words = kind == KEYREEVE_P256 ? KEYREEVE_P256_ORDER.words : KEYREEVE_P384_ORDER.words;
    unsigned char r[KEYREEVE_LANES][WIDTH_MAX], s[KEYREEVE_LANES][WIDTH_MAX];
    unsigned char *to_r[KEYREEVE_LANES] = {NULL}, *to_s[KEYREEVE_LANES] = {NULL};
    const unsigned char *from[KEYREEVE_LANES] = {NULL};
    const unsigned long long *nonce[KEYREEVE_LANES] = {NULL}, *scalar[KEYREEVE_LANES] = {NULL};
    mbx_status status;
    size_t lane;
    for (lane = 0; lane < count; lane++) {
        to_r[lane] = r[lane];
        to_s[lane] = s[lane];
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
