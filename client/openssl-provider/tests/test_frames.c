/* Frames, purposes and schemes: what goes over the socket, held to the vectors. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "errors.h"
#include "frames.h"
#include "purpose.h"
#include "scheme.h"
#include "support.h"

#define VECTORS "sign_socket.json"
#define LABEL_AT 64

static size_t server_content(uint8_t *out, size_t hash_len, const char *label)
{
    size_t i;

    memset(out, 0x20, 64);
    memcpy(out + LABEL_AT, label, 34);
    for (i = 0; i < hash_len; i++)
        out[98 + i] = (uint8_t)i;
    return 98 + hash_len;
}

static void test_sign_frame_is_that_of_the_vector(const char *directory)
{
    size_t len;
    uint8_t *expected = test_vector_bytes(directory, VECTORS, "sign", &len);
    uint8_t message[200];
    keyreeve_sign_frame frame = {7, 2000, 0x0403, 1, "k-0123456789abcdef", message, 0};
    uint8_t *bytes;

    frame.message_len = server_content(message, 32, "TLS 1.3, server CertificateVerify");
    CHECK(keyreeve_frame_sign_size(&frame) == len);
    bytes = malloc(len);
    CHECK(bytes != NULL);
    keyreeve_frame_sign_encode(&frame, bytes);
    CHECK(memcmp(bytes, expected, len) == 0);
    free(bytes);
    free(expected);
}

static void test_sign_frame_bounds(void)
{
    uint8_t message[1] = {0};
    char key_id[66];
    keyreeve_sign_frame frame = {1, 1, 0x0403, 0, "k", message, 0};

    CHECK(keyreeve_frame_sign_size(&frame) != 0);
    frame.message_len = KEYREEVE_MESSAGE_MAX;
    CHECK(keyreeve_frame_sign_size(&frame) <= KEYREEVE_FRAME_MAX);
    frame.message_len = KEYREEVE_MESSAGE_MAX + 1;
    CHECK(keyreeve_frame_sign_size(&frame) == 0);
    frame.message_len = 0;
    frame.deadline_ms = 0;
    CHECK(keyreeve_frame_sign_size(&frame) == 0);
    frame.deadline_ms = 60001;
    CHECK(keyreeve_frame_sign_size(&frame) == 0);
    frame.deadline_ms = 60000;
    frame.key_id = "";
    CHECK(keyreeve_frame_sign_size(&frame) == 0);
    memset(key_id, 'k', 65);
    key_id[65] = '\0';
    frame.key_id = key_id;
    CHECK(keyreeve_frame_sign_size(&frame) == 0);
}

static int decode(const uint8_t *frame, size_t len, keyreeve_answer *out)
{
    uint8_t *exact = malloc(len > 0 ? len : 1);
    int ok;

    CHECK(exact != NULL);
    memcpy(exact, frame, len);
    ok = keyreeve_frame_answer_decode(exact, len, out);
    free(exact);
    return ok;
}

/* The whole frame decodes; each proper prefix and a longer one do not. */
static void check_answer(const char *directory, const char *name, keyreeve_answer *out)
{
    size_t len, declared, cut;
    uint8_t *frame = test_vector_bytes(directory, VECTORS, name, &len);
    uint8_t longer[KEYREEVE_ANSWER_MAX];
    keyreeve_answer ignored;

    CHECK(keyreeve_frame_answer_length(frame, &declared) && declared == len - 4);
    for (cut = 0; cut < declared; cut++)
        CHECK(!decode(frame + 4, cut, &ignored));
    memcpy(longer, frame + 4, declared);
    longer[declared] = 0;
    CHECK(!decode(longer, declared + 1, &ignored));
    longer[0] = 2;
    CHECK(!decode(longer, declared, &ignored));
    CHECK(decode(frame + 4, declared, out));
    free(frame);
}

static void test_answers_of_the_vectors(const char *directory)
{
    keyreeve_answer answer;

    check_answer(directory, "signed", &answer);
    CHECK(answer.kind == KEYREEVE_ANSWER_SIGNED && answer.request_id == 7 && answer.signature_len == 8);
    CHECK(memcmp(answer.signature, "\x30\x06\x02\x01\x01\x02\x01\x01", 8) == 0);
    check_answer(directory, "refused", &answer);
    CHECK(answer.kind == KEYREEVE_ANSWER_REFUSED && answer.request_id == 7 && answer.code == 20);
    CHECK(answer.retry_after_ms == 0 &&
          strcmp(answer.detail, "no such key, or no grant for this caller") == 0);
    CHECK(strcmp(keyreeve_error_code_name(answer.code), "key_not_found") == 0);
    check_answer(directory, "refused_retry", &answer);
    CHECK(answer.request_id == 8 && answer.code == 7 && answer.retry_after_ms == 1500);
    check_answer(directory, "pong", &answer);
    CHECK(answer.kind == KEYREEVE_ANSWER_PONG);
}

