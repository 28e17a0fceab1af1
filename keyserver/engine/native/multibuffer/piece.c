#include "piece.h"

#include "arena.h"
#include "lanes.h"

#include <crypto_mb/cpu_features.h>
#include <limits.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <string.h>

/* Found out once: CPUID is trapped in a virtual machine, and costs as much as several signatures. */
static int supported[KEYREEVE_KINDS];

static int processor_supports(enum keyreeve_kind kind)
{
    static const enum MBX_ALGO ALGORITHMS[KEYREEVE_KINDS] = {
        [KEYREEVE_P256] = MBX_ALGO_ECDSA_NIST_P256, [KEYREEVE_P384] = MBX_ALGO_ECDSA_NIST_P384,
        [KEYREEVE_ED25519] = MBX_ALGO_ED25519,      [KEYREEVE_RSA_2048] = MBX_ALGO_RSA_2K,
        [KEYREEVE_RSA_3072] = MBX_ALGO_RSA_3K,      [KEYREEVE_RSA_4096] = MBX_ALGO_RSA_4K,
    };
    if ((mbx_get_algo_info(ALGORITHMS[kind]) & MBX_WIDTH_MB8) == 0)
        return 0;
    return keyreeve_kind_rsa_bits(kind) == 0 || keyreeve_lanes_rsa_fits(kind);
}

int keyreeve_piece_init(void)
{
    int kind;
    for (kind = 0; kind < KEYREEVE_KINDS; kind++)
        supported[kind] = processor_supports((enum keyreeve_kind)kind);
    return keyreeve_digest_init();
}

int keyreeve_kind_is_supported(enum keyreeve_kind kind)
{
    return supported[kind];
}

/* The hash, digest and message of an item, as its key takes them. Spec: IANA TLS SignatureScheme. */
static enum keyreeve_status check(const struct keyreeve_item *item, enum keyreeve_kind kind)
{
    unsigned int form = item->form, plain = form & ~(unsigned int)KEYREEVE_FORM_PREHASHED;
    unsigned int hash = form & KEYREEVE_FORM_HASH;
    int fits;
    if (item->key->kind != kind || item->length > INT_MAX || hash >= KEYREEVE_HASHES)
        return KEYREEVE_BAD_FORM;
    if (kind == KEYREEVE_P256)
        fits = plain == KEYREEVE_SHA256;
    else if (kind == KEYREEVE_P384)
        fits = plain == KEYREEVE_SHA384;
    else if (kind == KEYREEVE_ED25519)
        fits = form == KEYREEVE_NO_HASH;
    else
        fits = hash != KEYREEVE_NO_HASH && (plain == hash || plain == (hash | KEYREEVE_FORM_PSS));
    if ((form & KEYREEVE_FORM_PREHASHED) != 0 && item->length != keyreeve_digest_size(hash))
        fits = 0;
    return fits ? KEYREEVE_OK : KEYREEVE_BAD_FORM;
}

static enum keyreeve_status digest(const struct keyreeve_item *item, EVP_MD_CTX *context, unsigned char *out)
{
    const struct keyreeve_bytes whole = {item->message, item->length};
    enum keyreeve_hash hash = item->form & KEYREEVE_FORM_HASH;
    if (hash == KEYREEVE_NO_HASH)
        return KEYREEVE_OK;
    if ((item->form & KEYREEVE_FORM_PREHASHED) != 0) {
        memcpy(out, item->message, item->length);
        return KEYREEVE_OK;
    }
    return keyreeve_digest(context, hash, &whole, 1, out) ? KEYREEVE_OK : KEYREEVE_LANE_FAILED;
}

/* What a piece works with. Digests and salts are public, or will be; the rest is in the arena. */
struct workspace {
    unsigned char digests[KEYREEVE_PIECE_MAX][KEYREEVE_DIGEST_MAX];
    unsigned char salts[KEYREEVE_PIECE_MAX][KEYREEVE_DIGEST_MAX];
    struct keyreeve_nonces *nonces;
    struct keyreeve_rsa_scratch *rsa;
    EVP_MD_CTX *hashing;
};

