/* The engine over the pausing provider: what it signs verifies, and no fault of the provider harms more than
 * its own request. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>
#include <openssl/x509.h>

#include "engine.h"
#include "pausing_provider.h"
#include "scheme.h"

#undef NDEBUG
#include <assert.h>

#define SECOND 1000000000ULL
#define LONG (120 * SECOND) /* never waited for by a test that passes */
#define SHORT (SECOND / 20)
#define PSS_SHA256 0x0804
#define PKCS1_SHA512 0x0601
#define P256 0x0403
#define P384 0x0503
#define MANY 64

static struct {
    void (*reset)(void);
    void (*set)(int, long);
    long (*get)(int);
    void (*let_go)(void);
} pausing;
static const char *directory;
static const unsigned char message[] = "a message that the signer has judged";

static void find_knobs(void)
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/keyreeve_pausing.so", directory);
    void *library = dlopen(path, RTLD_NOW | RTLD_NODELETE);
    if (library == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    *(void **)&pausing.reset = dlsym(library, "pausing_reset");
    *(void **)&pausing.set = dlsym(library, "pausing_set");
    *(void **)&pausing.get = dlsym(library, "pausing_get");
    *(void **)&pausing.let_go = dlsym(library, "pausing_let_go");
}

static keyreeve_async_engine *open_engine(size_t jobs)
{
    char why[256];
    keyreeve_async_engine *engine;
    pausing.reset();
    keyreeve_async_status status =
        keyreeve_async_engine_open("keyreeve_pausing", directory, jobs, LONG, &engine, why, sizeof(why));
    if (status != KEYREEVE_ASYNC_OK)
        fprintf(stderr, "engine did not open: %s\n", why);
    assert(status == KEYREEVE_ASYNC_OK);
    return engine;
}

static void close_engine(keyreeve_async_engine *engine)
{
    assert(keyreeve_async_engine_close(engine, LONG));
    keyreeve_async_engine_release(engine);
}

/* One RSA key for all tests: making one takes long under sanitizers. */
static EVP_PKEY *make_key(uint16_t scheme)
{
    static EVP_PKEY *rsa;
    EVP_PKEY *made = scheme == P256 ? EVP_EC_gen("P-256") : scheme == P384 ? EVP_EC_gen("P-384") : rsa;
    if (made == NULL)
        made = rsa = EVP_RSA_gen(2048);
    if (made == rsa)
        EVP_PKEY_up_ref(rsa);
    assert(made != NULL);
    return made;
}

static keyreeve_async_key *load_key(keyreeve_async_engine *engine, EVP_PKEY *pkey)
{
    unsigned char *der = NULL;
    keyreeve_async_key *key;
    PKCS8_PRIV_KEY_INFO *info = EVP_PKEY2PKCS8(pkey);
    int size = i2d_PKCS8_PRIV_KEY_INFO(info, &der);
    assert(size > 0);
    assert(keyreeve_async_engine_load(engine, der, (size_t)size, &key) == KEYREEVE_ASYNC_OK);
    assert(key != NULL);
    OPENSSL_free(der);
    PKCS8_PRIV_KEY_INFO_free(info);
    return key;
}

static keyreeve_async_request request_for(keyreeve_async_key *key, uint16_t scheme)
{
    return (keyreeve_async_request){
        .key = key, .message = message, .message_size = sizeof(message), .scheme = scheme};
}

/* Independent of the engine's own check: one-shot verification in the default library context. */
static void assert_valid(const keyreeve_async_request *request, EVP_PKEY *pkey)
{
    const keyreeve_scheme *scheme = keyreeve_scheme_find(request->scheme);
    EVP_PKEY_CTX *ctx = NULL;
    EVP_MD_CTX *md = EVP_MD_CTX_new();
    if (request->status != KEYREEVE_ASYNC_OK)
        fprintf(stderr, "scheme %04x: status %d\n", request->scheme, (int)request->status);
    assert(request->status == KEYREEVE_ASYNC_OK);
    assert(EVP_DigestVerifyInit_ex(md, &ctx, scheme->digest, NULL, NULL, pkey, NULL) == 1);
    if (scheme->padding != 0)
        assert(keyreeve_scheme_apply(scheme, ctx));
    assert(EVP_DigestVerify(md, request->signature, request->signature_size, message, sizeof(message)) == 1);
    EVP_MD_CTX_free(md);
}

