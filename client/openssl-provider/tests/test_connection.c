/* Connections, against an agent that is a thread of this process: reuse, fork, deadline, and every way to
 * misbehave. */
#include <errno.h>
#include <openssl/async.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "async.h"
#include "connection.h"
#include "support.h"

#define MESSAGE "message"
#define THREADS 8
#define SIGNATURES_PER_THREAD 50
#define DAEMON_DESCRIPTORS 32
#define MOST_CONNECTIONS 512
#define JOBS 200

typedef enum {
    HONEST,
    CLOSE_AT_ONCE,    /* reads the request and closes */
    CLOSE_INSIDE,     /* closes in the middle of the answer */
    CLOSE_FIRST_ONLY, /* the first request of the agent's life is dropped */
    SILENT,           /* never answers */
    GARBAGE,          /* bytes that are no frame */
    HUGE_LENGTH,      /* a length that no answer has */
    OTHER_ID,         /* an answer to somebody else's request */
    PONG,             /* an answer to a question that was not asked */
    REFUSE,
    REFUSE_UNREADABLE, /* a refusal with request id 0 */
    HELD,              /* answers once it is told to be something else */
    BYTEWISE           /* an honest answer in pieces of one byte */
} behaviour;

typedef struct {
    char path[64];
    char directory[32];
    int listener;
    _Atomic behaviour how;
    atomic_int accepted;
    atomic_int requests;
    pthread_t thread;
    pthread_t served[MOST_CONNECTIONS];
    int served_count;
} agent;

typedef struct {
    agent *of;
    int fd;
} served;

static int read_all(int fd, uint8_t *out, size_t len)
{
    size_t got = 0;

    while (got < len) {
        ssize_t count = recv(fd, out + got, len - got, 0);

        if (count <= 0)
            return 0;
        got += (size_t)count;
    }
    return 1;
}

static void write_all(int fd, const void *bytes, size_t len)
{
    (void)!send(fd, bytes, len, MSG_NOSIGNAL);
}

static void answer(const agent *of, int fd, const uint8_t request_id[4], int request_number)
{
    uint8_t signed_frame[] = {
        0, 0, 0,   11,  1,  0x81, request_id[0], request_id[1], request_id[2], request_id[3],
        0, 3, 's', 'i', 'g'};
    uint8_t refused_frame[] = {
        0, 0, 0, 15, 1,   0x8f, request_id[0], request_id[1], request_id[2], request_id[3], 20, 0, 0,
        0, 9, 0, 2,  'n', 'o'};
    uint8_t pong[] = {0, 0, 0, 6, 1, 0x82, request_id[0], request_id[1], request_id[2], request_id[3]};
    size_t i;

    while (of->how == HELD)
        (void)usleep(500);
    switch (of->how) {
    case HELD:
    case CLOSE_FIRST_ONLY:
        if (request_number == 1) {
            (void)shutdown(fd, SHUT_RDWR);
            return;
        }
        write_all(fd, signed_frame, sizeof(signed_frame));
        return;
    case HONEST:
        write_all(fd, signed_frame, sizeof(signed_frame));
        return;
    case BYTEWISE:
        for (i = 0; i < sizeof(signed_frame); i++)
            write_all(fd, signed_frame + i, 1);
        return;
    case CLOSE_INSIDE:
        write_all(fd, signed_frame, 9);
        (void)shutdown(fd, SHUT_RDWR);
        return;
    case CLOSE_AT_ONCE:
        (void)shutdown(fd, SHUT_RDWR);
        return;
    case SILENT:
        return;
    case GARBAGE:
        write_all(fd, "\x00\x00\x00\x08not HTTP/1.1", 16);
        return;
    case HUGE_LENGTH:
        write_all(fd, "\x7f\xff\xff\xff\x01\x81", 6);
        return;
    case OTHER_ID:
        signed_frame[9] ^= 1;
        write_all(fd, signed_frame, sizeof(signed_frame));
        return;
    case PONG:
        write_all(fd, pong, sizeof(pong));
        return;
    case REFUSE_UNREADABLE:
        memset(refused_frame + 6, 0, 4);
        write_all(fd, refused_frame, sizeof(refused_frame));
        return;
    case REFUSE:
    default:
        write_all(fd, refused_frame, sizeof(refused_frame));
        return;
    }
}

