/* Waiting for a descriptor, so that the waiting thread can do other work where the application lets it:
 * inside an OpenSSL ASYNC job the job is paused, elsewhere the thread blocks in poll. */
#ifndef KEYREEVE_ASYNC_H
#define KEYREEVE_ASYNC_H

#include <stdint.h>

typedef enum { KEYREEVE_WAIT_READY, KEYREEVE_WAIT_TIMEOUT, KEYREEVE_WAIT_FAILED } keyreeve_wait_result;

/* Called when the application frees its wait context while the job is paused: the job never resumes, so what
 * it holds is released here. */
typedef void keyreeve_abandon(void *arg);

/* Milliseconds of the monotonic clock. */
int64_t keyreeve_now_ms(void);

/* Waits until `fd` has one of `events` (POLLIN, POLLOUT) or the clock reaches `until_ms`; fd -1 is a plain
 * pause. No lock may be held: the thread may run something else meanwhile. */
keyreeve_wait_result keyreeve_wait(int fd, short events, int64_t until_ms, keyreeve_abandon *abandon,
                                   void *arg);

#endif
