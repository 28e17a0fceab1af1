#ifndef KEYREEVE_PIECE_H
#define KEYREEVE_PIECE_H

#include "der.h"
#include "digest.h"
#include "key.h"
#include "nonce.h"

enum { KEYREEVE_LANES = 8, KEYREEVE_PIECE_MAX = 64, KEYREEVE_SIGNATURE_MAX = 512 };

/* How a message is signed, in one byte: a hash in the low bits, and these. */
enum { KEYREEVE_FORM_HASH = 0x0F, KEYREEVE_FORM_PSS = 0x40, KEYREEVE_FORM_PREHASHED = 0x80 };

struct keyreeve_item {
    const struct keyreeve_key *key;
    const unsigned char *message;
    size_t length;
    unsigned char form;
    enum keyreeve_status status;
    size_t signature_length;
    unsigned char *signature; /* room for KEYREEVE_SIGNATURE_MAX; empty unless the status is OK */
};

/* Looks up what libcrypto has to give; to be called once, before all else. 0 on a fault. */
int keyreeve_piece_init(void);

/* Whether this processor signs with keys of this kind eight at a time. */
int keyreeve_kind_is_supported(enum keyreeve_kind kind);

/* Signs up to KEYREEVE_PIECE_MAX items, eight lanes at a time; keys may differ, all are of `kind`. Each item
 * gets its own status: one that fails does not touch the others. Thread-safe. */
void keyreeve_piece_sign(enum keyreeve_kind kind, struct keyreeve_item *items, size_t count);

/* As above with another source of nonces and salts: for tests. */
void keyreeve_piece_sign_with(keyreeve_generator *generator, void *context, enum keyreeve_kind kind,
                              struct keyreeve_item *items, size_t count);

#endif
