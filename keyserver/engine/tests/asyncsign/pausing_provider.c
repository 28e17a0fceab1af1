#include "pausing_provider.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <openssl/async.h>
#include <openssl/core.h>
#include <openssl/core_dispatch.h>
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <openssl/provider.h>

#define EXPORT __attribute__((visibility("default")))
#define FUNCTION(function) (void (*)(void)) function

/* What is with the card; lies on the stack of its job. */
struct operation {
    struct operation *next;
    ASYNC_JOB *job;
    bool answered;
};

struct signature {
    EVP_PKEY_CTX *inner;
};

struct key {
    EVP_PKEY *pkey; /* of the inside */
};

static OSSL_LIB_CTX *inside; /* with the code that really signs */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static long knobs[PAUSING_KNOBS], counts[PAUSING_COUNTS];
static struct operation *with_the_card;
static const char fd_key[] = "keyreeve_pausing";

/* ---- knobs ---- */

EXPORT void pausing_reset(void)
{
    pausing_let_go();
    pthread_mutex_lock(&lock);
    memset(knobs, 0, sizeof(knobs));
    memset(counts, 0, sizeof(counts));
    knobs[PAUSING_BATCH] = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

EXPORT void pausing_set(int knob, long value)
{
    pthread_mutex_lock(&lock);
    knobs[knob] = value;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

EXPORT long pausing_get(int count)
{
    pthread_mutex_lock(&lock);
    long value = counts[count];
    pthread_mutex_unlock(&lock);
    return value;
}

/* ---- the card ---- */

static void wake(ASYNC_JOB *job)
{
    ASYNC_callback_fn callback;
    void *argument;
    OSSL_ASYNC_FD fd;
    uint64_t one = 1;
    void *custom;
    ASYNC_WAIT_CTX *wait = ASYNC_get_wait_ctx(job);
    if (ASYNC_WAIT_CTX_get_fd(wait, fd_key, &fd, &custom)) {
        if (write(fd, &one, sizeof(one)) < 0)
            abort();
    } else if (ASYNC_WAIT_CTX_get_callback(wait, &callback, &argument)) {
        callback(argument);
    }
}

static void answer_all(void)
{
    while (with_the_card != NULL) {
        ASYNC_JOB *job = with_the_card->job;
        with_the_card->answered = true;
        with_the_card = with_the_card->next;
        counts[PAUSING_WITH_THE_CARD]--;
        wake(job); /* the last that touches it: its job may go on at once */
    }
}

static void *card(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        if (knobs[PAUSING_FAULT] != PAUSING_HANG && counts[PAUSING_WITH_THE_CARD] >= knobs[PAUSING_BATCH] &&
            with_the_card != NULL)
            answer_all();
        pthread_cond_wait(&changed, &lock);
    }
    return NULL;
}

EXPORT void pausing_let_go(void)
{
    pthread_mutex_lock(&lock);
    knobs[PAUSING_FAULT] = PAUSING_SOUND;
    answer_all();
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void close_fd(ASYNC_WAIT_CTX *wait, const void *key, OSSL_ASYNC_FD fd, void *custom)
{
    (void)wait, (void)key, (void)custom;
    close(fd);
}

static void prepare_fd(ASYNC_WAIT_CTX *wait)
{
    OSSL_ASYNC_FD fd;
    void *custom;
    if (!ASYNC_WAIT_CTX_get_fd(wait, fd_key, &fd, &custom)) {
        fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        ASYNC_WAIT_CTX_set_wait_fd(wait, fd_key, fd, NULL, close_fd);
    }
}

static bool answered(struct operation *operation)
{
    pthread_mutex_lock(&lock);
    bool done = operation->answered;
    pthread_mutex_unlock(&lock);
    return done;
}

static void put_to_the_card(struct operation *operation)
{
    pthread_mutex_lock(&lock);
    operation->next = with_the_card;
    with_the_card = operation;
    if (++counts[PAUSING_WITH_THE_CARD] > counts[PAUSING_MOST_WITH_THE_CARD])
        counts[PAUSING_MOST_WITH_THE_CARD] = counts[PAUSING_WITH_THE_CARD];
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void pause_until_answered(long how, long retries)
{
    ASYNC_JOB *job = ASYNC_get_current_job();
    struct operation operation = {.job = job};
    uint64_t times;
    if (job == NULL) {
        pthread_mutex_lock(&lock);
        counts[PAUSING_OUTSIDE_JOBS]++;
        pthread_mutex_unlock(&lock);
        return;
    }
    ASYNC_WAIT_CTX *wait = ASYNC_get_wait_ctx(job);
    if (how == PAUSING_BY_FD)
        prepare_fd(wait);
    for (long i = 0; i < retries; i++) {
        ASYNC_WAIT_CTX_set_status(wait, ASYNC_STATUS_EAGAIN);
        ASYNC_pause_job();
    }
    put_to_the_card(&operation);
    do {
        if (how == PAUSING_BY_CALLBACK)
            ASYNC_WAIT_CTX_set_status(wait, ASYNC_STATUS_OK);
        ASYNC_pause_job();
        OSSL_ASYNC_FD fd;
        void *custom;
        if (how == PAUSING_BY_FD && ASYNC_WAIT_CTX_get_fd(wait, fd_key, &fd, &custom) &&
            read(fd, &times, sizeof(times)) < 0)
            continue;
    } while (!answered(&operation));
}

static void block(void)
{
    pthread_mutex_lock(&lock);
    while (knobs[PAUSING_FAULT] == PAUSING_BLOCK)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

/* ---- signature operations ---- */

static void *signature_new(void *provider, const char *properties)
{
    (void)provider, (void)properties;
    return calloc(1, sizeof(struct signature));
}

static void signature_free(void *context)
{
    EVP_PKEY_CTX_free(((struct signature *)context)->inner);
    free(context);
}

static int signature_set_params(void *context, const OSSL_PARAM params[])
{
    struct signature *signature = context;
    return params == NULL || signature->inner == NULL || EVP_PKEY_CTX_set_params(signature->inner, params);
}

static const OSSL_PARAM *signature_settable(void *context, void *provider)
{
    (void)context, (void)provider;
    static const OSSL_PARAM settable[] = {
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_DIGEST, NULL, 0),
        OSSL_PARAM_int(OSSL_SIGNATURE_PARAM_PAD_MODE, NULL),
        OSSL_PARAM_int(OSSL_SIGNATURE_PARAM_PSS_SALTLEN, NULL),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_MGF1_DIGEST, NULL, 0),
        OSSL_PARAM_END,
    };
    return settable;
}

static int sign_init(void *context, void *key, const OSSL_PARAM params[])
{
    struct signature *signature = context;
    EVP_PKEY_CTX_free(signature->inner);
    signature->inner = EVP_PKEY_CTX_new_from_pkey(inside, ((struct key *)key)->pkey, NULL);
    return signature->inner != NULL && EVP_PKEY_sign_init(signature->inner) == 1 &&
           signature_set_params(context, params);
}

static int sign(void *context, unsigned char *to, size_t *size, size_t room, const unsigned char *digest,
                size_t digest_size)
{
    struct signature *signature = context;
    if (to == NULL)
        return EVP_PKEY_sign(signature->inner, NULL, size, digest, digest_size);
    pthread_mutex_lock(&lock);
    long fault = knobs[PAUSING_FAULT], how = knobs[PAUSING_WAKE], retries = knobs[PAUSING_RETRIES];
    pthread_mutex_unlock(&lock);
    if (fault == PAUSING_FAIL)
        return 0;
    if (fault == PAUSING_SHAM) {
        *size = 70;
        return 1;
    }
    if (fault == PAUSING_BLOCK)
        block();
    else if (fault != PAUSING_AT_ONCE)
        pause_until_answered(how, retries);
    *size = room;
    if (EVP_PKEY_sign(signature->inner, to, size, digest, digest_size) != 1)
        return 0;
    if (fault == PAUSING_WRONG)
        to[*size - 1] ^= 1;
    *size -= fault == PAUSING_CUT;
    pthread_mutex_lock(&lock);
    counts[PAUSING_SIGNED]++;
    pthread_mutex_unlock(&lock);
    return 1;
}

static const OSSL_DISPATCH signature_functions[] = {
    {OSSL_FUNC_SIGNATURE_NEWCTX, FUNCTION(signature_new)},
    {OSSL_FUNC_SIGNATURE_FREECTX, FUNCTION(signature_free)},
    {OSSL_FUNC_SIGNATURE_SIGN_INIT, FUNCTION(sign_init)},
    {OSSL_FUNC_SIGNATURE_SIGN, FUNCTION(sign)},
    {OSSL_FUNC_SIGNATURE_SET_CTX_PARAMS, FUNCTION(signature_set_params)},
    {OSSL_FUNC_SIGNATURE_SETTABLE_CTX_PARAMS, FUNCTION(signature_settable)},
    {0, NULL},
};

/* ---- keys ---- */

static void *key_new(void *provider)
{
    (void)provider;
    return calloc(1, sizeof(struct key));
}

static void key_free(void *key)
{
    EVP_PKEY_free(((struct key *)key)->pkey);
    free(key);
}

static int key_has(const void *key, int selection)
{
    (void)selection;
    return ((const struct key *)key)->pkey != NULL;
}

static int import_as(const char *type, struct key *key, const OSSL_PARAM params[])
{
    EVP_PKEY_CTX *ctx = EVP_PKEY_CTX_new_from_name(inside, type, NULL);
    OSSL_PARAM *given = (OSSL_PARAM *)(uintptr_t)params; /* EVP_PKEY_fromdata changes none */
    int imported = ctx != NULL && EVP_PKEY_fromdata_init(ctx) == 1 &&
                   EVP_PKEY_fromdata(ctx, &key->pkey, EVP_PKEY_KEYPAIR, given) == 1;
    EVP_PKEY_CTX_free(ctx);
    return imported;
}

static int rsa_import(void *key, int selection, const OSSL_PARAM params[])
{
    (void)selection;
    return import_as("RSA", key, params);
}

static int ec_import(void *key, int selection, const OSSL_PARAM params[])
{
    (void)selection;
    return import_as("EC", key, params);
}

/* What the default provider exports is what the inside, which is one as well, imports: names are enough. */
static const OSSL_PARAM *key_import_types(int selection)
{
    (void)selection;
    static const OSSL_PARAM types[] = {
        OSSL_PARAM_utf8_string(OSSL_PKEY_PARAM_GROUP_NAME, NULL, 0),
        OSSL_PARAM_octet_string(OSSL_PKEY_PARAM_PUB_KEY, NULL, 0),
        OSSL_PARAM_BN(OSSL_PKEY_PARAM_PRIV_KEY, NULL, 0),
        OSSL_PARAM_BN(OSSL_PKEY_PARAM_RSA_N, NULL, 0),
        OSSL_PARAM_BN(OSSL_PKEY_PARAM_RSA_E, NULL, 0),
        OSSL_PARAM_BN(OSSL_PKEY_PARAM_RSA_D, NULL, 0),
        OSSL_PARAM_END,
    };
    return types;
}

static const char *ec_operation(int operation)
{
    return operation == OSSL_OP_SIGNATURE ? "ECDSA" : NULL;
}

static const OSSL_DISPATCH rsa_functions[] = {
    {OSSL_FUNC_KEYMGMT_NEW, FUNCTION(key_new)},
    {OSSL_FUNC_KEYMGMT_FREE, FUNCTION(key_free)},
    {OSSL_FUNC_KEYMGMT_HAS, FUNCTION(key_has)},
    {OSSL_FUNC_KEYMGMT_IMPORT, FUNCTION(rsa_import)},
    {OSSL_FUNC_KEYMGMT_IMPORT_TYPES, FUNCTION(key_import_types)},
    {0, NULL},
};
static const OSSL_DISPATCH ec_functions[] = {
    {OSSL_FUNC_KEYMGMT_NEW, FUNCTION(key_new)},
    {OSSL_FUNC_KEYMGMT_FREE, FUNCTION(key_free)},
    {OSSL_FUNC_KEYMGMT_HAS, FUNCTION(key_has)},
    {OSSL_FUNC_KEYMGMT_IMPORT, FUNCTION(ec_import)},
    {OSSL_FUNC_KEYMGMT_IMPORT_TYPES, FUNCTION(key_import_types)},
    {OSSL_FUNC_KEYMGMT_QUERY_OPERATION_NAME, FUNCTION(ec_operation)},
    {0, NULL},
};

/* ---- the provider ---- */

static const OSSL_ALGORITHM *query(void *provider, int operation, int *no_store)
{
    static const char properties[] = "provider=keyreeve_pausing";
    static const OSSL_ALGORITHM keys[] = {
        {"RSA:rsaEncryption:1.2.840.113549.1.1.1", properties, rsa_functions, "test"},
        {"EC:id-ecPublicKey:1.2.840.10045.2.1", properties, ec_functions, "test"},
        {NULL, NULL, NULL, NULL},
    };
    static const OSSL_ALGORITHM signatures[] = {
        {"RSA:rsaEncryption:1.2.840.113549.1.1.1", properties, signature_functions, "test"},
        {"ECDSA", properties, signature_functions, "test"},
        {NULL, NULL, NULL, NULL},
    };
    (void)provider;
    *no_store = 0;
    return operation == OSSL_OP_KEYMGMT ? keys : operation == OSSL_OP_SIGNATURE ? signatures : NULL;
}

static void teardown(void *context)
{
    (void)context;
    pthread_mutex_lock(&lock);
    counts[PAUSING_UNLOADED]++;
    pthread_mutex_unlock(&lock);
}

static const OSSL_DISPATCH provider_functions[] = {
    {OSSL_FUNC_PROVIDER_QUERY_OPERATION, FUNCTION(query)},
    {OSSL_FUNC_PROVIDER_TEARDOWN, FUNCTION(teardown)},
    {0, NULL},
};

static void begin_card(void)
{
    static bool begun;
    pthread_t thread;
    if (knobs[PAUSING_BATCH] == 0)
        knobs[PAUSING_BATCH] = 1;
    if (begun || (inside = OSSL_LIB_CTX_new()) == NULL || pthread_create(&thread, NULL, card, NULL) != 0)
        return;
    pthread_detach(thread);
    begun = true;
}

EXPORT int OSSL_provider_init(const OSSL_CORE_HANDLE *handle, const OSSL_DISPATCH *in,
                              const OSSL_DISPATCH **out, void **context)
{
    (void)handle, (void)in;
    pthread_mutex_lock(&lock);
    while (knobs[PAUSING_REFUSE] == 2)
        pthread_cond_wait(&changed, &lock);
    bool refused = knobs[PAUSING_REFUSE] == 1;
    if (!refused)
        begin_card();
    pthread_mutex_unlock(&lock);
    *out = provider_functions;
    *context = &knobs;
    return !refused;
}
