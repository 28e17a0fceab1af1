/* References: the vectors parse, and what differs from them in length or in a rule does not. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pem.h"
#include "reference.h"
#include "support.h"

#define VECTORS "key_reference.json"

typedef struct {
    const char *at;
} text_source;

static int gets_from_text(void *source, char *line, int size)
{
    text_source *from = source;
    int len = 0;

    while (len < size - 1 && from->at[len] != '\0') {
        line[len] = from->at[len];
        len++;
        if (line[len - 1] == '\n')
            break;
    }
    line[len] = '\0';
    from->at += len;
    return len;
}

static keyreeve_reference_status parse(const uint8_t *der, size_t len, keyreeve_reference *out)
{
    const char *why = NULL;
    /* An allocation of the exact size, so that ASan sees a read past its end. */
    uint8_t *exact = malloc(len > 0 ? len : 1);
    keyreeve_reference_status status;

    CHECK(exact != NULL);
    memcpy(exact, der, len);
    status = keyreeve_reference_parse(exact, len, out, &why);
    CHECK(status == KEYREEVE_REFERENCE_OK || (why != NULL && why[0] != '\0'));
    out->spki = NULL;
    free(exact);
    return status;
}

static void test_vector_parses(const char *directory)
{
    size_t der_len, spki_len, pkcs8_len;
    uint8_t *der = test_vector_bytes(directory, VECTORS, "der", &der_len);
    uint8_t *spki = test_vector_bytes(directory, VECTORS, "spki_der", &spki_len);
    uint8_t *pkcs8 = test_vector_bytes(directory, VECTORS, "pkcs8_der", &pkcs8_len);
    char *key_id = test_vector_text(directory, VECTORS, "key_id");
    char *socket = test_vector_text(directory, VECTORS, "socket");
    keyreeve_reference reference;
    const char *why;
    size_t cut;

    CHECK(keyreeve_reference_parse(der, der_len, &reference, &why) == KEYREEVE_REFERENCE_OK);
    CHECK(reference.type == KEYREEVE_KEY_P256);
    CHECK(strcmp(reference.key_id, key_id) == 0 && strcmp(reference.socket, socket) == 0);
    CHECK(reference.spki_len == spki_len && memcmp(reference.spki, spki, spki_len) == 0);
    CHECK(keyreeve_reference_parse_pkcs8(pkcs8, pkcs8_len, &reference, &why) == KEYREEVE_REFERENCE_OK);
    CHECK(strcmp(reference.key_id, key_id) == 0);
    CHECK(keyreeve_reference_parse(pkcs8, pkcs8_len, &reference, &why) == KEYREEVE_REFERENCE_FOREIGN);
    CHECK(keyreeve_reference_parse_pkcs8(der, der_len, &reference, &why) == KEYREEVE_REFERENCE_FOREIGN);
    for (cut = 0; cut < pkcs8_len; cut++)
        CHECK(keyreeve_reference_parse_pkcs8(pkcs8, cut, &reference, &why) != KEYREEVE_REFERENCE_OK);
    free(der);
    free(spki);
    free(pkcs8);
    free(key_id);
    free(socket);
}

/* Every proper prefix and every longer string is refused; every change of one byte is refused or is another
 * reference that keeps the rules (key id, socket or point differ). */
static void test_truncations_and_mutations(const char *directory)
{
    size_t len, i;
    uint8_t *der = test_vector_bytes(directory, VECTORS, "der", &len);
    uint8_t longer[KEYREEVE_REFERENCE_MAX];
    keyreeve_reference reference;
    unsigned int value;

    for (i = 0; i < len; i++)
        CHECK(parse(der, i, &reference) != KEYREEVE_REFERENCE_OK);
    memcpy(longer, der, len);
    longer[len] = 0;
    CHECK(parse(longer, len + 1, &reference) == KEYREEVE_REFERENCE_BROKEN);
    for (i = 0; i < len; i++)
        for (value = 0; value < 256; value++) {
            uint8_t kept = der[i];

            der[i] = (uint8_t)value;
            if (parse(der, len, &reference) == KEYREEVE_REFERENCE_OK) {
                CHECK(reference.socket[0] == '/');
                CHECK(strlen(reference.key_id) == strlen("k-0123456789abcdef"));
                CHECK(value == kept || i > 7); /* nothing before the key id has a choice */
            }
            der[i] = kept;
        }
    free(der);
}

