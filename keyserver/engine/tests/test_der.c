/* ECDSA signatures in DER, against libcrypto's encoder: short numbers, numbers with their top bit set, the
 * longest. */
#include "der.h"
#include "support.h"

#include <openssl/ecdsa.h>
#include <stdio.h>
#include <string.h>

static void check_pair(const unsigned char *r, const unsigned char *s, size_t width)
{
    unsigned char ours[KEYREEVE_ECDSA_DER_MAX], *theirs = NULL;
    ECDSA_SIG *signature = ECDSA_SIG_new();
    size_t length = keyreeve_ecdsa_der_encode(r, s, width, ours);
    int expected;
    CHECK(ECDSA_SIG_set0(signature, BN_bin2bn(r, (int)width, NULL), BN_bin2bn(s, (int)width, NULL)) == 1);
    expected = i2d_ECDSA_SIG(signature, &theirs);
    CHECK(expected > 0 && (size_t)expected == length && memcmp(ours, theirs, length) == 0);
    OPENSSL_free(theirs);
    ECDSA_SIG_free(signature);
}

int main(void)
{
    const size_t widths[] = {32, 48};
    const unsigned char tops[] = {0x01, 0x7F, 0x80, 0xFF};
    unsigned char r[48], s[48];
    size_t w, top, zeros, other;
    for (w = 0; w < 2; w++)
        for (top = 0; top < sizeof(tops); top++)
            for (zeros = 0; zeros < widths[w]; zeros++)
                for (other = 0; other < widths[w]; other += 7) {
                    memset(r, 0x11, sizeof(r));
                    memset(s, 0xEE, sizeof(s));
                    memset(r, 0, zeros);
                    memset(s, 0, other);
                    r[zeros] = tops[top];
                    s[other] = tops[sizeof(tops) - 1 - top];
                    check_pair(r, s, widths[w]);
                    check_pair(s, r, widths[w]);
                }
    puts("der: ok");
    return 0;
}
