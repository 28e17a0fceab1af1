#ifndef KEYREEVE_LANES_H
#define KEYREEVE_LANES_H

#include "piece.h"

enum { KEYREEVE_NONCE_WORDS = 6, KEYREEVE_RSA_BYTES_MAX = 512, KEYREEVE_METHOD_BUFFER = 128 * 1024 };

/* What a piece of ECDSA needs in the arena. */
struct keyreeve_nonces {
    unsigned long long words[KEYREEVE_PIECE_MAX * KEYREEVE_NONCE_WORDS];
};

/* What a piece of RSA needs there: the powers are secret until they are found right, what crypto_mb works in
 * always. */
struct keyreeve_rsa_scratch {
    unsigned char padded[KEYREEVE_LANES][KEYREEVE_RSA_BYTES_MAX];
    unsigned char powers[KEYREEVE_LANES][KEYREEVE_RSA_BYTES_MAX];
    unsigned char opened[KEYREEVE_LANES][KEYREEVE_RSA_BYTES_MAX];
    unsigned char method_buffer[KEYREEVE_METHOD_BUFFER] __attribute__((aligned(64)));
};

/* Sign `count`, at most KEYREEVE_LANES, items whose status is OK and whose digests stand in `digests`. */
void keyreeve_lanes_ecdsa(enum keyreeve_kind kind, struct keyreeve_item **items, size_t count,
                          unsigned char (*digests)[KEYREEVE_DIGEST_MAX], const unsigned long long *nonces);
void keyreeve_lanes_ed25519(struct keyreeve_item **items, size_t count);
void keyreeve_lanes_rsa(enum keyreeve_kind kind, struct keyreeve_item **items, size_t count,
                        EVP_MD_CTX *context, unsigned char (*digests)[KEYREEVE_DIGEST_MAX],
                        unsigned char (*salts)[KEYREEVE_DIGEST_MAX], struct keyreeve_rsa_scratch *scratch);

/* Whether the buffers that crypto_mb asks for are within KEYREEVE_METHOD_BUFFER. */
int keyreeve_lanes_rsa_fits(enum keyreeve_kind kind);

#endif
