/* Both parsers over the same bytes; what they accept keeps every rule of docs/protocol/key-reference.md. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "reference.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const uint8_t *data, size_t size, const keyreeve_reference *reference)
{
    size_t key_id_len = strlen(reference->key_id);
    size_t socket_len = strlen(reference->socket);

    if (key_id_len < 1 || key_id_len > KEYREEVE_KEY_ID_MAX ||
        strspn(reference->key_id, "abcdefghijklmnopqrstuvwxyz0123456789-") != key_id_len)
        abort();
    if (!keyreeve_socket_path_is_valid((const uint8_t *)reference->socket, socket_len))
        abort();
    if (reference->type == KEYREEVE_KEY_UNKNOWN || reference->spki < data ||
        reference->spki + reference->spki_len != data + size)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    keyreeve_reference reference;
    const char *why = NULL;

    if (keyreeve_reference_parse(data, size, &reference, &why) == KEYREEVE_REFERENCE_OK)
        check(data, size, &reference);
    else if (why == NULL)
        abort();
    why = NULL;
    if (keyreeve_reference_parse_pkcs8(data, size, &reference, &why) == KEYREEVE_REFERENCE_OK)
        check(data, size, &reference);
    else if (why == NULL)
        abort();
    return 0;
}
