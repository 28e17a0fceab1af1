#include "lanes.h"

#include <crypto_mb/ed25519.h>
#include <crypto_mb/status.h>

enum { HALF = 32 };

void keyreeve_lanes_ed25519(struct keyreeve_item **items, size_t count)
{
    ed25519_sign_component *to_r[KEYREEVE_LANES] = {NULL}, *to_s[KEYREEVE_LANES] = {NULL};
    const unsigned char *from[KEYREEVE_LANES] = {NULL};
    unsigned int lengths[KEYREEVE_LANES] = {0};
    const ed25519_private_key *seed[KEYREEVE_LANES] = {NULL};
    const ed25519_public_key *public[KEYREEVE_LANES] = {NULL};
    mbx_status status;
    size_t lane;
    for (lane = 0; lane < count; lane++) {
        const void *key = items[lane]->key->words;
        const void *point = items[lane]->key->words + HALF / sizeof(items[lane]->key->words[0]);
        to_r[lane] = (ed25519_sign_component *)(void *)items[lane]->signature;
        to_s[lane] = (ed25519_sign_component *)(void *)(items[lane]->signature + HALF);
        from[lane] = items[lane]->message;
        lengths[lane] = (unsigned int)items[lane]->length;
        seed[lane] = key;
        public[lane] = point;
    }
    status = mbx_ed25519_sign_mb8(to_r, to_s, from, lengths, seed, public);
    for (lane = 0; lane < count; lane++) {
        if (MBX_GET_STS(status, (int)lane) != MBX_STATUS_OK)
            items[lane]->status = KEYREEVE_LANE_FAILED;
        else
            items[lane]->signature_length = 2 * HALF;
    }
}
