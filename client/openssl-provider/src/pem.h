/* Reading one PEM block, whoever's it is, and the bytes of ours. Pure: lines come from a callback. */
#ifndef KEYREEVE_PEM_H
#define KEYREEVE_PEM_H

#include <stddef.h>
#include <stdint.h>

#include "reference.h"

#define KEYREEVE_PEM_LABEL "KEYREEVE KEY REFERENCE"

typedef enum {
    KEYREEVE_PEM_OURS,    /* `der` is filled */
    KEYREEVE_PEM_FOREIGN, /* one block of another label was consumed */
    KEYREEVE_PEM_NONE,    /* no block before the end of input */
    KEYREEVE_PEM_BROKEN   /* our label, and the block is cut short or not base64 */
} keyreeve_pem_status;

/* Like BIO_gets: a line or the part of one that fits `size`, NUL-terminated; its length, or <= 0 at the end.
 */
typedef int keyreeve_pem_gets(void *source, char *line, int size);

/* Consumes text up to and including the END line of the first block. */
keyreeve_pem_status keyreeve_pem_read(keyreeve_pem_gets *gets, void *source,
                                      uint8_t der[KEYREEVE_REFERENCE_MAX], size_t *der_len, const char **why);

#endif