static void test_every_scheme(long wake, long retries)
{
    static const uint16_t schemes[] = {P256, P384, 0x0401, 0x0501, PKCS1_SHA512, PSS_SHA256, 0x0805, 0x0806};
    keyreeve_async_engine *engine = open_engine(16);
    pausing.set(PAUSING_WAKE, wake);
    pausing.set(PAUSING_RETRIES, retries);
    for (size_t i = 0; i < sizeof(schemes) / sizeof(schemes[0]); i++) {
        EVP_PKEY *pkey = make_key(schemes[i]);
        keyreeve_async_key *key = load_key(engine, pkey);
        keyreeve_async_request request = request_for(key, schemes[i]);
        keyreeve_async_engine_sign(engine, &request, 1, LONG);
        assert_valid(&request, pkey);
        assert(request.paused);
        keyreeve_async_key_release(key);
        EVP_PKEY_free(pkey);
    }
    assert(pausing.get(PAUSING_SIGNED) == 8);
    assert(pausing.get(PAUSING_OUTSIDE_JOBS) == 0);
    close_engine(engine);
}

/* The card answers nothing before so many are with it: it can only end if they are there at once. */
static void test_many_are_in_flight_at_once(long wake)
{
    static keyreeve_async_request requests[MANY];
    keyreeve_async_engine *engine = open_engine(32);
    EVP_PKEY *pkey = make_key(P256);
    keyreeve_async_key *key = load_key(engine, pkey);
    pausing.set(PAUSING_BATCH, 32);
    pausing.set(PAUSING_WAKE, wake);
    for (size_t i = 0; i < MANY; i++)
        requests[i] = request_for(key, P256);
    keyreeve_async_engine_sign(engine, requests, MANY, LONG);
    for (size_t i = 0; i < MANY; i++)
        assert_valid(&requests[i], pkey);
    assert(pausing.get(PAUSING_MOST_WITH_THE_CARD) == 32); /* and not more than the engine was given */
    assert(keyreeve_async_engine_load_now(engine).most_running == 32);
    keyreeve_async_key_release(key);
    EVP_PKEY_free(pkey);
    close_engine(engine);
}

struct caller {
    pthread_t thread;
    keyreeve_async_engine *engine;
    keyreeve_async_key *key;
    EVP_PKEY *pkey;
    uint16_t scheme;
};

static void *call_often(void *argument)
{
    struct caller *caller = argument;
    keyreeve_async_request requests[5];
    for (int round = 0; round < 8; round++) {
        for (size_t i = 0; i < 5; i++)
            requests[i] = request_for(caller->key, caller->scheme);
        keyreeve_async_engine_sign(caller->engine, requests, 5, LONG);
        for (size_t i = 0; i < 5; i++)
            assert_valid(&requests[i], caller->pkey);
    }
    return NULL;
}

static void test_many_threads(void)
{
    static const uint16_t schemes[] = {P256, PSS_SHA256, P384, PKCS1_SHA512};
    struct caller callers[8];
    keyreeve_async_engine *engine = open_engine(16);
    for (size_t i = 0; i < 8; i++) {
        EVP_PKEY *pkey = make_key(schemes[i % 4]);
        callers[i] = (struct caller){
            .engine = engine, .pkey = pkey, .key = load_key(engine, pkey), .scheme = schemes[i % 4]};
        assert(pthread_create(&callers[i].thread, NULL, call_often, &callers[i]) == 0);
    }
    for (size_t i = 0; i < 8; i++) {
        pthread_join(callers[i].thread, NULL);
        keyreeve_async_key_release(callers[i].key);
        EVP_PKEY_free(callers[i].pkey);
    }
    assert(pausing.get(PAUSING_SIGNED) == 8 * 8 * 5);
    close_engine(engine);
}

static void test_faults(void)
{
    keyreeve_async_engine *engine = open_engine(8);
    EVP_PKEY *rsa = make_key(PSS_SHA256);
    keyreeve_async_key *key = load_key(engine, rsa);
    keyreeve_async_request request = request_for(key, PSS_SHA256);
    pausing.set(PAUSING_FAULT, PAUSING_FAIL);
    keyreeve_async_engine_sign(engine, &request, 1, LONG);
    assert(request.status == KEYREEVE_ASYNC_FAILED && request.signature_size == 0);
    pausing.set(PAUSING_FAULT, PAUSING_WRONG);
    keyreeve_async_engine_sign(engine, &request, 1, LONG);
    assert(request.status == KEYREEVE_ASYNC_MISMATCH && request.signature_size == 0);
    for (size_t i = 0; i < sizeof(request.signature); i++)
        assert(request.signature[i] == 0); /* nothing of it was released */
    pausing.set(PAUSING_FAULT, PAUSING_AT_ONCE);
    keyreeve_async_engine_sign(engine, &request, 1, LONG);
    assert_valid(&request, rsa);
    assert(!request.paused);
    pausing.set(PAUSING_FAULT, PAUSING_SOUND);
    keyreeve_async_engine_sign(engine, &request, 1, LONG);
    assert_valid(&request, rsa);
    assert(request.paused);
    keyreeve_async_key_release(key);
    EVP_PKEY_free(rsa);
    close_engine(engine);
}

