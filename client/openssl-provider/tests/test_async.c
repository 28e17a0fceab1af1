/* Waiting inside ASYNC jobs: jobs overlap on one thread, resumptions for other reasons are tolerated, the
 * deadline wakes the application, and an abandoned job releases what it held. */
#include <openssl/async.h>
#include <openssl/crypto.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "async.h"
#include "support.h"

#define SPURIOUS_RESUMPTIONS 5
#define PATIENCE_MS 5000

typedef struct {
    int fd;
    int64_t until_ms;
    int *abandoned;
} wait_job;

typedef struct {
    ASYNC_JOB *job;
    ASYNC_WAIT_CTX *wait_ctx;
    wait_job argument;
    int result;
    int far_end;
} started;

static void abandon(void *arg)
{
    ++*(int *)arg;
}

static int run(void *argument)
{
    const wait_job *job = argument;

    return (int)keyreeve_wait(job->fd, POLLIN, job->until_ms, abandon, job->abandoned);
}

static int resume(started *one)
{
    return ASYNC_start_job(&one->job, one->wait_ctx, &one->result, run, &one->argument,
                           sizeof(one->argument));
}

static void start(started *one, int64_t timeout_ms, int *abandoned)
{
    int pair[2];

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    memset(one, 0, sizeof(*one));
    one->wait_ctx = ASYNC_WAIT_CTX_new();
    one->argument.fd = pair[0];
    one->argument.until_ms = keyreeve_now_ms() + timeout_ms;
    one->argument.abandoned = abandoned;
    one->far_end = pair[1];
    CHECK(one->wait_ctx != NULL && resume(one) == ASYNC_PAUSE);
}

static OSSL_ASYNC_FD wait_fd(const started *one)
{
    OSSL_ASYNC_FD fd = -1;
    size_t count = 0;

    CHECK(ASYNC_WAIT_CTX_get_all_fds(one->wait_ctx, NULL, &count) && count == 1);
    CHECK(ASYNC_WAIT_CTX_get_all_fds(one->wait_ctx, &fd, &count));
    return fd;
}

static int is_readable(int fd, int timeout_ms)
{
    struct pollfd wanted = {fd, POLLIN, 0};

    return poll(&wanted, 1, timeout_ms) == 1;
}

static void finish(started *one)
{
    ASYNC_WAIT_CTX_free(one->wait_ctx);
    (void)close(one->argument.fd);
    (void)close(one->far_end);
}

static void test_jobs_overlap_and_tolerate_spurious_resumptions(void)
{
    started first, second;
    int abandoned = 0;
    int i;

    start(&first, PATIENCE_MS, &abandoned);
    start(&second, PATIENCE_MS, &abandoned);
    CHECK(wait_fd(&first) != wait_fd(&second));
    for (i = 0; i < SPURIOUS_RESUMPTIONS; i++) {
        CHECK(!is_readable(wait_fd(&first), 0) && !is_readable(wait_fd(&second), 0));
        CHECK(resume(&first) == ASYNC_PAUSE && resume(&second) == ASYNC_PAUSE);
    }
    /* The second is answered first. */
    CHECK(write(second.far_end, "x", 1) == 1);
    CHECK(is_readable(wait_fd(&second), PATIENCE_MS) && !is_readable(wait_fd(&first), 0));
    CHECK(resume(&second) == ASYNC_FINISH && second.result == KEYREEVE_WAIT_READY);
    /* Unread bytes do not wake the application once nobody waits for them. */
    CHECK(!is_readable(wait_fd(&second), 0));
    CHECK(write(first.far_end, "x", 1) == 1);
    CHECK(is_readable(wait_fd(&first), PATIENCE_MS));
    CHECK(resume(&first) == ASYNC_FINISH && first.result == KEYREEVE_WAIT_READY);
    finish(&first);
    finish(&second);
    CHECK(abandoned == 0);
}

