/* Key references: strict parsing of what stands where a private key is expected. Pure: no OpenSSL, no I/O.
 * Spec: docs/protocol/key-reference.md */
#ifndef KEYREEVE_REFERENCE_H
#define KEYREEVE_REFERENCE_H

#include <stddef.h>
#include <stdint.h>

#define KEYREEVE_REFERENCE_MAX 4096
#define KEYREEVE_ENVELOPE_MAX (KEYREEVE_REFERENCE_MAX + 64)
#define KEYREEVE_KEY_ID_MAX 64
#define KEYREEVE_SOCKET_MAX 107

typedef enum {
    KEYREEVE_KEY_UNKNOWN,
    KEYREEVE_KEY_P256,
    KEYREEVE_KEY_P384,
    KEYREEVE_KEY_RSA,
    KEYREEVE_KEY_ED25519
} keyreeve_key_type;

typedef enum {
    KEYREEVE_REFERENCE_OK,
    KEYREEVE_REFERENCE_FOREIGN, /* some other program's data: pass it on */
    KEYREEVE_REFERENCE_BROKEN   /* ours, and to be refused whole */
} keyreeve_reference_status;

/* A value; `spki` points into the bytes that were parsed. */
typedef struct {
    keyreeve_key_type type;
    char key_id[KEYREEVE_KEY_ID_MAX + 1];
    char socket[KEYREEVE_SOCKET_MAX + 1];
    const uint8_t *spki;
    size_t spki_len;
} keyreeve_reference;

/* Parses the DER of a KeyReference, first byte to last. `why` is a static text unless the status is OK. */
keyreeve_reference_status keyreeve_reference_parse(const uint8_t *der, size_t der_len,
                                                   keyreeve_reference *out, const char **why);

/* Parses the PKCS#8 envelope with our algorithm OID around a KeyReference. */
keyreeve_reference_status keyreeve_reference_parse_pkcs8(const uint8_t *der, size_t der_len,
                                                         keyreeve_reference *out, const char **why);

/* Whether this is the absolute path of a socket that a sockaddr_un can hold. */
int keyreeve_socket_path_is_valid(const uint8_t *path, size_t len);

#endif