/* A reference with these texts and the vector's public key. */
static size_t build(uint8_t *out, const char *key_id, size_t key_id_len, const char *socket,
                    size_t socket_len, const uint8_t *spki, size_t spki_len)
{
    size_t body = 3 + 2 + key_id_len + 2 + socket_len + spki_len;
    uint8_t *at = out;

    *at++ = 0x30;
    if (body >= 0x100) {
        *at++ = 0x82;
        *at++ = (uint8_t)(body >> 8);
    } else if (body >= 0x80) {
        *at++ = 0x81;
    }
    *at++ = (uint8_t)body;
    memcpy(at, "\x02\x01\x01\x0c", 4);
    at += 4;
    *at++ = (uint8_t)key_id_len;
    memcpy(at, key_id, key_id_len);
    at += key_id_len;
    *at++ = 0x0c;
    *at++ = (uint8_t)socket_len;
    memcpy(at, socket, socket_len);
    at += socket_len;
    memcpy(at, spki, spki_len);
    return (size_t)(at - out) + spki_len;
}

static void test_bounds_of_texts(const char *directory)
{
    size_t spki_len;
    uint8_t *spki = test_vector_bytes(directory, VECTORS, "spki_der", &spki_len);
    char key_id[66];
    char path[120];
    static const struct {
        const char *path;
        size_t len;
        int good;
    } PATHS[] = {
        {"/s", 2, 1},
        {"s", 1, 0},
        {"", 0, 0},
        {"/\xc3\xa4", 3, 1},
        {"/\xc3", 2, 0},
        {"/\xff", 2, 0},
        {"/\xc0\xaf", 3, 0},
        {"/\xed\xa0\x80", 4, 0},
        {"/a\0b", 4, 0},
        {"@abs", 4, 0},
        {"/\xf0\x9f\x94\x91", 5, 1},
        {"/\xf5\x80\x80\x80", 5, 0},
    };
    uint8_t der[KEYREEVE_REFERENCE_MAX];
    keyreeve_reference reference;
    size_t i;

    memset(key_id, 'k', sizeof(key_id));
    memset(path, '/', sizeof(path));
    CHECK(parse(der, build(der, key_id, 64, path, 107, spki, spki_len), &reference) == KEYREEVE_REFERENCE_OK);
    CHECK(parse(der, build(der, key_id, 65, path, 107, spki, spki_len), &reference) ==
          KEYREEVE_REFERENCE_BROKEN);
    CHECK(parse(der, build(der, key_id, 64, path, 108, spki, spki_len), &reference) ==
          KEYREEVE_REFERENCE_BROKEN);
    CHECK(parse(der, build(der, key_id, 0, path, 1, spki, spki_len), &reference) ==
          KEYREEVE_REFERENCE_BROKEN);
    CHECK(parse(der, build(der, "A", 1, path, 1, spki, spki_len), &reference) == KEYREEVE_REFERENCE_BROKEN);
    CHECK(parse(der, build(der, "a_", 2, path, 1, spki, spki_len), &reference) == KEYREEVE_REFERENCE_BROKEN);
    for (i = 0; i < sizeof(PATHS) / sizeof(PATHS[0]); i++)
        CHECK((parse(der, build(der, "k", 1, PATHS[i].path, PATHS[i].len, spki, spki_len), &reference) ==
               KEYREEVE_REFERENCE_OK) == PATHS[i].good);
    free(spki);
}