static void *serve(void *argument)
{
    served *job = argument;
    uint8_t field[4];
    uint8_t *frame = malloc(KEYREEVE_FRAME_MAX);

    CHECK(frame != NULL);
    while (read_all(job->fd, field, sizeof(field))) {
        size_t len = (size_t)field[0] << 24 | (size_t)field[1] << 16 | (size_t)field[2] << 8 | field[3];

        CHECK(len >= 2 && len <= KEYREEVE_FRAME_MAX);
        if (!read_all(job->fd, frame, len))
            break;
        CHECK(frame[0] == 1 && frame[1] == 1);
        answer(job->of, job->fd, frame + 2, atomic_fetch_add(&job->of->requests, 1) + 1);
    }
    (void)close(job->fd);
    free(frame);
    free(job);
    return NULL;
}

static void *accept_loop(void *argument)
{
    agent *self = argument;

    for (;;) {
        served *job = malloc(sizeof(*job));
        int fd = accept4(self->listener, NULL, NULL, SOCK_CLOEXEC);

        CHECK(job != NULL);
        if (fd < 0) {
            free(job);
            return NULL;
        }
        job->of = self;
        job->fd = fd;
        atomic_fetch_add(&self->accepted, 1);
        CHECK(self->served_count < MOST_CONNECTIONS);
        CHECK(pthread_create(&self->served[self->served_count++], NULL, serve, job) == 0);
    }
}

static void agent_listen(agent *self)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    memcpy(address.sun_path, self->path, strlen(self->path));
    self->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(bind(self->listener, (struct sockaddr *)&address, sizeof(address)) == 0);
    CHECK(listen(self->listener, 64) == 0);
    CHECK(pthread_create(&self->thread, NULL, accept_loop, self) == 0);
}

static agent *agent_start(behaviour how)
{
    agent *self = calloc(1, sizeof(*self));

    CHECK(self != NULL);
    (void)snprintf(self->directory, sizeof(self->directory), "/tmp/keyreeve-test-XXXXXX");
    CHECK(mkdtemp(self->directory) != NULL);
    (void)snprintf(self->path, sizeof(self->path), "%s/sign.sock", self->directory);
    self->how = how;
    agent_listen(self);
    return self;
}

static void agent_stop_listening(agent *self)
{
    (void)shutdown(self->listener, SHUT_RDWR);
    CHECK(pthread_join(self->thread, NULL) == 0);
    (void)close(self->listener);
    (void)unlink(self->path);
}

/* After the clients are gone. */
static void agent_free(agent *self)
{
    int i;

    agent_stop_listening(self);
    for (i = 0; i < self->served_count; i++)
        CHECK(pthread_join(self->served[i], NULL) == 0);
    (void)rmdir(self->directory);
    free(self);
}

static keyreeve_exchange_status ask(keyreeve_pool *pool, const agent *from, uint32_t deadline_ms,
                                    keyreeve_answer *out)
{
    keyreeve_sign_frame frame = {0, deadline_ms, 0x0403, 1, "k", (const uint8_t *)MESSAGE, strlen(MESSAGE)};
    int system_error;

    return keyreeve_pool_exchange(pool, from->path, &frame, out, &system_error);
}

static void expect(behaviour how, keyreeve_exchange_status wanted, int connections)
{
    agent *from = agent_start(how);
    keyreeve_pool *pool = keyreeve_pool_new();
    keyreeve_answer out;

    CHECK(ask(pool, from, 2000, &out) == wanted);
    CHECK(atomic_load(&from->accepted) == connections);
    keyreeve_pool_free(pool);
    agent_free(from);
}

static void test_misbehaviour(void)
{
    expect(HONEST, KEYREEVE_EXCHANGE_OK, 1);
    expect(BYTEWISE, KEYREEVE_EXCHANGE_OK, 1);
    expect(CLOSE_FIRST_ONLY, KEYREEVE_EXCHANGE_OK, 2);
    expect(CLOSE_AT_ONCE, KEYREEVE_EXCHANGE_BROKEN, 2); /* opened again once, not for ever */
    expect(CLOSE_INSIDE, KEYREEVE_EXCHANGE_BROKEN, 2);
    expect(GARBAGE, KEYREEVE_EXCHANGE_PROTOCOL, 1);
    expect(HUGE_LENGTH, KEYREEVE_EXCHANGE_PROTOCOL, 1);
    expect(OTHER_ID, KEYREEVE_EXCHANGE_PROTOCOL, 1);
    expect(PONG, KEYREEVE_EXCHANGE_PROTOCOL, 1);
}

static void test_refusals(void)
{
    static const behaviour KINDS[] = {REFUSE, REFUSE_UNREADABLE};
    size_t i;

    for (i = 0; i < 2; i++) {
        agent *from = agent_start(KINDS[i]);
        keyreeve_pool *pool = keyreeve_pool_new();
        keyreeve_answer out;

        CHECK(ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK);
        CHECK(out.kind == KEYREEVE_ANSWER_REFUSED && out.code == 20 && out.retry_after_ms == 9);
        CHECK(strcmp(out.detail, "no") == 0);
        keyreeve_pool_free(pool);
        agent_free(from);
    }
}

