/* Which signatures are verified: counted for each key. */
#include <stdio.h>

#include "key.h"
#include "support.h"

static void test_the_first_and_each_64th_are_verified(void)
{
    keyreeve_key *key = keyreeve_key_new(NULL, "EC");
    int i;

    CHECK(key != NULL);
    for (i = 0; i < 3 * KEYREEVE_VERIFY_EVERY; i++)
        CHECK(keyreeve_key_skip_verification(key) == (i % KEYREEVE_VERIFY_EVERY != 0));
    keyreeve_key_free(key);
}

static void test_after_a_wrong_one_the_next_is_verified(void)
{
    keyreeve_key *key = keyreeve_key_new(NULL, "EC");
    int i;

    CHECK(key != NULL && !keyreeve_key_skip_verification(key));
    for (i = 0; i < 5; i++) {
        keyreeve_key_mistrust(key);
        CHECK(!keyreeve_key_skip_verification(key));
    }
    CHECK(keyreeve_key_skip_verification(key));
    keyreeve_key_free(key);
}

int main(void)
{
    test_the_first_and_each_64th_are_verified();
    test_after_a_wrong_one_the_next_is_verified();
    puts("keys: ok");
    return 0;
}
