#include "frames.h"

#include <string.h>

#include "reference.h"

#define VERSION 1
#define TYPE_SIGN 0x01
#define TYPE_SIGNED 0x81
#define TYPE_PONG 0x82
#define TYPE_REFUSED 0x8f
#define SIGN_FIXED_BYTES 16 /* body of a sign frame without key id and message */

static uint8_t *put_u16(uint8_t *at, uint16_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
    return at + 2;
}

static uint8_t *put_u32(uint8_t *at, uint32_t value)
{
    return put_u16(put_u16(at, (uint16_t)(value >> 16)), (uint16_t)value);
}

static uint16_t get_u16(const uint8_t *at)
{
    return (uint16_t)((at[0] << 8) | at[1]);
}

static uint32_t get_u32(const uint8_t *at)
{
    return ((uint32_t)get_u16(at) << 16) | get_u16(at + 2);
}

size_t keyreeve_frame_sign_size(const keyreeve_sign_frame *frame)
{
    size_t key_id_len = strlen(frame->key_id);

    if (key_id_len < 1 || key_id_len > KEYREEVE_KEY_ID_MAX || frame->message_len > KEYREEVE_MESSAGE_MAX ||
        frame->deadline_ms < 1 || frame->deadline_ms > KEYREEVE_DEADLINE_MS_MAX)
        return 0;
    return KEYREEVE_FRAME_LENGTH_BYTES + 2 + SIGN_FIXED_BYTES + key_id_len + frame->message_len;
}

void keyreeve_frame_sign_encode(const keyreeve_sign_frame *frame, uint8_t *out)
{
    size_t key_id_len = strlen(frame->key_id);

    out = put_u32(out, (uint32_t)(keyreeve_frame_sign_size(frame) - KEYREEVE_FRAME_LENGTH_BYTES));
    *out++ = VERSION;
    *out++ = TYPE_SIGN;
    out = put_u32(out, frame->request_id);
    out = put_u32(out, frame->deadline_ms);
    out = put_u16(out, frame->scheme);
    *out++ = frame->purpose;
    *out++ = (uint8_t)key_id_len;
    memcpy(out, frame->key_id, key_id_len);
    out = put_u32(out + key_id_len, (uint32_t)frame->message_len);
    if (frame->message_len > 0)
        memcpy(out, frame->message, frame->message_len);
}

int keyreeve_frame_answer_length(const uint8_t field[KEYREEVE_FRAME_LENGTH_BYTES], size_t *length)
{
    *length = get_u32(field);
    return *length >= KEYREEVE_FRAME_MIN && *length <= KEYREEVE_ANSWER_MAX;
}

/* UTF-8 stays; control characters, which could forge a log line, do not. */
static void copy_detail(char *out, const uint8_t *text, size_t len)
{
    size_t i;

    for (i = 0; i < len; i++)
        out[i] = text[i] < 0x20 || text[i] == 0x7f ? '?' : (char)text[i];
    out[len] = '\0';
}

static int decode_signed(const uint8_t *body, size_t len, keyreeve_answer *out)
{
    size_t signature_len;

    if (len < 2)
        return 0;
    signature_len = get_u16(body);
    if (signature_len < 1 || signature_len > KEYREEVE_SIGNATURE_MAX || len != 2 + signature_len)
        return 0;
    memcpy(out->signature, body + 2, signature_len);
    out->signature_len = signature_len;
    out->kind = KEYREEVE_ANSWER_SIGNED;
    return 1;
}

static int decode_refused(const uint8_t *body, size_t len, keyreeve_answer *out)
{
    size_t detail_len;

    if (len < 7)
        return 0;
    detail_len = get_u16(body + 5);
    if (detail_len > KEYREEVE_DETAIL_MAX || len != 7 + detail_len)
        return 0;
    out->code = body[0];
    out->retry_after_ms = get_u32(body + 1);
    copy_detail(out->detail, body + 7, detail_len);
    out->kind = KEYREEVE_ANSWER_REFUSED;
    return 1;
}

int keyreeve_frame_answer_decode(const uint8_t *frame, size_t len, keyreeve_answer *out)
{
    memset(out, 0, sizeof(*out));
    if (len < 6 || len > KEYREEVE_ANSWER_MAX || frame[0] != VERSION)
        return 0;
    out->request_id = get_u32(frame + 2);
    switch (frame[1]) {
    case TYPE_SIGNED:
        return decode_signed(frame + 6, len - 6, out);
    case TYPE_REFUSED:
        return decode_refused(frame + 6, len - 6, out);
    case TYPE_PONG:
        out->kind = KEYREEVE_ANSWER_PONG;
        return len == 6;
    default:
        return 0;
    }
}
