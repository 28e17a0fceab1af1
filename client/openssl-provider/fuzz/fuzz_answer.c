/* A stream from the agent: the length field, then the answer; and the purpose of a message made of the same
 * bytes. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "frames.h"
#include "purpose.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    keyreeve_answer answer;
    size_t length, i;

    (void)keyreeve_purpose_of(data, size);
    if (size < KEYREEVE_FRAME_LENGTH_BYTES)
        return 0;
    if (keyreeve_frame_answer_length(data, &length) && length > KEYREEVE_ANSWER_MAX)
        abort();
    if (!keyreeve_frame_answer_decode(data + KEYREEVE_FRAME_LENGTH_BYTES, size - KEYREEVE_FRAME_LENGTH_BYTES,
                                      &answer))
        return 0;
    if (answer.signature_len > KEYREEVE_SIGNATURE_MAX)
        abort();
    for (i = 0; i < strlen(answer.detail); i++)
        if ((unsigned char)answer.detail[i] < 0x20)
            abort();
    return 0;
}
