/* The helper thread and what it shares with the callers: the inside of an engine. */
#ifndef KEYREEVE_ASYNC_HELPER_H
#define KEYREEVE_ASYNC_HELPER_H

#include <stdatomic.h>
#include <stdbool.h>

#include <pthread.h>

#include <openssl/async.h>
#include <openssl/provider.h>

#include "engine.h"
#include "job.h"

#define KEYREEVE_WHY_MAX 256
#define KEYREEVE_PREFERENCE_MAX 128

/* FREE: no job. PAUSED: until the provider says so. AGAIN: the provider's own queue is full, or it named
 * nothing to wait for: soon. LOST: OpenSSL could not resume it, so the provider may have it still; never used
 * again. */
typedef enum {
    KEYREEVE_SLOT_FREE,
    KEYREEVE_SLOT_PAUSED,
    KEYREEVE_SLOT_AGAIN,
    KEYREEVE_SLOT_LOST
} keyreeve_slot_state;

/* Slots live as long as their engine, so a provider that calls back late finds one. All but `woken` is the
 * helper's alone. */
typedef struct {
    keyreeve_async_engine *engine;
    keyreeve_slot_state state;
    keyreeve_job *job;
    ASYNC_JOB *async;
    ASYNC_WAIT_CTX *wait;
    size_t watched; /* descriptors of `wait` that epoll has */
    atomic_bool woken;
} keyreeve_slot;

struct keyreeve_async_engine {
    atomic_int holders;
    char *name;
    char *directory;
    char preference[KEYREEVE_PREFERENCE_MAX];
    OSSL_LIB_CTX *libctx;
    OSSL_PROVIDER *provider;
    OSSL_PROVIDER *defaults;
    int wake_fd;
    pthread_t helper;
    keyreeve_slot *slots;
    size_t slot_count;
    /* Guarded by `lock`: */
    pthread_mutex_t lock;
    pthread_cond_t changed; /* started, ended */
    keyreeve_job *queue;
    keyreeve_job **queue_end;
    keyreeve_async_load load;
    bool started;
    bool closing;
    bool ended;
    keyreeve_async_status start_status;
    char why[KEYREEVE_WHY_MAX];
};

bool keyreeve_slot_init(keyreeve_slot *slot, keyreeve_async_engine *engine);

/* From any thread: the helper looks at its queue and its slots. */
void keyreeve_engine_wake(keyreeve_async_engine *engine);

/* The thread's whole life; `argument` is an engine that it holds. */
void *keyreeve_helper_run(void *argument);

#endif
