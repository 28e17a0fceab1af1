#include "engine.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <openssl/crypto.h>
#include <openssl/err.h>

#include "helper.h"

#define NANOSECONDS 1000000000ULL

static struct timespec deadline_after(uint64_t timeout_ns)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t nanoseconds = (uint64_t)now.tv_nsec + timeout_ns % NANOSECONDS;
    now.tv_sec += (time_t)(timeout_ns / NANOSECONDS + nanoseconds / NANOSECONDS);
    now.tv_nsec = (long)(nanoseconds % NANOSECONDS);
    return now;
}

static bool init_condition(pthread_cond_t *condition)
{
    pthread_condattr_t attributes;
    if (pthread_condattr_init(&attributes) != 0)
        return false;
    bool made = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC) == 0 &&
                pthread_cond_init(condition, &attributes) == 0;
    pthread_condattr_destroy(&attributes);
    return made;
}

/* Waits for `*reached` under the engine's lock; false when the time is over. */
static bool await(keyreeve_async_engine *engine, pthread_cond_t *condition, const bool *reached,
                  uint64_t timeout_ns)
{
    struct timespec deadline = deadline_after(timeout_ns);
    while (!*reached)
        if (pthread_cond_timedwait(condition, &engine->lock, &deadline) == ETIMEDOUT)
            return *reached;
    return true;
}

static void engine_free(keyreeve_async_engine *engine)
{
    for (size_t i = 0; i < engine->slot_count; i++)
        ASYNC_WAIT_CTX_free(engine->slots[i].wait);
    free(engine->slots);
    if (engine->wake_fd >= 0)
        close(engine->wake_fd);
    if (engine->provider != NULL)
        OSSL_PROVIDER_unload(engine->provider);
    if (engine->defaults != NULL)
        OSSL_PROVIDER_unload(engine->defaults);
    OSSL_LIB_CTX_free(engine->libctx);
    pthread_cond_destroy(&engine->changed);
    pthread_mutex_destroy(&engine->lock);
    free(engine->name);
    free(engine->directory);
    free(engine);
}

void keyreeve_async_engine_hold(keyreeve_async_engine *engine)
{
    atomic_fetch_add(&engine->holders, 1);
}

void keyreeve_async_engine_release(keyreeve_async_engine *engine)
{
    if (engine != NULL && atomic_fetch_sub(&engine->holders, 1) == 1)
        engine_free(engine);
}

static keyreeve_async_engine *engine_new(const char *provider, const char *directory, size_t jobs)
{
    keyreeve_async_engine *engine = calloc(1, sizeof(*engine));
    if (engine == NULL)
        return NULL;
    engine->wake_fd = -1;
    atomic_init(&engine->holders, 1);
    if (pthread_mutex_init(&engine->lock, NULL) != 0) {
        free(engine);
        return NULL;
    }
    if (!init_condition(&engine->changed)) {
        pthread_mutex_destroy(&engine->lock);
        free(engine);
        return NULL;
    }
    engine->name = strdup(provider);
    engine->directory = directory == NULL ? NULL : strdup(directory);
    engine->slots = calloc(jobs, sizeof(*engine->slots));
    engine->slot_count = engine->slots == NULL ? 0 : jobs;
    engine->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    engine->libctx = OSSL_LIB_CTX_new();
    bool complete = engine->name != NULL && (directory == NULL || engine->directory != NULL) &&
                    engine->slots != NULL && engine->wake_fd >= 0 && engine->libctx != NULL;
    int length = snprintf(engine->preference, sizeof(engine->preference), "?provider=%s", provider);
    complete = complete && length > 0 && (size_t)length < sizeof(engine->preference);
    for (size_t i = 0; complete && i < jobs; i++)
        complete = keyreeve_slot_init(&engine->slots[i], engine);
    if (complete)
        return engine;
    engine_free(engine);
    return NULL;
}

/* The helper has signals of nobody: a handler belongs to the thread that runs Python. */
static int start_thread(keyreeve_async_engine *engine)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    keyreeve_async_engine_hold(engine);
    int failed = pthread_create(&engine->helper, NULL, keyreeve_helper_run, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        keyreeve_async_engine_release(engine);
    return failed;
}

keyreeve_async_status keyreeve_async_engine_open(const char *provider, const char *directory, size_t jobs,
                                                 uint64_t timeout_ns, keyreeve_async_engine **opened,
                                                 char *why, size_t why_size)
{
    *opened = NULL;
    snprintf(why, why_size, "no memory");
    if (jobs < 1 || jobs > KEYREEVE_ASYNC_JOBS_MAX)
        return KEYREEVE_ASYNC_BAD_REQUEST;
    keyreeve_async_engine *engine = engine_new(provider, directory, jobs);
    if (engine == NULL)
        return KEYREEVE_ASYNC_NO_MEMORY;
    if (start_thread(engine) != 0) {
        keyreeve_async_engine_release(engine);
        return KEYREEVE_ASYNC_NO_MEMORY;
    }
    pthread_mutex_lock(&engine->lock);
    bool came = await(engine, &engine->changed, &engine->started, timeout_ns);
    keyreeve_async_status status = came ? engine->start_status : KEYREEVE_ASYNC_NO_PROVIDER;
    snprintf(why, why_size, "%s", came ? engine->why : "the provider did not load in time");
    engine->closing = status != KEYREEVE_ASYNC_OK;
    pthread_mutex_unlock(&engine->lock);
    if (status == KEYREEVE_ASYNC_OK) {
        *opened = engine;
        return status;
    }
    if (came)
        pthread_join(engine->helper, NULL);
    else
        pthread_detach(engine->helper);
    keyreeve_async_engine_release(engine);
    return status;
}

