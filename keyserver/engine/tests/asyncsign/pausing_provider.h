/* A provider for tests: signs with OpenSSL's own code, as a card would: later, in a thread of its own, while
 * the job is paused. Its knobs are exported, so that a test that has it open by dlopen can turn them. */
#ifndef KEYREEVE_PAUSING_PROVIDER_H
#define KEYREEVE_PAUSING_PROVIDER_H

/* Knobs of pausing_set: */
enum {
    PAUSING_WAKE,    /* by what a job is woken, see below */
    PAUSING_BATCH,   /* the card answers when so many are with it (or were asked to be let go) */
    PAUSING_RETRIES, /* times that its queue is full first: ASYNC_STATUS_EAGAIN */
    PAUSING_FAULT,   /* see below */
    PAUSING_REFUSE,  /* 1: loading fails; 2: loading hangs until it is 0 again */
    PAUSING_KNOBS,
};
enum { PAUSING_BY_CALLBACK, PAUSING_BY_FD, PAUSING_BY_NOTHING };
/* FAIL: signing fails. WRONG: one bit of the signature is wrong. HANG: the card never answers until
 * pausing_let_go. BLOCK: the call does not even return until then. AT_ONCE: it signs without the card, as
 * qatprovider does where it finds none. */
enum {
    PAUSING_SOUND,
    PAUSING_FAIL,
    PAUSING_WRONG,
    PAUSING_HANG,
    PAUSING_BLOCK,
    PAUSING_AT_ONCE,
    PAUSING_SHAM,
    PAUSING_CUT
};
/* Counts of pausing_get: */
enum {
    PAUSING_SIGNED,
    PAUSING_WITH_THE_CARD,
    PAUSING_MOST_WITH_THE_CARD,
    PAUSING_OUTSIDE_JOBS,
    PAUSING_UNLOADED,
    PAUSING_COUNTS
};

void pausing_reset(void);
void pausing_set(int knob, long value);
long pausing_get(int count);
/* Answers all that is with the card, or hangs at it. */
void pausing_let_go(void);

#endif
