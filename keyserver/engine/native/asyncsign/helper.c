#include "helper.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <openssl/err.h>

#define EVENTS 64
#define AGAIN_MS 1

void keyreeve_engine_wake(keyreeve_async_engine *engine)
{
    uint64_t one = 1;
    ssize_t written = write(engine->wake_fd, &one, sizeof(one)); /* EAGAIN: it is awake as it is */
    (void)written;
}

/* Called by the provider, in a thread of its own or inside the job. */
static int on_ready(void *argument)
{
    keyreeve_slot *slot = argument;
    if (!atomic_exchange(&slot->woken, true))
        keyreeve_engine_wake(slot->engine);
    return 1;
}

bool keyreeve_slot_init(keyreeve_slot *slot, keyreeve_async_engine *engine)
{
    slot->engine = engine;
    slot->state = KEYREEVE_SLOT_FREE;
    atomic_init(&slot->woken, false);
    slot->wait = ASYNC_WAIT_CTX_new();
    return slot->wait != NULL && ASYNC_WAIT_CTX_set_callback(slot->wait, on_ready, slot) == 1;
}

/* Descriptors that the provider added to or took from the slot's wait context since the job was last resumed.
 * Edge-triggered: each event is noted in `woken`, so none is lost, and one that nobody reads makes no loop.
 */
static bool watch_changes(keyreeve_slot *slot, int epoll)
{
    size_t added = 0, removed = 0;
    OSSL_ASYNC_FD *fds;
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = slot};
    if (ASYNC_WAIT_CTX_get_changed_fds(slot->wait, NULL, &added, NULL, &removed) != 1)
        return false;
    if (added + removed == 0)
        return true;
    if ((fds = calloc(added + removed, sizeof(*fds))) == NULL)
        return false;
    bool watched = ASYNC_WAIT_CTX_get_changed_fds(slot->wait, fds, &added, fds + added, &removed) == 1;
    for (size_t i = 0; watched && i < removed; i++) {
        (void)epoll_ctl(epoll, EPOLL_CTL_DEL, fds[added + i], NULL); /* closed already: gone already */
        slot->watched -= slot->watched > 0;
    }
    for (size_t i = 0; watched && i < added; i++) {
        watched = epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event) == 0 || errno == EEXIST;
        slot->watched += watched;
    }
    free(fds);
    return watched;
}

static int sign_in_job(void *argument)
{
    keyreeve_slot *slot = *(keyreeve_slot **)argument;
    keyreeve_async_engine *engine = slot->engine;
    slot->job->status = keyreeve_job_sign(slot->job, engine->libctx, engine->provider, engine->preference);
    return 1;
}

static void deliver(keyreeve_async_engine *engine, keyreeve_job *job)
{
    bool orphan = false;
    pthread_mutex_lock(&engine->lock);
    if (job->state == KEYREEVE_JOB_RUNNING)
        engine->load.running--;
    if (job->call == NULL) {
        orphan = true;
        engine->load.hanging -= job->state == KEYREEVE_JOB_RUNNING;
    } else if (--job->call->left == 0) {
        pthread_cond_signal(&job->call->done);
    }
    job->state = KEYREEVE_JOB_DONE;
    pthread_mutex_unlock(&engine->lock);
    if (orphan)
        keyreeve_job_free(job);
}

/* Where a paused job goes. A provider that knows callbacks sets a status, one that does not has its
 * descriptors. */
static keyreeve_slot_state paused(keyreeve_slot *slot, bool watched)
{
    int status = ASYNC_WAIT_CTX_get_status(slot->wait);
    if (!watched || status == ASYNC_STATUS_EAGAIN)
        return KEYREEVE_SLOT_AGAIN;
    return slot->watched > 0 || status == ASYNC_STATUS_OK ? KEYREEVE_SLOT_PAUSED : KEYREEVE_SLOT_AGAIN;
}

/* Begins or resumes the slot's job, until it pauses or ends. */
static void step(keyreeve_slot *slot, int epoll)
{
    int result = 0;
    atomic_store(&slot->woken, false); /* before the job runs: a call back while it runs counts */
    ASYNC_WAIT_CTX_set_status(slot->wait, ASYNC_STATUS_UNSUPPORTED);
    int how = ASYNC_start_job(&slot->async, slot->wait, &result, sign_in_job, &slot, sizeof(slot));
    if (how == ASYNC_PAUSE) {
        slot->job->paused = true;
        slot->state = paused(slot, watch_changes(slot, epoll));
        return;
    }
    if (how == ASYNC_ERR && slot->async != NULL) {
        slot->state = KEYREEVE_SLOT_LOST;
        return;
    }
    (void)watch_changes(slot, epoll);
    ERR_clear_error();
    keyreeve_job *job = slot->job;
    slot->job = NULL;
    slot->async = NULL;
    slot->state = KEYREEVE_SLOT_FREE;
    deliver(slot->engine, job);
}

static void resume_woken(keyreeve_async_engine *engine, int epoll)
{
    for (size_t i = 0; i < engine->slot_count; i++) {
        keyreeve_slot *slot = &engine->slots[i];
        bool ready = slot->state == KEYREEVE_SLOT_PAUSED && atomic_load(&slot->woken);
        if (ready || slot->state == KEYREEVE_SLOT_AGAIN)
            step(slot, epoll);
    }
}

/* The next job that somebody waits for; those that nobody does, or that come too late for a closing engine,
 * go back here. */
