#include "async.h"

#include <errno.h>
#include <limits.h>
#include <openssl/async.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MS_PER_S 1000
#define NS_PER_MS 1000000

/* One per wait context, thus per connection of the application. It hands out one descriptor for its whole
 * life: an epoll set that holds the socket of the moment and a timer. Applications keep such descriptors in
 * event loops of their own (HAProxy until it frees the connection, Tengine until its next loop), so it is
 * neither closed nor replaced before they free the wait context. */
typedef struct {
    pid_t pid;
    int epoll_fd;
    int timer_fd;
    int seen; /* the application was handed the descriptor: a job of this context was paused */
    keyreeve_abandon *abandon;
    void *abandon_arg;
} wait_state;

/* Its address is the key of our entry in a wait context. */
static const char WAIT_KEY = 'k';

int64_t keyreeve_now_ms(void)
{
    struct timespec now;

    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * MS_PER_S + now.tv_nsec / NS_PER_MS;
}

static keyreeve_wait_result wait_blocking(int fd, short events, int64_t until_ms)
{
    struct pollfd wanted = {fd, events, 0};

    for (;;) {
        int64_t left = until_ms - keyreeve_now_ms();
        int ready = poll(&wanted, fd >= 0 ? 1 : 0, left < 0 ? 0 : left > INT_MAX ? INT_MAX : (int)left);

        if (ready > 0)
            return KEYREEVE_WAIT_READY;
        if (ready < 0 && errno != EINTR)
            return KEYREEVE_WAIT_FAILED;
        if (keyreeve_now_ms() >= until_ms)
            return KEYREEVE_WAIT_TIMEOUT;
    }
}

static void wait_state_free(wait_state *state)
{
    if (state == NULL)
        return;
    if (state->timer_fd >= 0)
        (void)close(state->timer_fd);
    if (state->epoll_fd >= 0)
        (void)close(state->epoll_fd);
    free(state);
}

/* ASYNC_WAIT_CTX_free calls this. */
static void wait_state_cleanup(ASYNC_WAIT_CTX *wait_ctx, const void *key, OSSL_ASYNC_FD fd, void *custom)
{
    wait_state *state = custom;

    (void)wait_ctx;
    (void)key;
    (void)fd;
    if (state->abandon != NULL)
        state->abandon(state->abandon_arg);
    wait_state_free(state);
}

static wait_state *wait_state_new(ASYNC_WAIT_CTX *wait_ctx)
{
    wait_state *state = calloc(1, sizeof(*state));
    struct epoll_event event;

    if (state == NULL)
        return NULL;
    state->pid = getpid();
    state->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    state->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    memset(&event, 0, sizeof(event));
    event.events = EPOLLIN;
    event.data.fd = state->timer_fd;
    if (state->epoll_fd < 0 || state->timer_fd < 0 ||
        epoll_ctl(state->epoll_fd, EPOLL_CTL_ADD, state->timer_fd, &event) != 0 ||
        !ASYNC_WAIT_CTX_set_wait_fd(wait_ctx, &WAIT_KEY, state->epoll_fd, state, wait_state_cleanup)) {
        wait_state_free(state);
        return NULL;
    }
    return state;
}

/* The state of the running job's wait context, or NULL where pausing would not do: no job, an application
 * that wants a callback (only a thread of ours could call it, and there is none), or a state inherited
 * through fork. */
static wait_state *wait_state_of_job(void)
{
    ASYNC_JOB *job = ASYNC_get_current_job();
    ASYNC_WAIT_CTX *wait_ctx;
    ASYNC_callback_fn callback = NULL;
    void *callback_arg = NULL;
    OSSL_ASYNC_FD fd;
    void *custom = NULL;

    if (job == NULL || (wait_ctx = ASYNC_get_wait_ctx(job)) == NULL)
        return NULL;
    if (ASYNC_WAIT_CTX_get_callback(wait_ctx, &callback, &callback_arg) && callback != NULL)
        return NULL;
    if (ASYNC_WAIT_CTX_get_fd(wait_ctx, &WAIT_KEY, &fd, &custom)) {
        wait_state *state = custom;

        return state->pid == getpid() ? state : NULL;
    }
    return wait_state_new(wait_ctx);
}

static int timer_set(const wait_state *state, int64_t at_ms)
{
    struct itimerspec when;

    memset(&when, 0, sizeof(when));
    if (at_ms > 0) {
        when.it_value.tv_sec = (time_t)(at_ms / MS_PER_S);
        when.it_value.tv_nsec = (long)(at_ms % MS_PER_S) * NS_PER_MS;
    }
    return timerfd_settime(state->timer_fd, TFD_TIMER_ABSTIME, &when, NULL) == 0;
}

/* Asks the kernel, not the resumption: a job may be resumed for reasons that are not ours. The first wait of
 * a context pauses even where the descriptor is ready by now: HAProxy learns of our descriptor by the pause,
 * and 2.6 aborts itself when it closes a connection that has one which it never saw. */
static keyreeve_wait_result wait_paused(wait_state *state, int fd, short events, int64_t until_ms)
{
    struct pollfd wanted = {fd, events, 0};

    for (;;) {
        int ready = state->seen && fd >= 0 ? poll(&wanted, 1, 0) : 0;

        if (ready > 0)
            return KEYREEVE_WAIT_READY;
        if (ready < 0 && errno != EINTR)
            return KEYREEVE_WAIT_FAILED;
        if (state->seen && keyreeve_now_ms() >= until_ms)
            return KEYREEVE_WAIT_TIMEOUT;
        state->seen = 1;
        if (!ASYNC_pause_job() || state->pid != getpid())
            return KEYREEVE_WAIT_FAILED;
    }
}

keyreeve_wait_result keyreeve_wait(int fd, short events, int64_t until_ms, keyreeve_abandon *abandon,
                                   void *arg)
{
    wait_state *state = wait_state_of_job();
    struct epoll_event event;
    keyreeve_wait_result result;

    if (state == NULL)
        return wait_blocking(fd, events, until_ms);
    memset(&event, 0, sizeof(event));
    event.events = (events & POLLIN ? (uint32_t)EPOLLIN : 0) | (events & POLLOUT ? (uint32_t)EPOLLOUT : 0);
    event.data.fd = fd;
    if (!timer_set(state, until_ms) ||
        (fd >= 0 && epoll_ctl(state->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)) {
        (void)timer_set(state, 0);
        return wait_blocking(fd, events, until_ms);
    }
    state->abandon = abandon;
    state->abandon_arg = arg;
    result = wait_paused(state, fd, events, until_ms);
    if (state->pid == getpid()) {
        /* Nothing is left in the set that could wake the application again. */
        if (fd >= 0)
            (void)epoll_ctl(state->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
        (void)timer_set(state, 0);
        state->abandon = NULL;
    }
    return result;
}
