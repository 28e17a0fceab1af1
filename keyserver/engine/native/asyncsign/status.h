/* What became of a request, or of the engine's start. Numbers go to Python as they stand here. */
#ifndef KEYREEVE_ASYNC_STATUS_H
#define KEYREEVE_ASYNC_STATUS_H

typedef enum {
    KEYREEVE_ASYNC_OK = 0,
    KEYREEVE_ASYNC_FAILED = 1,   /* the provider said that it failed */
    KEYREEVE_ASYNC_MISMATCH = 2, /* it gave a signature that does not verify: not released */
    KEYREEVE_ASYNC_LATE = 3,     /* no answer in time; the provider may still be at it */
    KEYREEVE_ASYNC_BUSY = 4,     /* the queue is full, or every job hangs */
    KEYREEVE_ASYNC_CLOSED = 5,
    KEYREEVE_ASYNC_BAD_REQUEST = 6, /* the scheme does not fit the key, or the digest the scheme */
    KEYREEVE_ASYNC_BAD_KEY = 7,
    KEYREEVE_ASYNC_NOT_OFFERED = 8, /* the provider does not sign with keys of this kind */
    KEYREEVE_ASYNC_NO_PROVIDER = 9, /* the provider cannot be loaded */
    KEYREEVE_ASYNC_NO_MEMORY = 10,
} keyreeve_async_status;

#endif
