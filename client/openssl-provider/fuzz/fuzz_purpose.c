/* The purpose of a message: what it says is so by a second look at the bytes, written apart from it. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "purpose.h"

#define POINT_AT 68

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Where the last handshake message begins; `size` where the messages do not end with the data. */
static size_t last_message(const uint8_t *data, size_t size)
{
    size_t at = 0;
    size_t next;

    for (;;) {
        if (size - at < 4)
            return size;
        next = at + 4 + ((size_t)data[at + 1] * 65536 + (size_t)data[at + 2] * 256 + data[at + 3]);
        if (next > size)
            return size;
        if (next == size)
            return at;
        at = next;
    }
}

static void expect(int condition)
{
    if (!condition)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t last;

    switch (keyreeve_purpose_of(data, size)) {
    case KEYREEVE_PURPOSE_TLS13_SERVER_VERIFY:
        expect((size == 130 || size == 146) && memcmp(data + 64, "TLS 1.3, server", 15) == 0);
        break;
    case KEYREEVE_PURPOSE_TLS13_CLIENT_VERIFY:
        expect((size == 130 || size == 146) && memcmp(data + 64, "TLS 1.3, client", 15) == 0);
        break;
    case KEYREEVE_PURPOSE_TLS12_SERVER_KEY_EXCHANGE:
        expect(size > POINT_AT && size == POINT_AT + (size_t)data[67] &&
               memcmp(data + 64, "\x03\x00", 2) == 0);
        break;
    case KEYREEVE_PURPOSE_TLS12_CLIENT_VERIFY:
        last = last_message(data, size);
        expect(last < size && last > 0 && data[0] == 1 && data[last] == 16);
        break;
    case KEYREEVE_PURPOSE_CERTIFICATE_REQUEST:
        expect(size > 4 && data[0] == 0x30);
        break;
    case KEYREEVE_PURPOSE_UNSPECIFIED:
    default:
        break;
    }
    return 0;
}
