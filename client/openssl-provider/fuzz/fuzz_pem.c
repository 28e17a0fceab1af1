/* A file read block by block, as libcrypto reads one; what is ours goes on to the parser. The first byte
 * chooses how long a line a read gives at most, for BIOs that split lines. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pem.h"
#include "reference.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct {
    const uint8_t *at;
    size_t left;
    int line_max;
} byte_source;

static int gets_from_bytes(void *source, char *line, int size)
{
    byte_source *from = source;
    int most = size - 1 < from->line_max ? size - 1 : from->line_max;
    int len = 0;

    while (len < most && from->left > 0) {
        line[len] = (char)*from->at++;
        from->left--;
        if (line[len++] == '\n')
            break;
    }
    line[len] = '\0';
    return len;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    byte_source source = {data + 1, size - 1, 0};
    uint8_t der[KEYREEVE_REFERENCE_MAX];
    size_t der_len;
    const char *why;
    keyreeve_reference reference;

    if (size == 0)
        return 0;
    source.line_max = data[0] + 1;
    for (;;) {
        size_t before = source.left;
        keyreeve_pem_status status = keyreeve_pem_read(gets_from_bytes, &source, der, &der_len, &why);

        if (der_len > KEYREEVE_REFERENCE_MAX)
            abort();
        if (status == KEYREEVE_PEM_OURS)
            (void)keyreeve_reference_parse(der, der_len, &reference, &why);
        if (status == KEYREEVE_PEM_NONE)
            return 0;
        if (source.left >= before)
            abort(); /* libcrypto would loop */
    }
}
