/* Frames of the sign socket: pure encoding and decoding. Spec: docs/protocol/sign-socket.md */
#ifndef KEYREEVE_FRAMES_H
#define KEYREEVE_FRAMES_H

#include <stddef.h>
#include <stdint.h>

#define KEYREEVE_FRAME_LENGTH_BYTES 4
#define KEYREEVE_FRAME_MIN 2
#define KEYREEVE_FRAME_MAX 66000
#define KEYREEVE_MESSAGE_MAX 65536
#define KEYREEVE_SIGNATURE_MAX 1024
#define KEYREEVE_DETAIL_MAX 1024
#define KEYREEVE_DEADLINE_MS_MAX 60000
/* version, type, request_id, code, retry_after_ms, detail_len, detail: the longest answer there is. */
#define KEYREEVE_ANSWER_MAX (2 + 4 + 1 + 4 + 2 + KEYREEVE_DETAIL_MAX)

typedef struct {
    uint32_t request_id;
    uint32_t deadline_ms;
    uint16_t scheme;
    uint8_t purpose;
    const char *key_id;
    const uint8_t *message;
    size_t message_len;
} keyreeve_sign_frame;

typedef enum { KEYREEVE_ANSWER_SIGNED, KEYREEVE_ANSWER_REFUSED, KEYREEVE_ANSWER_PONG } keyreeve_answer_kind;

/* What the agent said. A refusal's detail is made safe to log: printable, one line. */
typedef struct {
    keyreeve_answer_kind kind;
    uint32_t request_id;
    size_t signature_len;
    uint8_t signature[KEYREEVE_SIGNATURE_MAX];
    uint8_t code;
    uint32_t retry_after_ms;
    char detail[KEYREEVE_DETAIL_MAX + 1];
} keyreeve_answer;

/* Bytes that the frame takes, its length field included; 0 where a field is outside its bounds. */
size_t keyreeve_frame_sign_size(const keyreeve_sign_frame *frame);

/* Writes the frame: `out` has keyreeve_frame_sign_size bytes. */
void keyreeve_frame_sign_encode(const keyreeve_sign_frame *frame, uint8_t *out);

/* Reads the length field of an answer: 1, or 0 for a length that no answer has. */
int keyreeve_frame_answer_length(const uint8_t field[KEYREEVE_FRAME_LENGTH_BYTES], size_t *length);

/* Decodes an answer (without its length field): 1, or 0 for what does not follow the page. */
int keyreeve_frame_answer_decode(const uint8_t *frame, size_t len, keyreeve_answer *out);

#endif