static void test_the_wait_context_keeps_one_descriptor(void)
{
    started one;
    int abandoned = 0;
    OSSL_ASYNC_FD before;

    start(&one, PATIENCE_MS, &abandoned);
    before = wait_fd(&one);
    CHECK(write(one.far_end, "x", 1) == 1);
    CHECK(resume(&one) == ASYNC_FINISH);
    CHECK(recv(one.argument.fd, &one.result, 1, 0) == 1);
    one.job = NULL;
    CHECK(resume(&one) == ASYNC_PAUSE);
    CHECK(wait_fd(&one) == before);
    CHECK(write(one.far_end, "x", 1) == 1);
    CHECK(resume(&one) == ASYNC_FINISH && one.result == KEYREEVE_WAIT_READY);
    finish(&one);
}

/* HAProxy learns of the descriptor by the pause, and aborts itself when it closes a connection that has one
 * which it never saw. */
static void test_the_first_wait_pauses_though_the_answer_is_there(void)
{
    int timeouts_ms[] = {PATIENCE_MS, 0}; /* so does one whose time is up already */
    size_t i;

    for (i = 0; i < sizeof(timeouts_ms) / sizeof(timeouts_ms[0]); i++) {
        started one;
        int abandoned = 0;
        int pair[2];

        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
        CHECK(write(pair[1], "x", 1) == 1);
        memset(&one, 0, sizeof(one));
        one.wait_ctx = ASYNC_WAIT_CTX_new();
        one.argument.fd = pair[0];
        one.argument.until_ms = keyreeve_now_ms() + timeouts_ms[i];
        one.argument.abandoned = &abandoned;
        one.far_end = pair[1];
        CHECK(one.wait_ctx != NULL && resume(&one) == ASYNC_PAUSE);
        CHECK(is_readable(wait_fd(&one), PATIENCE_MS));
        CHECK(resume(&one) == ASYNC_FINISH && one.result == KEYREEVE_WAIT_READY);
        /* From then on it is known: a second wait of the same connection does not pause for nothing. */
        one.job = NULL;
        CHECK(resume(&one) == ASYNC_FINISH && one.result == KEYREEVE_WAIT_READY);
        finish(&one);
    }
}

static void test_the_deadline_wakes_the_application(void)
{
    started one;
    int abandoned = 0;

    start(&one, 100, &abandoned);
    CHECK(is_readable(wait_fd(&one), PATIENCE_MS));
    CHECK(resume(&one) == ASYNC_FINISH && one.result == KEYREEVE_WAIT_TIMEOUT);
    CHECK(!is_readable(wait_fd(&one), 0));
    finish(&one);
}

/* Last: libcrypto never takes an abandoned job back. */
static void test_an_abandoned_job_releases_what_it_held(void)
{
    static started one;
    static int abandoned = 0;

    start(&one, PATIENCE_MS, &abandoned);
    finish(&one);
    CHECK(abandoned == 1);
}

static void test_without_a_job_the_thread_blocks(void)
{
    wait_job job = {-1, 0, NULL};
    int pair[2];

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    job.fd = pair[0];
    job.until_ms = keyreeve_now_ms() + 50;
    CHECK(run(&job) == KEYREEVE_WAIT_TIMEOUT && keyreeve_now_ms() >= job.until_ms);
    CHECK(write(pair[1], "x", 1) == 1);
    CHECK(run(&job) == KEYREEVE_WAIT_READY);
    (void)close(pair[0]);
    (void)close(pair[1]);
}

int main(void)
{
    CHECK(ASYNC_is_capable());
    test_jobs_overlap_and_tolerate_spurious_resumptions();
    test_the_wait_context_keeps_one_descriptor();
    test_the_first_wait_pauses_though_the_answer_is_there();
    test_the_deadline_wakes_the_application();
    test_without_a_job_the_thread_blocks();
    test_an_abandoned_job_releases_what_it_held();
    puts("async: ok");
    return 0;
}
