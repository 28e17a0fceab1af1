#include "connection.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "async.h"
#include "reference.h"

#define POOL_SLOTS 1024    /* connections kept; more than these are closed after their one request */
#define CONNECT_RETRY_MS 5 /* pause while the agent's backlog is full */
#define ATTEMPTS 2         /* a broken connection is opened again once per signature */
#define NO_SLOT UINT16_MAX
#define RECEIVE_BYTES                                                                                        \
    (KEYREEVE_FRAME_LENGTH_BYTES + KEYREEVE_ANSWER_MAX + 1) /* one more: what follows is seen */

/* An open connection that the pool knows. `fd` is -1 in a free slot. The program may have closed the number
 * behind our back (a daemon closes all that it inherited) and given it to something else: `device` and
 * `inode` say whether it is still ours. A slot is in the free list, in the idle list, or taken by a request.
 */
typedef struct {
    int fd;
    uint16_t next;
    dev_t device;
    ino_t inode;
    char socket[KEYREEVE_SOCKET_MAX + 1];
} pool_slot;

/* What one process has open. A forked child makes a new one and never touches the lock of the old one, which
 * a thread of the parent may have held at the fork. The lock guards the lists alone and is held for no system
 * call but the closing of a connection to another agent. */
typedef struct pool_generation_st {
    pid_t pid;
    pthread_mutex_t lock;
    uint16_t free;
    uint16_t idle; /* the one that was used last comes first */
    pool_slot slots[POOL_SLOTS];
    struct pool_generation_st
        *inherited; /* kept until the pool is freed: another thread may still look at it */
} pool_generation;

struct keyreeve_pool_st {
    _Atomic(pool_generation *) current;
    atomic_uint next_request_id;
};

/* A connection in use by one request. */
typedef struct {
    int fd;
    uint16_t slot;
    pool_generation *generation;
} connection;

static pool_generation *generation_new(pool_generation *inherited)
{
    pool_generation *made = calloc(1, sizeof(*made));
    uint16_t i;

    if (made == NULL || pthread_mutex_init(&made->lock, NULL) != 0) {
        free(made);
        return NULL;
    }
    made->pid = getpid();
    made->inherited = inherited;
    for (i = 0; i < POOL_SLOTS; i++) {
        made->slots[i].fd = -1;
        made->slots[i].next = i + 1 < POOL_SLOTS ? (uint16_t)(i + 1) : NO_SLOT;
    }
    made->idle = NO_SLOT;
    return made;
}

static int slot_is_ours(const pool_slot *slot)
{
    struct stat status;

    return fstat(slot->fd, &status) == 0 && status.st_dev == slot->device && status.st_ino == slot->inode;
}

static void slot_close(pool_slot *slot)
{
    int ours = slot_is_ours(slot);
    int fd = slot->fd;

    slot->fd =
        -1; /* first, so that a child forked now cannot close a number that was given to something else */
    if (ours)
        (void)close(fd);
}

/* Closing an inherited descriptor sends nothing: the parent holds the connection open. */
static void generation_drop_descriptors(pool_generation *generation)
{
    size_t i;

    for (i = 0; i < POOL_SLOTS; i++)
        if (generation->slots[i].fd >= 0)
            slot_close(&generation->slots[i]);
}

keyreeve_pool *keyreeve_pool_new(void)
{
    keyreeve_pool *pool = calloc(1, sizeof(*pool));

    if (pool == NULL)
        return NULL;
    atomic_init(&pool->current, NULL);
    atomic_init(&pool->next_request_id, 1);
    return pool;
}

void keyreeve_pool_free(keyreeve_pool *pool)
{
    pool_generation *generation;

    if (pool == NULL)
        return;
    generation = atomic_load(&pool->current);
    if (generation != NULL)
        generation_drop_descriptors(generation);
    while (generation != NULL) {
        pool_generation *inherited = generation->inherited;

        free(generation);
        generation = inherited;
    }
    free(pool);
}