keyreeve_async_status keyreeve_async_engine_load(keyreeve_async_engine *engine, const unsigned char *pkcs8,
                                                 size_t size, keyreeve_async_key **key)
{
    return keyreeve_async_key_load(engine->libctx, engine->provider, engine->preference, pkcs8, size, key);
}

/* Hands the jobs over, in their order; those that are not taken stay with the caller, their requests say why.
 */
static size_t submit(keyreeve_async_engine *engine, keyreeve_async_request *requests, keyreeve_job **jobs,
                     size_t count, keyreeve_call *call)
{
    size_t taken = 0;
    for (size_t i = 0; i < count; i++) {
        if (jobs[i] == NULL)
            continue;
        bool busy =
            engine->load.waiting >= KEYREEVE_ASYNC_QUEUE_MAX || engine->load.hanging >= engine->slot_count;
        if (engine->closing || busy) {
            requests[i].status = engine->closing ? KEYREEVE_ASYNC_CLOSED : KEYREEVE_ASYNC_BUSY;
            keyreeve_job_free(jobs[i]);
            jobs[i] = NULL;
            continue;
        }
        jobs[i]->call = call;
        *engine->queue_end = jobs[i];
        engine->queue_end = &jobs[i]->next;
        engine->load.waiting++;
        taken++;
    }
    call->left = taken;
    return taken;
}

/* What is not done stays with the helper, which frees it once the provider has let it go. */
static void give_up(keyreeve_async_engine *engine, keyreeve_async_request *requests, keyreeve_job **jobs,
                    size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (jobs[i] == NULL || jobs[i]->state == KEYREEVE_JOB_DONE)
            continue;
        if (jobs[i]->state == KEYREEVE_JOB_RUNNING)
            engine->load.hanging++;
        jobs[i]->call = NULL;
        jobs[i] = NULL;
        requests[i].status = KEYREEVE_ASYNC_LATE;
    }
}

static void sign_batch(keyreeve_async_engine *engine, keyreeve_async_request *requests, keyreeve_job **jobs,
                       size_t count, uint64_t timeout_ns)
{
    keyreeve_call call = {.left = 0};
    struct timespec deadline = deadline_after(timeout_ns);
    if (!init_condition(&call.done)) {
        for (size_t i = 0; i < count; i++)
            requests[i].status = KEYREEVE_ASYNC_NO_MEMORY;
        return;
    }
    for (size_t i = 0; i < count; i++)
        jobs[i] = keyreeve_job_make(engine->libctx, &requests[i]);
    pthread_mutex_lock(&engine->lock);
    if (submit(engine, requests, jobs, count, &call) > 0)
        keyreeve_engine_wake(engine);
    while (call.left > 0)
        if (pthread_cond_timedwait(&call.done, &engine->lock, &deadline) == ETIMEDOUT)
            break;
    give_up(engine, requests, jobs, count);
    pthread_mutex_unlock(&engine->lock);
    for (size_t i = 0; i < count; i++) {
        if (jobs[i] == NULL)
            continue;
        keyreeve_job_collect(jobs[i], engine->libctx, &requests[i]);
        keyreeve_job_free(jobs[i]);
    }
    pthread_cond_destroy(&call.done);
}

void keyreeve_async_engine_sign(keyreeve_async_engine *engine, keyreeve_async_request *requests, size_t count,
                                uint64_t timeout_ns)
{
    if (count == 0)
        return;
    keyreeve_job **jobs = calloc(count, sizeof(*jobs));
    if (jobs == NULL) {
        for (size_t i = 0; i < count; i++)
            requests[i].status = KEYREEVE_ASYNC_NO_MEMORY;
        return;
    }
    keyreeve_async_engine_hold(engine);
    sign_batch(engine, requests, jobs, count, timeout_ns);
    free(jobs);
    keyreeve_async_engine_release(engine);
}

keyreeve_async_load keyreeve_async_engine_load_now(keyreeve_async_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    keyreeve_async_load load = engine->load;
    pthread_mutex_unlock(&engine->lock);
    return load;
}

bool keyreeve_async_engine_close(keyreeve_async_engine *engine, uint64_t timeout_ns)
{
    pthread_mutex_lock(&engine->lock);
    bool first = !engine->closing;
    engine->closing = true;
    keyreeve_engine_wake(engine);
    bool ended = await(engine, &engine->changed, &engine->ended, timeout_ns);
    pthread_mutex_unlock(&engine->lock);
    if (first && ended)
        pthread_join(engine->helper, NULL);
    else if (first)
        pthread_detach(engine->helper);
    return ended;
}
