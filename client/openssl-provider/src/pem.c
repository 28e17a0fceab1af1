#include "pem.h"

#include <string.h>

#define LINE_MAX_BYTES 256
#define OUR_BEGIN "-----BEGIN " KEYREEVE_PEM_LABEL "-----"
#define OUR_END "-----END " KEYREEVE_PEM_LABEL "-----"

/* A base64 decoder that takes its input piecewise. */
typedef struct {
    uint8_t *out;
    size_t len;
    uint32_t bits;
    unsigned int held; /* characters in `bits` */
    unsigned int pads;
} base64_state;

static int base64_value(char c)
{
    if (c >= 'A' && c <= 'Z')
        return c - 'A';
    if (c >= 'a' && c <= 'z')
        return c - 'a' + 26;
    if (c >= '0' && c <= '9')
        return c - '0' + 52;
    if (c == '+')
        return 62;
    return c == '/' ? 63 : -1;
}

static int is_space(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == '\v' || c == '\f';
}

/* One completed group of four. */
static int base64_flush(base64_state *state)
{
    size_t bytes = 3 - state->pads;
    size_t i;

    if (state->pads > 2 || bytes > KEYREEVE_REFERENCE_MAX - state->len)
        return 0;
    for (i = 0; i < bytes; i++)
        state->out[state->len++] = (uint8_t)(state->bits >> (16 - 8 * i));
    state->bits = 0;
    state->held = 0;
    return 1;
}

static int base64_feed(base64_state *state, const char *text, size_t len)
{
    size_t i;

    for (i = 0; i < len; i++) {
        int value = base64_value(text[i]);

        if (is_space(text[i]))
            continue;
        if (text[i] == '=' && state->held >= 2) {
            state->pads++;
            value = 0;
        } else if (value < 0 || state->pads > 0) {
            return 0;
        }
        state->bits = (state->bits << 6) | (uint32_t)value;
        if (++state->held == 4 && !base64_flush(state))
            return 0;
    }
    return 1;
}

static int starts_with(const char *line, size_t len, const char *prefix)
{
    size_t prefix_len = strlen(prefix);

    return len >= prefix_len && memcmp(line, prefix, prefix_len) == 0;
}

/* `text` and then nothing but white space. */
static int is_line(const char *line, size_t len, const char *text)
{
    size_t i;

    if (!starts_with(line, len, text))
        return 0;
    for (i = strlen(text); i < len; i++)
        if (!is_space(line[i]))
            return 0;
    return 1;
}

static keyreeve_pem_status broken(const char **why, const char *text)
{
    *why = text;
    return KEYREEVE_PEM_BROKEN;
}

static keyreeve_pem_status read_our_body(keyreeve_pem_gets *gets, void *source, base64_state *state,
                                         const char **why)
{
    char line[LINE_MAX_BYTES];
    int got;
    int sane = 1;

    while ((got = gets(source, line, (int)sizeof(line))) > 0) {
        size_t len = (size_t)got;

        if (is_line(line, len, OUR_END)) {
            if (!sane || state->held != 0)
                return broken(why,
                              "its PEM body is not base64 of at most 4096 bytes: the file may be cut short");
            return KEYREEVE_PEM_OURS;
        }
        if (starts_with(line, len, "-----"))
            return broken(why, "its PEM block has no END line: the file is cut short");
        /* Read on to the END line even when the body is spoilt: exactly one block is consumed. */
        sane = sane && base64_feed(state, line, len);
    }
    return broken(why, "its PEM block has no END line: the file is cut short");
}

keyreeve_pem_status keyreeve_pem_read(keyreeve_pem_gets *gets, void *source,
                                      uint8_t der[KEYREEVE_REFERENCE_MAX], size_t *der_len, const char **why)
{
    base64_state state = {der, 0, 0, 0, 0};
    char line[LINE_MAX_BYTES];
    int at_line_start = 1;
    int in_foreign = 0;
    int got;

    *der_len = 0;
    *why = "";
    while ((got = gets(source, line, (int)sizeof(line))) > 0) {
        size_t len = (size_t)got;
        int starts_line = at_line_start;

        at_line_start = line[len - 1] == '\n';
        if (!starts_line)
            continue;
        if (in_foreign) {
            if (starts_with(line, len, "-----END "))
                return KEYREEVE_PEM_FOREIGN;
        } else if (is_line(line, len, OUR_BEGIN)) {
            keyreeve_pem_status status = read_our_body(gets, source, &state, why);

            *der_len = state.len;
            return status;
        } else if (starts_with(line, len, "-----BEGIN ")) {
            in_foreign = 1;
        }
    }
    return in_foreign ? KEYREEVE_PEM_FOREIGN : KEYREEVE_PEM_NONE;
}
