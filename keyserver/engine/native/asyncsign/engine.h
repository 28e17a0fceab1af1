/* Signs through an OpenSSL provider that works in ASYNC jobs: Intel's qatprovider, which sends each signature
 * to a card and pauses its job until the card answers. One helper thread starts and resumes all jobs, since a
 * job resumes only in the thread that began it; callers hand requests over and wait, as long as they are
 * ready to.
 *
 * Always true: what a provider may still write to is never freed or reused before its job has ended, whoever
 * gave up meanwhile. A job is resumed only when the provider asked for it. An RSA signature is released only
 * after OpenSSL's own code has verified it. */
#ifndef KEYREEVE_ASYNC_ENGINE_H
#define KEYREEVE_ASYNC_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "key.h"
#include "status.h"

#define KEYREEVE_ASYNC_SIGNATURE_MAX 512 /* RSA-4096; an ECDSA signature is shorter */
#define KEYREEVE_ASYNC_JOBS_MAX 256
#define KEYREEVE_ASYNC_QUEUE_MAX 4096

typedef struct keyreeve_async_engine keyreeve_async_engine;

typedef struct {
    keyreeve_async_key *key;
    const unsigned char *message;
    size_t message_size;
    uint16_t scheme;
    bool prehashed; /* `message` is the digest */
    keyreeve_async_status status;
    bool paused; /* it was with the card: a provider that signs by itself never pauses its job */
    size_t signature_size;
    unsigned char signature[KEYREEVE_ASYNC_SIGNATURE_MAX];
} keyreeve_async_request;

/* What goes on in it now. `hanging` are those of `running` that nobody waits for any more. */
typedef struct {
    size_t running;
    size_t waiting;
    size_t hanging;
    size_t most_running;
} keyreeve_async_load;

/* Loads `provider` from `directory` (NULL: where OpenSSL looks) and starts the helper. One that is not loaded
 * after `timeout_ns` is left to itself. `why` gets a reason that is safe to show. */
keyreeve_async_status keyreeve_async_engine_open(const char *provider, const char *directory, size_t jobs,
                                                 uint64_t timeout_ns, keyreeve_async_engine **engine,
                                                 char *why, size_t why_size);

keyreeve_async_status keyreeve_async_engine_load(keyreeve_async_engine *engine, const unsigned char *pkcs8,
                                                 size_t size, keyreeve_async_key **key);

/* Sets status, and signature where it is OK, of each request; back after `timeout_ns` at the latest. From any
 * thread. */
void keyreeve_async_engine_sign(keyreeve_async_engine *engine, keyreeve_async_request *requests, size_t count,
                                uint64_t timeout_ns);

keyreeve_async_load keyreeve_async_engine_load_now(keyreeve_async_engine *engine);

/* Takes no more work, gives jobs that run `timeout_ns` to end. False where some did not: then helper,
 * provider and what they use stay until the process ends. */
bool keyreeve_async_engine_close(keyreeve_async_engine *engine, uint64_t timeout_ns);

/* A key holds its engine: */
void keyreeve_async_engine_hold(keyreeve_async_engine *engine);
void keyreeve_async_engine_release(keyreeve_async_engine *engine);

#endif
