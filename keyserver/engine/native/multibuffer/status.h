#ifndef KEYREEVE_STATUS_H
#define KEYREEVE_STATUS_H

/* What became of a key that is loaded, or of one item of a piece. The numbers are known to engines in Python.
 */
enum keyreeve_status {
    KEYREEVE_OK = 0,
    KEYREEVE_BAD_FORM = 1, /* the scheme does not fit the key, or a digest has another length than its hash */
    KEYREEVE_BAD_KEY = 2,  /* the parts of the key do not belong together */
    KEYREEVE_UNSUITED = 3, /* a good key that lanes cannot sign with */
    KEYREEVE_NO_MEMORY = 4,
    KEYREEVE_NO_RANDOM = 5,
    KEYREEVE_LANE_FAILED = 6,
    KEYREEVE_MISMATCH = 7 /* signed, and the result does not verify */
};

#endif