static void test_deadline_is_kept(void)
{
    agent *from = agent_start(SILENT);
    keyreeve_pool *pool = keyreeve_pool_new();
    keyreeve_answer out;
    int64_t before = keyreeve_now_ms();
    int64_t took;

    CHECK(ask(pool, from, 150, &out) == KEYREEVE_EXCHANGE_TIMEOUT);
    took = keyreeve_now_ms() - before;
    CHECK(took >= 150 && took < 1500);
    keyreeve_pool_free(pool);
    agent_free(from);
}

static void test_nobody_listens(void)
{
    agent *from = agent_start(HONEST);
    keyreeve_pool *pool = keyreeve_pool_new();
    keyreeve_sign_frame frame = {0, 2000, 0x0403, 1, "k", (const uint8_t *)MESSAGE, strlen(MESSAGE)};
    keyreeve_answer out;
    int system_error = 0;

    CHECK(keyreeve_pool_exchange(pool, "/nowhere/sign.sock", &frame, &out, &system_error) ==
          KEYREEVE_EXCHANGE_UNREACHABLE);
    CHECK(system_error == ENOENT);
    frame.message_len = KEYREEVE_MESSAGE_MAX + 1;
    CHECK(keyreeve_pool_exchange(pool, from->path, &frame, &out, &system_error) == KEYREEVE_EXCHANGE_INVALID);
    keyreeve_pool_free(pool);
    agent_free(from);
}

static void test_largest_message(void)
{
    agent *from = agent_start(HONEST);
    keyreeve_pool *pool = keyreeve_pool_new();
    uint8_t *message = calloc(1, KEYREEVE_MESSAGE_MAX);
    keyreeve_sign_frame frame = {0, 2000, 0x0403, 1, "k", message, KEYREEVE_MESSAGE_MAX};
    keyreeve_answer out;
    int system_error;

    CHECK(keyreeve_pool_exchange(pool, from->path, &frame, &out, &system_error) == KEYREEVE_EXCHANGE_OK);
    free(message);
    keyreeve_pool_free(pool);
    agent_free(from);
}

static void test_a_restarted_agent_is_found_again(void)
{
    agent *from = agent_start(HONEST);
    keyreeve_pool *pool = keyreeve_pool_new();
    keyreeve_answer out;

    CHECK(ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK);
    CHECK(ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK);
    CHECK(atomic_load(&from->accepted) == 1); /* the connection is kept */
    from->how = CLOSE_AT_ONCE;
    CHECK(ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_BROKEN);
    CHECK(atomic_load(&from->accepted) == 2);
    agent_stop_listening(from);
    CHECK(ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_UNREACHABLE);
    agent_listen(from);
    from->how = HONEST;
    CHECK(ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK);
    keyreeve_pool_free(pool);
    agent_free(from);
}