static keyreeve_job *next_job(keyreeve_async_engine *engine)
{
    for (;;) {
        pthread_mutex_lock(&engine->lock);
        keyreeve_job *job = engine->queue;
        bool closing = engine->closing, wanted = false;
        if (job != NULL) {
            engine->queue = job->next;
            if (engine->queue == NULL)
                engine->queue_end = &engine->queue;
            engine->load.waiting--;
            wanted = job->call != NULL && !closing;
        }
        if (wanted) {
            job->state = KEYREEVE_JOB_RUNNING;
            engine->load.running++;
            if (engine->load.running > engine->load.most_running)
                engine->load.most_running = engine->load.running;
        }
        pthread_mutex_unlock(&engine->lock);
        if (job == NULL || wanted)
            return job;
        job->status = KEYREEVE_ASYNC_CLOSED;
        deliver(engine, job);
    }
}

static void begin_waiting(keyreeve_async_engine *engine, int epoll)
{
    for (size_t i = 0; i < engine->slot_count; i++) {
        keyreeve_slot *slot = &engine->slots[i];
        while (slot->state == KEYREEVE_SLOT_FREE) {
            if ((slot->job = next_job(engine)) == NULL)
                return;
            step(slot, epoll);
        }
    }
}

/* Milliseconds until there is something to do without an event: 0 now, -1 never. */
static int patience(keyreeve_async_engine *engine)
{
    int wait_ms = -1;
    for (size_t i = 0; i < engine->slot_count; i++) {
        if (engine->slots[i].state == KEYREEVE_SLOT_PAUSED && atomic_load(&engine->slots[i].woken))
            return 0;
        if (engine->slots[i].state == KEYREEVE_SLOT_AGAIN)
            wait_ms = AGAIN_MS;
    }
    return wait_ms;
}

static void await_events(keyreeve_async_engine *engine, int epoll)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(epoll, events, EVENTS, patience(engine));
    for (int i = 0; i < count; i++) {
        uint64_t times;
        keyreeve_slot *slot = events[i].data.ptr;
        if (slot != NULL)
            atomic_store(&slot->woken, true);
        else if (read(engine->wake_fd, &times, sizeof(times)) < 0)
            continue;
    }
}

static bool has_ended(keyreeve_async_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    bool over = engine->closing && engine->load.running == 0 && engine->queue == NULL;
    pthread_mutex_unlock(&engine->lock);
    return over;
}

static void serve(keyreeve_async_engine *engine, int epoll)
{
    while (!has_ended(engine)) {
        resume_woken(engine, epoll);
        begin_waiting(engine, epoll); /* after it, for the slots that it made free */
        await_events(engine, epoll);
    }
}

static void say_why(char *why, const char *what)
{
    const char *data = "", *reason = NULL;
    int flags = 0;
    unsigned long code = ERR_peek_last_error_all(NULL, NULL, NULL, &data, &flags);
    if (code != 0)
        reason = ERR_reason_error_string(code);
    if ((flags & ERR_TXT_STRING) == 0 || data == NULL)
        data = "";
    snprintf(why, KEYREEVE_WHY_MAX, "%s%s%s%s%s", what, reason ? ": " : "", reason ? reason : "",
             *data ? ": " : "", data);
}

static keyreeve_async_status load_providers(keyreeve_async_engine *engine, char *why)
{
    if (engine->directory != NULL &&
        OSSL_PROVIDER_set_default_search_path(engine->libctx, engine->directory) != 1)
        return KEYREEVE_ASYNC_NO_MEMORY;
    if ((engine->defaults = OSSL_PROVIDER_load(engine->libctx, "default")) == NULL) {
        say_why(why, "OpenSSL's default provider does not load");
        return KEYREEVE_ASYNC_NO_PROVIDER;
    }
    if ((engine->provider = OSSL_PROVIDER_load(engine->libctx, engine->name)) == NULL) {
        say_why(why, "the provider does not load");
        return KEYREEVE_ASYNC_NO_PROVIDER;
    }
    return KEYREEVE_ASYNC_OK;
}

/* Loads the provider here and not in the caller's thread, which may then give up on one that hangs. */
static keyreeve_async_status start(keyreeve_async_engine *engine, int epoll, char *why)
{
    struct epoll_event woken = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, engine->wake_fd, &woken) != 0)
        return KEYREEVE_ASYNC_NO_MEMORY;
    if (ASYNC_is_capable() != 1 || ASYNC_init_thread(engine->slot_count, 0) != 1) {
        snprintf(why, KEYREEVE_WHY_MAX, "this libcrypto has no ASYNC jobs");
        return KEYREEVE_ASYNC_NO_PROVIDER;
    }
    return load_providers(engine, why);
}

void *keyreeve_helper_run(void *argument)
{
    keyreeve_async_engine *engine = argument;
    char why[KEYREEVE_WHY_MAX] = "";
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    keyreeve_async_status status = start(engine, epoll, why);
    pthread_mutex_lock(&engine->lock);
    engine->queue_end = &engine->queue;
    engine->started = true;
    engine->start_status = status;
    memcpy(engine->why, why, sizeof(why));
    pthread_cond_broadcast(&engine->changed);
    pthread_mutex_unlock(&engine->lock);
    if (status == KEYREEVE_ASYNC_OK)
        serve(engine, epoll);
    ASYNC_cleanup_thread();
    if (epoll >= 0)
        close(epoll);
    ERR_clear_error();
    pthread_mutex_lock(&engine->lock);
    engine->ended = true;
    pthread_cond_broadcast(&engine->changed);
    pthread_mutex_unlock(&engine->lock);
    keyreeve_async_engine_release(engine);
    return NULL;
}