/* ECDSA is not verified where a card made it, but nothing is released that is no signature, or that no card
 * made and does not verify. */
static void test_sham_signatures(uint16_t scheme)
{
    keyreeve_async_engine *engine = open_engine(8);
    EVP_PKEY *pkey = make_key(scheme);
    keyreeve_async_key *key = load_key(engine, pkey);
    for (long fault = PAUSING_SHAM; fault <= PAUSING_CUT; fault++) {
        keyreeve_async_request request = request_for(key, scheme);
        pausing.set(PAUSING_FAULT, fault);
        keyreeve_async_engine_sign(engine, &request, 1, LONG);
        assert(request.status == KEYREEVE_ASYNC_MISMATCH && request.signature_size == 0);
    }
    keyreeve_async_key_release(key);
    EVP_PKEY_free(pkey);
    close_engine(engine);
}

/* The key is let go while the card still has it; both are freed once the card has answered. `fault`: the job
 * hangs, or the whole helper. */
static void test_what_hangs_is_given_up_and_freed_later(long fault)
{
    keyreeve_async_engine *engine = open_engine(2);
    EVP_PKEY *pkey = make_key(P256);
    keyreeve_async_key *key = load_key(engine, pkey);
    keyreeve_async_request requests[5];
    pausing.set(PAUSING_FAULT, fault);
    for (size_t i = 0; i < 5; i++)
        requests[i] = request_for(key, P256);
    keyreeve_async_engine_sign(engine, requests, 5, SHORT);
    for (size_t i = 0; i < 5; i++)
        assert(requests[i].status == KEYREEVE_ASYNC_LATE);
    if (fault == PAUSING_HANG) {
        assert(keyreeve_async_engine_load_now(engine).hanging == 2);
        keyreeve_async_engine_sign(engine, requests, 1, LONG);
        assert(requests[0].status == KEYREEVE_ASYNC_BUSY); /* at once: no job is left to run it */
    }
    keyreeve_async_key_release(key);
    pausing.let_go();
    key = load_key(engine, pkey);
    do { /* until the helper has its jobs back */
        requests[0] = request_for(key, P256);
        keyreeve_async_engine_sign(engine, requests, 1, LONG);
    } while (requests[0].status == KEYREEVE_ASYNC_BUSY);
    assert_valid(&requests[0], pkey);
    assert(keyreeve_async_engine_load_now(engine).hanging == 0);
    keyreeve_async_key_release(key);
    EVP_PKEY_free(pkey);
    close_engine(engine);
}

static void *sign_one(void *argument)
{
    struct caller *caller = argument;
    keyreeve_async_request request = request_for(caller->key, caller->scheme);
    keyreeve_async_engine_sign(caller->engine, &request, 1, LONG);
    assert_valid(&request, caller->pkey);
    return NULL;
}

/* Closing waits for what the card has; what it does not answer is left to it, and the memory stays. */
static void test_closing_with_jobs_in_flight(long fault)
{
    keyreeve_async_engine *engine = open_engine(4);
    EVP_PKEY *pkey = make_key(P256);
    struct caller caller = {.engine = engine, .pkey = pkey, .key = load_key(engine, pkey), .scheme = P256};
    pausing.set(PAUSING_FAULT, fault);
    assert(pthread_create(&caller.thread, NULL, sign_one, &caller) == 0);
    while (keyreeve_async_engine_load_now(engine).running == 0)
        sched_yield();
    assert(!keyreeve_async_engine_close(engine, SHORT));
    keyreeve_async_request late = request_for(caller.key, P256);
    keyreeve_async_engine_sign(engine, &late, 1, LONG);
    assert(late.status == KEYREEVE_ASYNC_CLOSED);
    pausing.let_go();
    pthread_join(caller.thread, NULL); /* what was begun was answered */
    assert(keyreeve_async_engine_close(engine, LONG));
    keyreeve_async_key_release(caller.key);
    keyreeve_async_engine_release(engine);
    EVP_PKEY_free(pkey);
}