/* The child must not write a byte to the parent's connection, and closing it there must not end it here. */
static void test_fork(void)
{
    agent *from = agent_start(HONEST);
    keyreeve_pool *pool = keyreeve_pool_new();
    keyreeve_answer out;
    pid_t child;
    int status = 0;

    CHECK(ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK);
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        int fine = ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK && out.signature_len == 3 &&
                   ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK;
        pid_t grandchild = fine ? fork() : 0;

        if (grandchild == 0)
            _exit(fine && ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK ? 0 : 1);
        _exit(waitpid(grandchild, &status, 0) == grandchild && status == 0 ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(atomic_load(&from->accepted) == 3); /* one of each process */
    CHECK(ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK);
    CHECK(atomic_load(&from->accepted) == 3); /* the parent's survived its children */
    keyreeve_pool_free(pool);
    agent_free(from);
}

/* A daemon closes every descriptor that it inherited and opens its own: those are not ours to close. */
static void test_a_child_that_closed_what_it_inherited(void)
{
    agent *from = agent_start(HONEST);
    keyreeve_pool *pool = keyreeve_pool_new();
    keyreeve_answer out;
    pid_t child;
    int status = 0;

    CHECK(ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK);
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        struct stat own, now;
        int fine, fd;

        CHECK(fstat(STDERR_FILENO, &own) == 0);
        for (fd = STDERR_FILENO + 1; fd < DAEMON_DESCRIPTORS; fd++)
            (void)dup2(STDERR_FILENO, fd);
        fine = ask(pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK;
        for (fd = STDERR_FILENO + 1; fd < DAEMON_DESCRIPTORS; fd++)
            fine = fine && fstat(fd, &now) == 0 && now.st_ino == own.st_ino && now.st_dev == own.st_dev;
        _exit(fine ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    keyreeve_pool_free(pool);
    agent_free(from);
}

typedef struct {
    keyreeve_pool *pool;
    const agent *from;
} thread_job;

static int ask_in_job(void *argument)
{
    const thread_job *job = *(thread_job **)argument;
    keyreeve_answer out;

    return ask(job->pool, job->from, 2000, &out) == KEYREEVE_EXCHANGE_OK;
}

/* The child goes on with a connection of its own, kept where its next signature finds it. */
static void test_a_job_that_is_resumed_in_a_child(void)
{
    agent *from = agent_start(SILENT);
    thread_job todo = {keyreeve_pool_new(), from};
    thread_job *argument = &todo;
    ASYNC_WAIT_CTX *wait_ctx = ASYNC_WAIT_CTX_new();
    ASYNC_JOB *job = NULL;
    keyreeve_answer out;
    int result = 0;
    int status = 0;
    pid_t child;

    CHECK(wait_ctx != NULL &&
          ASYNC_start_job(&job, wait_ctx, &result, ask_in_job, &argument, sizeof(argument)) == ASYNC_PAUSE);
    while (atomic_load(&from->requests) == 0)
        (void)usleep(1000);
    from->how = HONEST;
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        int fine = ASYNC_start_job(&job, wait_ctx, &result, ask_in_job, &argument, sizeof(argument)) ==
                       ASYNC_FINISH &&
                   result == 1 && ask(todo.pool, from, 2000, &out) == KEYREEVE_EXCHANGE_OK;

        _exit(fine ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(atomic_load(&from->accepted) == 2); /* one of each process */
    while (ASYNC_start_job(&job, wait_ctx, &result, ask_in_job, &argument, sizeof(argument)) == ASYNC_PAUSE)
        (void)usleep(1000);
    CHECK(result == 0); /* its deadline passed */
    ASYNC_WAIT_CTX_free(wait_ctx);
    keyreeve_pool_free(todo.pool);
    agent_free(from);
}

typedef struct {
    ASYNC_JOB *job;
    ASYNC_WAIT_CTX *wait_ctx;
    int result;
} handshake;

/* Many handshakes of one thread at once: each has a connection, and the next ones open none. */
static void test_many_jobs_keep_their_connections(void)
{
    static handshake all[JOBS];
    agent *from = agent_start(HONEST);
    thread_job todo = {keyreeve_pool_new(), from};
    thread_job *argument = &todo;
    int round, i;

    for (round = 0; round < 3; round++) {
        from->how = HELD;
        for (i = 0; i < JOBS; i++) {
            memset(&all[i], 0, sizeof(all[i]));
            all[i].wait_ctx = ASYNC_WAIT_CTX_new();
            CHECK(all[i].wait_ctx != NULL &&
                  ASYNC_start_job(&all[i].job, all[i].wait_ctx, &all[i].result, ask_in_job, &argument,
                                  sizeof(argument)) == ASYNC_PAUSE);
        }
        from->how = HONEST;
        for (i = JOBS - 1; i >= 0; i--) {
            while (ASYNC_start_job(&all[i].job, all[i].wait_ctx, &all[i].result, ask_in_job, &argument,
                                   sizeof(argument)) == ASYNC_PAUSE)
                (void)usleep(100);
            CHECK(all[i].result == 1);
            ASYNC_WAIT_CTX_free(all[i].wait_ctx);
        }
        CHECK(atomic_load(&from->accepted) == JOBS);
    }
    keyreeve_pool_free(todo.pool);
    agent_free(from);
}

static void *sign_often(void *argument)
{
    const thread_job *job = argument;
    keyreeve_answer out;
    int i;

    for (i = 0; i < SIGNATURES_PER_THREAD; i++)
        CHECK(ask(job->pool, job->from, 5000, &out) == KEYREEVE_EXCHANGE_OK);
    return NULL;
}

static void test_threads(void)
{
    agent *from = agent_start(HONEST);
    thread_job job = {keyreeve_pool_new(), from};
    pthread_t threads[THREADS];
    int i;

    for (i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, sign_often, &job) == 0);
    for (i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(atomic_load(&from->requests) == THREADS * SIGNATURES_PER_THREAD);
    CHECK(atomic_load(&from->accepted) <= THREADS);
    keyreeve_pool_free(job.pool);
    agent_free(from);
}

int main(void)
{
    test_misbehaviour();
    test_refusals();
    test_deadline_is_kept();
    test_nobody_listens();
    test_largest_message();
    test_a_restarted_agent_is_found_again();
    test_fork();
    test_a_child_that_closed_what_it_inherited();
    test_a_job_that_is_resumed_in_a_child();
    test_many_jobs_keep_their_connections();
    test_threads();
    puts("connection: ok");
    return 0;
}