static void test_answer_bounds(void)
{
    static const uint8_t TYPES_OF_CLIENTS[] = {0x01, 0x02, 0x00, 0xff};
    uint8_t frame[KEYREEVE_ANSWER_MAX] = {1, 0x81, 0, 0, 0, 7, 0, 0};
    uint8_t field[4] = {0, 0, 0, 1};
    keyreeve_answer answer;
    size_t len, i;

    CHECK(!decode(frame, 8, &answer)); /* an empty signature */
    frame[6] = 0x04;
    frame[7] = 0x00;
    CHECK(decode(frame, 8 + 1024, &answer));
    frame[7] = 0x01;
    CHECK(!decode(frame, 8 + 1025, &answer));
    for (i = 0; i < sizeof(TYPES_OF_CLIENTS); i++) {
        frame[1] = TYPES_OF_CLIENTS[i];
        CHECK(!decode(frame, 8 + 1025, &answer));
    }
    CHECK(!keyreeve_frame_answer_length(field, &len));
    field[2] = 0xff;
    CHECK(!keyreeve_frame_answer_length(field, &len));
}

static void test_a_detail_cannot_forge_log_lines(void)
{
    static const uint8_t FRAME[] = {1, 0x8f, 0, 0,   0,    1, 20,   0,    0,   0,
                                    0, 0,    6, 'a', '\n', 0, 0x1b, 0xc3, 0xa4};
    keyreeve_answer answer;

    CHECK(decode(FRAME, sizeof(FRAME), &answer));
    CHECK(strcmp(answer.detail, "a???\xc3\xa4") == 0);
}

static void test_purposes(void)
{
    static const char SERVER[] = "TLS 1.3, server CertificateVerify";
    static const char CLIENT[] = "TLS 1.3, client CertificateVerify";
    static const struct {
        const char *bytes;
        size_t len;
        keyreeve_purpose purpose;
    } REQUESTS[] = {
        {"\x30\x03\x02\x01\x00", 5, KEYREEVE_PURPOSE_CERTIFICATE_REQUEST},
        {"\x30\x03\x02\x01\x01", 5, KEYREEVE_PURPOSE_UNSPECIFIED},
        {"\x30\x03\x02\x01\x00\x00", 6, KEYREEVE_PURPOSE_UNSPECIFIED},
        {"\x30\x04\x02\x01\x00", 5, KEYREEVE_PURPOSE_UNSPECIFIED},
        {"\x30\x81\x03\x02\x01\x00", 6, KEYREEVE_PURPOSE_UNSPECIFIED},
        {"\x30\x80\x02\x01\x00", 5, KEYREEVE_PURPOSE_UNSPECIFIED},
        {"\x30\x00", 2, KEYREEVE_PURPOSE_UNSPECIFIED},
        {"\x30", 1, KEYREEVE_PURPOSE_UNSPECIFIED},
        {"", 0, KEYREEVE_PURPOSE_UNSPECIFIED},
    };
    uint8_t message[200];
    size_t i, len;

    for (len = 0; len <= 60; len++) {
        keyreeve_purpose expected =
            len == 32 || len == 48 ? KEYREEVE_PURPOSE_TLS13_SERVER_VERIFY : KEYREEVE_PURPOSE_UNSPECIFIED;

        CHECK(keyreeve_purpose_of(message, server_content(message, len, SERVER)) == expected);
    }
    len = server_content(message, 48, CLIENT);
    CHECK(keyreeve_purpose_of(message, len) == KEYREEVE_PURPOSE_TLS13_CLIENT_VERIFY);
    for (i = 0; i < 98; i++) { /* pad, label and 0x00 have no choice */
        message[i] ^= 1;
        CHECK(keyreeve_purpose_of(message, len) == KEYREEVE_PURPOSE_UNSPECIFIED);
        message[i] ^= 1;
    }
    len = server_content(message, 32, "TLS, server delegated credentials");
    CHECK(keyreeve_purpose_of(message, len) == KEYREEVE_PURPOSE_UNSPECIFIED);
    for (i = 0; i < sizeof(REQUESTS) / sizeof(REQUESTS[0]); i++)
        CHECK(keyreeve_purpose_of((const uint8_t *)REQUESTS[i].bytes, REQUESTS[i].len) ==
              REQUESTS[i].purpose);
}

