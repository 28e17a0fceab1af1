/* Connections to agents. Nothing connects before the first signature of a process; after a fork the child
 * drops what it inherited without writing to it. Safe to use from any thread. */
#ifndef KEYREEVE_CONNECTION_H
#define KEYREEVE_CONNECTION_H

#include "frames.h"

typedef struct keyreeve_pool_st keyreeve_pool;

typedef enum {
    KEYREEVE_EXCHANGE_OK,          /* the agent answered: signed or refused */
    KEYREEVE_EXCHANGE_UNREACHABLE, /* nobody listens on the socket, or it may not be used */
    KEYREEVE_EXCHANGE_BROKEN,      /* the agent closed the connection, also the second one */
    KEYREEVE_EXCHANGE_TIMEOUT,
    KEYREEVE_EXCHANGE_PROTOCOL, /* the answer does not follow docs/protocol/sign-socket.md */
    KEYREEVE_EXCHANGE_MEMORY,
    KEYREEVE_EXCHANGE_INVALID /* the request does not fit a frame */
} keyreeve_exchange_status;

keyreeve_pool *keyreeve_pool_new(void);
void keyreeve_pool_free(keyreeve_pool *pool);

/* Sends the request and waits for its answer until `request->deadline_ms` from now. The pool sets the request
 * id. `system_error` gets errno where there is one, else 0. */
keyreeve_exchange_status keyreeve_pool_exchange(keyreeve_pool *pool, const char *socket,
                                                const keyreeve_sign_frame *request, keyreeve_answer *answer,
                                                int *system_error);

#endif