/* The generation of this very process. */
static pool_generation *pool_generation_now(keyreeve_pool *pool)
{
    pool_generation *seen = atomic_load(&pool->current);

    while (seen == NULL || seen->pid != getpid()) {
        pool_generation *made = generation_new(seen);

        if (made == NULL)
            return NULL;
        if (atomic_compare_exchange_strong(&pool->current, &seen, made)) {
            if (seen != NULL)
                generation_drop_descriptors(seen);
            return made;
        }
        (void)pthread_mutex_destroy(&made->lock);
        free(made);
    }
    return seen;
}

/* An idle connection has nothing to read: end of file or stray bytes mean that it is of no use any more. */
static int is_quiet(int fd)
{
    char byte;

    return recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
}

/* Unlinks the first idle slot for `socket`, or for any other than it where `other` is set. Under the lock. */
static uint16_t idle_unlink(pool_generation *generation, const char *socket, int other)
{
    uint16_t *link = &generation->idle;

    while (*link != NO_SLOT) {
        uint16_t found = *link;
        pool_slot *slot = &generation->slots[found];

        if ((strcmp(slot->socket, socket) == 0) != (other != 0)) {
            *link = slot->next;
            return found;
        }
        link = &slot->next;
    }
    return NO_SLOT;
}

/* A slot that was taken becomes free; its connection is closed. */
static void slot_give_back(pool_generation *generation, uint16_t index)
{
    slot_close(&generation->slots[index]);
    (void)pthread_mutex_lock(&generation->lock);
    generation->slots[index].next = generation->free;
    generation->free = index;
    (void)pthread_mutex_unlock(&generation->lock);
}

/* Takes an idle connection to this socket. With `discard` every idle one is closed instead: when one turned
 * out to be broken, the agent was most likely restarted. */
static int connection_take_idle(pool_generation *generation, const char *socket, int discard, connection *out)
{
    for (;;) {
        uint16_t index;
        pool_slot *slot;

        (void)pthread_mutex_lock(&generation->lock);
        index = idle_unlink(generation, socket, 0);
        (void)pthread_mutex_unlock(&generation->lock);
        if (index == NO_SLOT)
            return 0;
        slot = &generation->slots[index];
        if (discard || !slot_is_ours(slot) || !is_quiet(slot->fd)) {
            slot_give_back(generation, index);
            continue;
        }
        out->fd = slot->fd;
        out->slot = index;
        out->generation = generation;
        return 1;
    }
}

/* Makes room for a new connection: a free slot, else that of an idle connection to another agent. */
static void connection_register(pool_generation *generation, const char *socket, int fd, connection *out)
{
    uint16_t index;
    struct stat status;

    memset(&status, 0, sizeof(status));
    (void)fstat(fd, &status);
    (void)pthread_mutex_lock(&generation->lock);
    index = generation->free;
    if (index != NO_SLOT)
        generation->free = generation->slots[index].next;
    else if ((index = idle_unlink(generation, socket, 1)) != NO_SLOT)
        slot_close(&generation->slots[index]);
    (void)pthread_mutex_unlock(&generation->lock);
    if (index != NO_SLOT) {
        pool_slot *slot = &generation->slots[index];

        memcpy(slot->socket, socket, strlen(socket) + 1);
        slot->device = status.st_dev;
        slot->inode = status.st_ino;
        slot->fd = fd; /* last: a child forked from here on closes it */
    }
    out->fd = fd;
    out->slot = index;
    out->generation = generation;
}

static void connection_close(connection *used)
{
    if (used->fd < 0)
        return;
    if (used->generation->pid == getpid()) {
        if (used->slot == NO_SLOT)
            (void)close(used->fd);
        else
            slot_give_back(used->generation, used->slot);
    }
    used->fd = -1;
}

static void connection_abandon(void *arg)
{
    connection_close(arg);
}

static void connection_release(connection *used)
{
    if (used->slot == NO_SLOT) {
        connection_close(used);
        return;
    }
    (void)pthread_mutex_lock(&used->generation->lock);
    used->generation->slots[used->slot].next = used->generation->idle;
    used->generation->idle = used->slot;
    (void)pthread_mutex_unlock(&used->generation->lock);
    used->fd = -1;
}