static enum keyreeve_status open_workspace(struct workspace *space, enum keyreeve_kind kind)
{
    space->nonces = NULL;
    space->rsa = NULL;
    space->hashing = EVP_MD_CTX_new();
    if (space->hashing == NULL)
        return KEYREEVE_NO_MEMORY;
    if (kind == KEYREEVE_ED25519)
        return KEYREEVE_OK;
    if (keyreeve_kind_rsa_bits(kind) == 0)
        return (space->nonces = keyreeve_arena_take(sizeof(*space->nonces))) != NULL ? KEYREEVE_OK
                                                                                     : KEYREEVE_NO_MEMORY;
    return (space->rsa = keyreeve_arena_take(sizeof(*space->rsa))) != NULL ? KEYREEVE_OK : KEYREEVE_NO_MEMORY;
}

static void close_workspace(struct workspace *space)
{
    EVP_MD_CTX_free(space->hashing);
    keyreeve_arena_give(space->nonces, sizeof(*space->nonces));
    keyreeve_arena_give(space->rsa, sizeof(*space->rsa));
}

static const struct keyreeve_order *order_of(enum keyreeve_kind kind)
{
    return kind == KEYREEVE_P256 ? &KEYREEVE_P256_ORDER : &KEYREEVE_P384_ORDER;
}

static enum keyreeve_status draw(keyreeve_generator *generator, void *context, enum keyreeve_kind kind,
                                 struct workspace *space, size_t count)
{
    if (space->nonces != NULL)
        return keyreeve_nonces_sample(order_of(kind), generator, context, space->nonces->words, count);
    if (space->rsa == NULL || generator(context, space->salts[0], count * sizeof(space->salts[0])))
        return KEYREEVE_OK;
    return KEYREEVE_NO_RANDOM;
}

static void sign_lanes(enum keyreeve_kind kind, struct keyreeve_item **items, size_t first, size_t count,
                       struct workspace *space)
{
    if (space->nonces != NULL)
        keyreeve_lanes_ecdsa(kind, items + first, count, space->digests + first,
                             space->nonces->words + first * order_of(kind)->words);
    else if (space->rsa != NULL)
        keyreeve_lanes_rsa(kind, items + first, count, space->hashing, space->digests + first,
                           space->salts + first, space->rsa);
    else
        keyreeve_lanes_ed25519(items + first, count);
}

void keyreeve_piece_sign(enum keyreeve_kind kind, struct keyreeve_item *items, size_t count)
{
    keyreeve_piece_sign_with(keyreeve_random_system, NULL, kind, items, count);
}

void keyreeve_piece_sign_with(keyreeve_generator *generator, void *context, enum keyreeve_kind kind,
                              struct keyreeve_item *items, size_t count)
{
    struct keyreeve_item *good[KEYREEVE_PIECE_MAX];
    struct workspace space;
    enum keyreeve_status status = open_workspace(&space, kind);
    size_t number, signing = 0;
    if (count > KEYREEVE_PIECE_MAX)
        count = KEYREEVE_PIECE_MAX; /* callers check; what is beyond keeps the status it came with */
    for (number = 0; number < count; number++) {
        struct keyreeve_item *item = items + number;
        item->signature_length = 0;
        item->status = status == KEYREEVE_OK ? check(item, kind) : status;
        if (item->status == KEYREEVE_OK)
            item->status = digest(item, space.hashing, space.digests[signing]);
        if (item->status == KEYREEVE_OK)
            good[signing++] = item;
    }
    if (signing > 0)
        status = draw(generator, context, kind, &space, signing);
    for (number = 0; status != KEYREEVE_OK && number < signing; number++)
        good[number]->status = status;
    for (number = 0; status == KEYREEVE_OK && number < signing; number += KEYREEVE_LANES) {
        size_t left = signing - number;
        sign_lanes(kind, good, number, left < KEYREEVE_LANES ? left : KEYREEVE_LANES, &space);
    }
    close_workspace(&space);
    ERR_clear_error();
}
