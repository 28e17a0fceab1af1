#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PATH_MAX_BYTES 512
#define FILE_MAX_BYTES 65536

void test_failed(const char *file, int line, const char *what)
{
    fprintf(stderr, "%s:%d: not so: %s\n", file, line, what);
    abort();
}

static char *read_file(const char *directory, const char *file)
{
    char path[PATH_MAX_BYTES];
    char *text = calloc(1, FILE_MAX_BYTES);
    FILE *in;

    (void)snprintf(path, sizeof(path), "%s/%s", directory, file);
    in = fopen(path, "rb");
    CHECK(text != NULL && in != NULL);
    CHECK(fread(text, 1, FILE_MAX_BYTES - 1, in) > 0);
    (void)fclose(in);
    return text;
}

char *test_vector_text(const char *directory, const char *file, const char *name)
{
    char *text = read_file(directory, file);
    char wanted[64];
    char *value = calloc(1, FILE_MAX_BYTES);
    const char *at;
    size_t len = 0;

    (void)snprintf(wanted, sizeof(wanted), "\"%s\": \"", name);
    at = strstr(text, wanted);
    CHECK(value != NULL && at != NULL);
    for (at += strlen(wanted); *at != '"'; at++) {
        CHECK(*at != '\0');
        if (*at == '\\') {
            at++;
            CHECK(*at == 'n'); /* the only escape that the generator writes */
            value[len++] = '\n';
        } else {
            value[len++] = *at;
        }
    }
    free(text);
    return value;
}

static uint8_t nibble(char c)
{
    CHECK((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'));
    return (uint8_t)(c <= '9' ? c - '0' : c - 'a' + 10);
}

uint8_t *test_vector_bytes(const char *directory, const char *file, const char *name, size_t *len)
{
    char *text = test_vector_text(directory, file, name);
    uint8_t *bytes;
    size_t i;

    *len = strlen(text) / 2;
    bytes = malloc(*len);
    CHECK(bytes != NULL);
    for (i = 0; i < *len; i++)
        bytes[i] = (uint8_t)(nibble(text[2 * i]) << 4 | nibble(text[2 * i + 1]));
    free(text);
    return bytes;
}