static keyreeve_exchange_status status_of_wait(keyreeve_wait_result result)
{
    if (result == KEYREEVE_WAIT_READY)
        return KEYREEVE_EXCHANGE_OK;
    return result == KEYREEVE_WAIT_TIMEOUT ? KEYREEVE_EXCHANGE_TIMEOUT : KEYREEVE_EXCHANGE_BROKEN;
}

static keyreeve_exchange_status connection_open(pool_generation *generation, const char *socket_path,
                                                int64_t until_ms, connection *out, int *system_error)
{
    struct sockaddr_un address;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    out->fd = -1;
    if (fd < 0) {
        *system_error = errno;
        return KEYREEVE_EXCHANGE_UNREACHABLE;
    }
    memset(&address, 0, sizeof(address));
    address.sun_family = AF_UNIX;
    memcpy(address.sun_path, socket_path, strlen(socket_path));
    connection_register(generation, socket_path, fd, out);
    while (connect(fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
        int64_t pause_until = keyreeve_now_ms() + CONNECT_RETRY_MS;
        keyreeve_exchange_status status = KEYREEVE_EXCHANGE_OK;

        if (errno == EINTR)
            continue;
        *system_error = errno;
        if (errno != EAGAIN)
            status = KEYREEVE_EXCHANGE_UNREACHABLE;
        else if (keyreeve_now_ms() >= until_ms ||
                 keyreeve_wait(-1, 0, pause_until, connection_abandon, out) == KEYREEVE_WAIT_FAILED)
            status = KEYREEVE_EXCHANGE_TIMEOUT;
        if (status != KEYREEVE_EXCHANGE_OK) {
            connection_close(out);
            return status;
        }
    }
    *system_error = 0;
    return KEYREEVE_EXCHANGE_OK;
}

static keyreeve_exchange_status connection_send(connection *used, const uint8_t *bytes, size_t len,
                                                int64_t until_ms)
{
    size_t sent = 0;

    while (sent < len) {
        ssize_t count = send(used->fd, bytes + sent, len - sent, MSG_NOSIGNAL);
        keyreeve_exchange_status status;

        if (count > 0) {
            sent += (size_t)count;
            continue;
        }
        if (count < 0 && errno == EINTR)
            continue;
        if (count == 0 || (errno != EAGAIN && errno != EWOULDBLOCK))
            return KEYREEVE_EXCHANGE_BROKEN;
        status = status_of_wait(keyreeve_wait(used->fd, POLLOUT, until_ms, connection_abandon, used));
        if (status != KEYREEVE_EXCHANGE_OK)
            return status;
    }
    return KEYREEVE_EXCHANGE_OK;
}

/* Reads one frame, `field` and all, into `bytes`; its length without the field. Read in as few calls as it
 * comes in: nothing follows an answer, since one connection carries one request at a time. */
static keyreeve_exchange_status connection_receive(connection *used, uint8_t bytes[RECEIVE_BYTES],
                                                   size_t *len, int64_t until_ms)
{
    size_t got = 0;

    for (;;) {
        ssize_t count;
        keyreeve_exchange_status status;

        if (got >= KEYREEVE_FRAME_LENGTH_BYTES) {
            if (!keyreeve_frame_answer_length(bytes, len) || got > KEYREEVE_FRAME_LENGTH_BYTES + *len)
                return KEYREEVE_EXCHANGE_PROTOCOL;
            if (got == KEYREEVE_FRAME_LENGTH_BYTES + *len)
                return KEYREEVE_EXCHANGE_OK;
        }
        count = recv(used->fd, bytes + got, RECEIVE_BYTES - got, MSG_DONTWAIT);
        if (count > 0) {
            got += (size_t)count;
            continue;
        }
        if (count < 0 && errno == EINTR)
            continue;
        if (count == 0 || (errno != EAGAIN && errno != EWOULDBLOCK))
            return KEYREEVE_EXCHANGE_BROKEN;
        status = status_of_wait(keyreeve_wait(used->fd, POLLIN, until_ms, connection_abandon, used));
        if (status != KEYREEVE_EXCHANGE_OK)
            return status;
    }
}

/* One connection carries one request at a time, thus any answer with another id is a fault; a refusal with id
 * 0 is about a frame that the agent could not read. */
static int is_answer_to(const keyreeve_answer *answer, uint32_t request_id)
{
    if (answer->kind == KEYREEVE_ANSWER_SIGNED)
        return answer->request_id == request_id;
    return answer->kind == KEYREEVE_ANSWER_REFUSED &&
           (answer->request_id == request_id || answer->request_id == 0);
}

static keyreeve_exchange_status connection_converse(connection *used, const uint8_t *frame, size_t frame_len,
                                                    uint32_t request_id, int64_t until_ms,
                                                    keyreeve_answer *answer)
{
    uint8_t received[RECEIVE_BYTES];
    size_t len;
    keyreeve_exchange_status status;

    if ((status = connection_send(used, frame, frame_len, until_ms)) != KEYREEVE_EXCHANGE_OK ||
        (status = connection_receive(used, received, &len, until_ms)) != KEYREEVE_EXCHANGE_OK)
        return status;
    if (!keyreeve_frame_answer_decode(received + KEYREEVE_FRAME_LENGTH_BYTES, len, answer) ||
        !is_answer_to(answer, request_id))
        return KEYREEVE_EXCHANGE_PROTOCOL;
    return KEYREEVE_EXCHANGE_OK;
}

static uint32_t next_request_id(keyreeve_pool *pool)
{
    uint32_t id = atomic_fetch_add(&pool->next_request_id, 1);

    return id != 0 ? id : atomic_fetch_add(&pool->next_request_id, 1);
}

keyreeve_exchange_status keyreeve_pool_exchange(keyreeve_pool *pool, const char *socket,
                                                const keyreeve_sign_frame *request, keyreeve_answer *answer,
                                                int *system_error)
{
    int64_t until_ms = keyreeve_now_ms() + request->deadline_ms;
    keyreeve_sign_frame frame = *request;
    size_t frame_len = keyreeve_frame_sign_size(&frame);
    uint8_t *bytes = NULL;
    keyreeve_exchange_status status = KEYREEVE_EXCHANGE_BROKEN;
    int attempt;

    *system_error = 0;
    if (frame_len == 0 || !keyreeve_socket_path_is_valid((const uint8_t *)socket, strlen(socket)))
        return KEYREEVE_EXCHANGE_INVALID;
    if ((bytes = malloc(frame_len)) == NULL)
        return KEYREEVE_EXCHANGE_MEMORY;

    for (attempt = 0; attempt < ATTEMPTS && status == KEYREEVE_EXCHANGE_BROKEN; attempt++) {
        int64_t left = until_ms - keyreeve_now_ms();
        connection used = {-1, NO_SLOT, NULL};
        pool_generation *generation = pool_generation_now(pool); /* a job may be resumed in a child */

        if (generation == NULL || left < 1) {
            status = generation == NULL ? KEYREEVE_EXCHANGE_MEMORY : KEYREEVE_EXCHANGE_TIMEOUT;
            break;
        }
        if (!connection_take_idle(generation, socket, attempt > 0, &used)) {
            status = connection_open(generation, socket, until_ms, &used, system_error);
            if (status != KEYREEVE_EXCHANGE_OK)
                break;
        }
        frame.request_id = next_request_id(pool);
        frame.deadline_ms = (uint32_t)left;
        keyreeve_frame_sign_encode(&frame, bytes);
        status = connection_converse(&used, bytes, frame_len, frame.request_id, until_ms, answer);
        if (status == KEYREEVE_EXCHANGE_OK)
            connection_release(&used);
        else
            connection_close(&used); /* a late answer must not meet the next request */
    }
    free(bytes);
    return status;
}