static void test_foreign_pem_is_consumed_whole(const char *directory)
{
    char *ours = test_vector_text(directory, VECTORS, "pem");
    char file[4096];
    text_source source;
    uint8_t der[KEYREEVE_REFERENCE_MAX];
    size_t der_len, expected_len;
    uint8_t *expected = test_vector_bytes(directory, VECTORS, "der", &expected_len);
    const char *why;

    (void)snprintf(file, sizeof(file),
                   "some text\n-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n\n%s"
                   "-----BEGIN X-----\nAA==\n-----END X-----\n",
                   ours);
    source.at = file;
    CHECK(keyreeve_pem_read(gets_from_text, &source, der, &der_len, &why) == KEYREEVE_PEM_FOREIGN);
    CHECK(strncmp(source.at, "\n-----BEGIN KEYREEVE", 20) == 0);
    CHECK(keyreeve_pem_read(gets_from_text, &source, der, &der_len, &why) == KEYREEVE_PEM_OURS);
    CHECK(der_len == expected_len && memcmp(der, expected, der_len) == 0);
    CHECK(strncmp(source.at, "-----BEGIN X-----", 17) == 0);
    CHECK(keyreeve_pem_read(gets_from_text, &source, der, &der_len, &why) == KEYREEVE_PEM_FOREIGN);
    CHECK(keyreeve_pem_read(gets_from_text, &source, der, &der_len, &why) == KEYREEVE_PEM_NONE);
    free(ours);
    free(expected);
}

/* A file that was cut short anywhere inside the block never yields a key. */
static void test_cut_pem_is_refused(const char *directory)
{
    char *ours = test_vector_text(directory, VECTORS, "pem");
    size_t begin_len = strlen("-----BEGIN KEYREEVE KEY REFERENCE-----");
    size_t end = (size_t)(strstr(ours, "-----END") - ours) + strlen("-----END KEYREEVE KEY REFERENCE-----");
    uint8_t der[KEYREEVE_REFERENCE_MAX];
    size_t der_len, cut;
    const char *why;

    for (cut = end; cut-- > 0;) {
        text_source source = {ours};
        keyreeve_pem_status status;

        ours[cut] = '\0';
        status = keyreeve_pem_read(gets_from_text, &source, der, &der_len, &why);
        CHECK(status == (cut >= begin_len ? KEYREEVE_PEM_BROKEN
                         : cut >= 11      ? KEYREEVE_PEM_FOREIGN /* the label is not ours yet */
                                          : KEYREEVE_PEM_NONE));
    }
    free(ours);
}

static void test_bad_base64_is_refused(void)
{
    static const char *const BODIES[] = {
        "M", "MI", "MII", "M===", "MII=MIIB", "Proc-Type: 4", "M*II", "-----BEGIN X-----"};
    uint8_t der[KEYREEVE_REFERENCE_MAX];
    char file[8192];
    text_source source = {file};
    size_t der_len, i;
    const char *why;

    for (i = 0; i < sizeof(BODIES) / sizeof(BODIES[0]); i++) {
        (void)snprintf(file, sizeof(file),
                       "-----BEGIN " KEYREEVE_PEM_LABEL "-----\n%s\n-----END " KEYREEVE_PEM_LABEL "-----\n",
                       BODIES[i]);
        source.at = file;
        CHECK(keyreeve_pem_read(gets_from_text, &source, der, &der_len, &why) == KEYREEVE_PEM_BROKEN);
    }
    /* one group more than 4,096 bytes hold */
    (void)snprintf(file, sizeof(file),
                   "-----BEGIN " KEYREEVE_PEM_LABEL "-----\n%05468d\n-----END " KEYREEVE_PEM_LABEL "-----\n",
                   0);
    source.at = file;
    CHECK(keyreeve_pem_read(gets_from_text, &source, der, &der_len, &why) == KEYREEVE_PEM_BROKEN);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    test_vector_parses(argv[1]);
    test_truncations_and_mutations(argv[1]);
    test_bounds_of_texts(argv[1]);
    test_foreign_pem_is_consumed_whole(argv[1]);
    test_cut_pem_is_refused(argv[1]);
    test_bad_base64_is_refused();
    puts("reference: ok");
    return 0;
}
