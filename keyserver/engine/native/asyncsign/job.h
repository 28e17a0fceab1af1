/* One signature on its way: made by the caller, run by the helper, freed by whichever of them is the last to
 * need it. */
#ifndef KEYREEVE_ASYNC_JOB_H
#define KEYREEVE_ASYNC_JOB_H

#include <stdbool.h>

#include <pthread.h>

#include "engine.h"
#include "scheme.h"

/* What a caller waits with, on its stack. Guarded by the engine's lock. */
typedef struct {
    pthread_cond_t done;
    size_t left;
} keyreeve_call;

typedef enum { KEYREEVE_JOB_QUEUED, KEYREEVE_JOB_RUNNING, KEYREEVE_JOB_DONE } keyreeve_job_state;

/* `call`, `state` and `next` are guarded by the engine's lock. The rest is the helper's while the job runs,
 * and the caller's before and after. `call` is NULL once nobody waits. */
typedef struct keyreeve_job {
    struct keyreeve_job *next;
    keyreeve_call *call;
    keyreeve_job_state state;
    keyreeve_async_key *key;
    const keyreeve_scheme *scheme;
    keyreeve_async_status status;
    bool paused;
    unsigned char digest[KEYREEVE_DIGEST_MAX];
    size_t signature_size;
    unsigned char signature[KEYREEVE_ASYNC_SIGNATURE_MAX];
} keyreeve_job;

/* NULL, with `request->status` set, where there is nothing to run. */
keyreeve_job *keyreeve_job_make(OSSL_LIB_CTX *libctx, keyreeve_async_request *request);

/* Inside the ASYNC job: signs by `provider`, and nobody else. */
keyreeve_async_status keyreeve_job_sign(keyreeve_job *job, OSSL_LIB_CTX *libctx,
                                        const OSSL_PROVIDER *provider, const char *preference);

/* What the caller gets of a job that is done; signatures are checked here, in the caller's thread. */
void keyreeve_job_collect(const keyreeve_job *job, OSSL_LIB_CTX *libctx, keyreeve_async_request *request);

void keyreeve_job_free(keyreeve_job *job);

#endif
