#include "key.h"

#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/x509.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct keyreeve_key_st {
    atomic_uint references;
    atomic_uint since_verified; /* signatures; 0: the next one is verified */
    keyreeve_provider *provider;
    const char *algorithm;
    EVP_PKEY *public_key;
    keyreeve_key_type type; /* UNKNOWN unless the key came from a reference */
    char key_id[KEYREEVE_KEY_ID_MAX + 1];
    char socket[KEYREEVE_SOCKET_MAX + 1];
};

const char *keyreeve_algorithm_of(keyreeve_key_type type)
{
    switch (type) {
    case KEYREEVE_KEY_P256:
    case KEYREEVE_KEY_P384:
        return "EC";
    case KEYREEVE_KEY_RSA:
        return "RSA";
    case KEYREEVE_KEY_ED25519:
        return "ED25519";
    case KEYREEVE_KEY_UNKNOWN:
    default:
        return NULL;
    }
}

keyreeve_key *keyreeve_key_new(keyreeve_provider *provider, const char *algorithm)
{
    keyreeve_key *key = calloc(1, sizeof(*key));

    if (key == NULL)
        return NULL;
    atomic_init(&key->references, 1);
    atomic_init(&key->since_verified, 0);
    key->provider = provider;
    key->algorithm = algorithm;
    return key;
}

keyreeve_key *keyreeve_key_from_reference(keyreeve_provider *provider, const keyreeve_reference *reference)
{
    keyreeve_key *key = keyreeve_key_new(provider, keyreeve_algorithm_of(reference->type));
    const unsigned char *at = reference->spki;

    if (key == NULL)
        return NULL;
    (void)ERR_set_mark();
    key->public_key =
        d2i_PUBKEY_ex(NULL, &at, (long)reference->spki_len, keyreeve_provider_libctx(provider), NULL);
    (void)ERR_pop_to_mark();
    if (key->public_key == NULL || at != reference->spki + reference->spki_len) {
        keyreeve_key_free(key);
        return NULL;
    }
    key->type = reference->type;
    memcpy(key->key_id, reference->key_id, sizeof(key->key_id));
    memcpy(key->socket, reference->socket, sizeof(key->socket));
    return key;
}

keyreeve_key *keyreeve_key_up_ref(keyreeve_key *key)
{
    atomic_fetch_add(&key->references, 1);
    return key;
}

void keyreeve_key_free(keyreeve_key *key)
{
    if (key == NULL || atomic_fetch_sub(&key->references, 1) != 1)
        return;
    EVP_PKEY_free(key->public_key);
    free(key);
}

int keyreeve_key_fill(keyreeve_key *key, EVP_PKEY *public_key)
{
    if (key->public_key != NULL)
        return 0;
    key->public_key = public_key;
    return 1;
}

int keyreeve_key_skip_verification(keyreeve_key *key)
{
    return atomic_fetch_add(&key->since_verified, 1) % KEYREEVE_VERIFY_EVERY != 0;
}

void keyreeve_key_mistrust(keyreeve_key *key)
{
    atomic_store(&key->since_verified, 0);
}

EVP_PKEY *keyreeve_key_public(const keyreeve_key *key)
{
    return key->public_key;
}

const char *keyreeve_key_algorithm(const keyreeve_key *key)
{
    return key->algorithm;
}

keyreeve_key_type keyreeve_key_get_type(const keyreeve_key *key)
{
    return key->type;
}

keyreeve_provider *keyreeve_key_provider(const keyreeve_key *key)
{
    return key->provider;
}

const char *keyreeve_key_id(const keyreeve_key *key)
{
    return key->type != KEYREEVE_KEY_UNKNOWN ? key->key_id : NULL;
}

const char *keyreeve_key_socket(const keyreeve_key *key)
{
    return key->type != KEYREEVE_KEY_UNKNOWN ? key->socket : NULL;
}