static void test_server_key_exchange(void)
{
    static const struct {
        uint8_t curve;
        uint8_t point_len;
    } CURVES[] = {{0x17, 65}, {0x18, 97}, {0x19, 133}, {0x1d, 32}, {0x1e, 56}};
    uint8_t message[68 + 134];
    size_t i, len, other;

    for (i = 0; i < sizeof(CURVES) / sizeof(CURVES[0]); i++) {
        memset(message, 0x30, sizeof(message)); /* randoms that look like a request */
        message[64] = 3;
        message[65] = 0;
        message[66] = CURVES[i].curve;
        message[67] = CURVES[i].point_len;
        len = 68U + CURVES[i].point_len;
        for (other = 0; other <= sizeof(message); other++)
            CHECK(keyreeve_purpose_of(message, other) ==
                  (other == len ? KEYREEVE_PURPOSE_TLS12_SERVER_KEY_EXCHANGE : KEYREEVE_PURPOSE_UNSPECIFIED));
        for (other = 64; other < 68; other++) { /* explicit curves, DHE, other curves and lengths */
            message[other] ^= 1;
            CHECK(keyreeve_purpose_of(message, len) == KEYREEVE_PURPOSE_UNSPECIFIED);
            message[other] ^= 1;
        }
    }
}

static void test_client_transcript(void)
{
    static const uint8_t TRANSCRIPT[] = {1, 0, 0, 2, 'c', 'h', 2, 0, 0, 0, 14, 0, 0, 0, 16, 0, 0, 1, 'k'};
    static const uint8_t OTHERS[][9] = {
        {1, 0, 0, 0, 16, 0, 0, 2, 'k'},       /* the last is cut short */
        {2, 0, 0, 0, 16, 0, 0, 1, 'k'},       /* no ClientHello */
        {1, 0, 0, 0, 20, 0, 0, 1, 'k'},       /* Finished last */
        {1, 255, 255, 255, 16, 0, 0, 1, 'k'}, /* longer than the message */
    };
    uint8_t longer[sizeof(TRANSCRIPT) + 1] = {0};
    size_t i;

    CHECK(keyreeve_purpose_of(TRANSCRIPT, sizeof(TRANSCRIPT)) == KEYREEVE_PURPOSE_TLS12_CLIENT_VERIFY);
    for (i = 0; i < sizeof(TRANSCRIPT); i++)
        CHECK(keyreeve_purpose_of(TRANSCRIPT, i) == KEYREEVE_PURPOSE_UNSPECIFIED);
    memcpy(longer, TRANSCRIPT, sizeof(TRANSCRIPT));
    CHECK(keyreeve_purpose_of(longer, sizeof(longer)) == KEYREEVE_PURPOSE_UNSPECIFIED);
    for (i = 0; i < sizeof(OTHERS) / sizeof(OTHERS[0]); i++)
        CHECK(keyreeve_purpose_of(OTHERS[i], sizeof(OTHERS[i])) == KEYREEVE_PURPOSE_UNSPECIFIED);
}

static void test_schemes(void)
{
    keyreeve_digest digest;

    CHECK(keyreeve_scheme_select(KEYREEVE_KEY_P256, KEYREEVE_DIGEST_SHA256, KEYREEVE_PADDING_NONE)->code ==
          0x0403);
    CHECK(keyreeve_scheme_select(KEYREEVE_KEY_P384, KEYREEVE_DIGEST_SHA384, KEYREEVE_PADDING_NONE)->code ==
          0x0503);
    CHECK(keyreeve_scheme_select(KEYREEVE_KEY_ED25519, KEYREEVE_DIGEST_NONE, KEYREEVE_PADDING_NONE)->code ==
          0x0807);
    CHECK(keyreeve_scheme_select(KEYREEVE_KEY_RSA, KEYREEVE_DIGEST_SHA512, KEYREEVE_PADDING_PSS)->code ==
          0x0806);
    CHECK(keyreeve_scheme_select(KEYREEVE_KEY_RSA, KEYREEVE_DIGEST_SHA384, KEYREEVE_PADDING_PKCS1)->code ==
          0x0501);
    CHECK(keyreeve_scheme_select(KEYREEVE_KEY_P256, KEYREEVE_DIGEST_SHA384, KEYREEVE_PADDING_NONE) == NULL);
    CHECK(keyreeve_scheme_select(KEYREEVE_KEY_RSA, KEYREEVE_DIGEST_SHA256, KEYREEVE_PADDING_NONE) == NULL);
    CHECK(keyreeve_digest_by_name("sha2-384", &digest) && digest == KEYREEVE_DIGEST_SHA384);
    CHECK(!keyreeve_digest_by_name("SHA1", &digest) && !keyreeve_digest_by_name("", &digest));
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    test_sign_frame_is_that_of_the_vector(argv[1]);
    test_sign_frame_bounds();
    test_answers_of_the_vectors(argv[1]);
    test_answer_bounds();
    test_a_detail_cannot_forge_log_lines();
    test_purposes();
    test_server_key_exchange();
    test_client_transcript();
    test_schemes();
    puts("frames, purposes, schemes: ok");
    return 0;
}