static void test_refused_requests_and_keys(void)
{
    keyreeve_async_engine *engine = open_engine(1);
    EVP_PKEY *pkey = make_key(P256), *edwards = EVP_PKEY_Q_keygen(NULL, NULL, "ED25519");
    keyreeve_async_key *key = load_key(engine, pkey), *other;
    keyreeve_async_request requests[4];
    for (size_t i = 0; i < 4; i++)
        requests[i] = request_for(key, P256);
    requests[0].scheme = PSS_SHA256; /* of another kind of key */
    requests[1].scheme = 0x0807;     /* of none */
    requests[2].prehashed = true;    /* the message is no digest */
    keyreeve_async_engine_sign(engine, requests, 4, LONG);
    for (size_t i = 0; i < 3; i++)
        assert(requests[i].status == KEYREEVE_ASYNC_BAD_REQUEST);
    assert_valid(&requests[3], pkey);
    assert(keyreeve_async_engine_load(engine, message, sizeof(message), &other) == KEYREEVE_ASYNC_BAD_KEY);
    unsigned char *der = NULL;
    PKCS8_PRIV_KEY_INFO *info = EVP_PKEY2PKCS8(edwards);
    int size = i2d_PKCS8_PRIV_KEY_INFO(info, &der);
    assert(keyreeve_async_engine_load(engine, der, (size_t)size, &other) == KEYREEVE_ASYNC_NOT_OFFERED);
    OPENSSL_free(der);
    PKCS8_PRIV_KEY_INFO_free(info);
    keyreeve_async_key_release(key);
    EVP_PKEY_free(pkey);
    EVP_PKEY_free(edwards);
    close_engine(engine);
}

static void test_a_provider_that_does_not_load(void)
{
    char why[256];
    keyreeve_async_engine *engine;
    assert(keyreeve_async_engine_open("no-such-provider", directory, 8, LONG, &engine, why, sizeof(why)) ==
           KEYREEVE_ASYNC_NO_PROVIDER);
    assert(engine == NULL && strstr(why, "no-such-provider") != NULL);
    pausing.reset();
    pausing.set(PAUSING_REFUSE, 1);
    assert(keyreeve_async_engine_open("keyreeve_pausing", directory, 8, LONG, &engine, why, sizeof(why)) ==
           KEYREEVE_ASYNC_NO_PROVIDER);
    assert(engine == NULL && why[0] != '\0');
    assert(keyreeve_async_engine_open("default", NULL, 0, LONG, &engine, why, sizeof(why)) ==
           KEYREEVE_ASYNC_BAD_REQUEST);
}

/* Nobody waits for it longer than asked, and when it has loaded at last it is let go again. */
static void test_a_provider_that_hangs_while_it_loads(void)
{
    char why[256];
    keyreeve_async_engine *engine;
    pausing.reset();
    long before = pausing.get(PAUSING_UNLOADED);
    pausing.set(PAUSING_REFUSE, 2);
    assert(keyreeve_async_engine_open("keyreeve_pausing", directory, 8, SHORT, &engine, why, sizeof(why)) ==
           KEYREEVE_ASYNC_NO_PROVIDER);
    assert(engine == NULL && strstr(why, "in time") != NULL);
    pausing.set(PAUSING_REFUSE, 0);
    while (pausing.get(PAUSING_UNLOADED) == before)
        sched_yield();
}

int main(int count, char **arguments)
{
    if (count != 2)
        return 2;
    directory = arguments[1];
    find_knobs();
    test_a_provider_that_hangs_while_it_loads();
    for (long wake = PAUSING_BY_CALLBACK; wake <= PAUSING_BY_NOTHING; wake++) {
        test_every_scheme(wake, 0);
        test_every_scheme(wake, 3);
        test_many_are_in_flight_at_once(wake);
    }
    test_many_threads();
    test_faults();
    test_sham_signatures(P384);
    test_sham_signatures(PSS_SHA256);
    test_what_hangs_is_given_up_and_freed_later(PAUSING_HANG);
    test_what_hangs_is_given_up_and_freed_later(PAUSING_BLOCK);
    test_closing_with_jobs_in_flight(PAUSING_HANG);
    test_closing_with_jobs_in_flight(PAUSING_BLOCK);
    test_refused_requests_and_keys();
    test_a_provider_that_does_not_load();
    puts("async engine: all tests passed");
    return 0;
}
