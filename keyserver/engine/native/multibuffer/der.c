#include "der.h"

#include <string.h>

enum { TAG_SEQUENCE = 0x30, TAG_INTEGER = 0x02, SIGN_BIT = 0x80 };

static size_t encode_integer(const unsigned char *value, size_t width, unsigned char *out)
{
    size_t padded;
    while (width > 1 && value[0] == 0) {
        value++;
        width--;
    }
    padded = (value[0] & SIGN_BIT) != 0;
    out[0] = TAG_INTEGER;
    out[1] = (unsigned char)(width + padded);
    out[2] = 0;
    memcpy(out + 2 + padded, value, width);
    return 2 + padded + width;
}

size_t keyreeve_ecdsa_der_encode(const unsigned char *r, const unsigned char *s, size_t width,
                                 unsigned char *out)
{
    size_t length = encode_integer(r, width, out + 2);
    length += encode_integer(s, width, out + 2 + length);
    out[0] = TAG_SEQUENCE;
    out[1] = (unsigned char)length; /* at most 102: the short form */
    return 2 + length;
}
