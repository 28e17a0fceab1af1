/* A PKCS#11 module that forwards to another (FORWARD_TO) and makes the faults of real tokens on demand. For
 * tests only.
 *
 * The file beside this module whose name ends in ".fault" says what happens now; no file, no fault:
 *   stall      each call of a session waits until the file changes
 *   stall-sign only C_Sign waits
 *   fail       C_Sign answers CKR_DEVICE_ERROR
 *   lose       sessions opened before the file was written are gone (CKR_SESSION_HANDLE_INVALID)
 *   removed    CKR_DEVICE_REMOVED from each call of a session, CKR_TOKEN_NOT_PRESENT from C_OpenSession
 * The file ".delay" holds how many microseconds C_Sign blocks before it signs, as a network HSM does.
 * The file ".sessions" holds how many processes may have a session; ".hide" holds hexadecimal numbers of
 * mechanisms that are denied. The module it forwards to is asked for its function list, whose layout
 * PKCS#11 2.40 fixes: a version, then 68 pointers in a set order.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long ulong_t;
typedef ulong_t (*call_t)(ulong_t, ulong_t, ulong_t, ulong_t, ulong_t, ulong_t, ulong_t, ulong_t);
typedef struct {
    unsigned char version[sizeof(void *)];
    call_t call[68];
} function_list_t;

enum {
    GET_MECHANISM_LIST = 7,
    OPEN_SESSION = 12,
    CLOSE_SESSION = 13,
    FIND_INIT = 26,
    SIGN_INIT = 42,
    SIGN = 43
};
enum { GENERATE_KEY_PAIR = 59, WRAP_KEY = 60, UNWRAP_KEY = 61, GENERATE_RANDOM = 64 };
enum { OK = 0, DEVICE_ERROR = 0x30, DEVICE_REMOVED = 0x32, MECHANISM_INVALID = 0x70 };
enum { SESSION_COUNT = 0xB1, SESSION_HANDLE_INVALID = 0xB3, TOKEN_NOT_PRESENT = 0xE0 };

static function_list_t *real, list;
static struct timespec opened;
static int session_lock = -1;

static const char *beside(const char *suffix)
{
    static char path[4096];
    Dl_info info;
    dladdr((void *)beside, &info);
    snprintf(path, sizeof path, "%s%s", info.dli_fname, suffix);
    return path;
}

static void read_file(const char *suffix, char *text, size_t size)
{
    FILE *file = fopen(beside(suffix), "r");
    text[0] = '\0';
    if (file != NULL) {
        if (fgets(text, (int)size, file) == NULL)
            text[0] = '\0';
        fclose(file);
    }
    text[strcspn(text, "\n")] = '\0';
}

static int fault_is(const char *wanted)
{
    char now[32];
    read_file(".fault", now, sizeof now);
    return strcmp(now, wanted) == 0;
}

static int written_since_open(void)
{
    struct stat status;
    if (stat(beside(".fault"), &status) != 0)
        return 0;
    return status.st_mtim.tv_sec > opened.tv_sec ||
           (status.st_mtim.tv_sec == opened.tv_sec && status.st_mtim.tv_nsec > opened.tv_nsec);
}

static ulong_t session_fault(void)
{
    while (fault_is("stall"))
        usleep(20000);
    if (fault_is("removed"))
        return DEVICE_REMOVED;
    if (fault_is("lose") && written_since_open())
        return SESSION_HANDLE_INVALID;
    return OK;
}

static int is_hidden(ulong_t mechanism)
{
    char text[256], number[32];
    read_file(".hide", text, sizeof text);
    snprintf(number, sizeof number, " %lx ", mechanism);
    return strstr(text, number) != NULL;
}

#define PARAMETERS ulong_t a, ulong_t b, ulong_t c, ulong_t d, ulong_t e, ulong_t f, ulong_t g, ulong_t h
#define FORWARD(index) real->call[index](a, b, c, d, e, f, g, h)
#define FAULTY(name, index)                                                                                  \
    static ulong_t name(PARAMETERS)                                                                          \
    {                                                                                                        \
        ulong_t fault = session_fault();                                                                     \
        return fault != OK ? fault : FORWARD(index);                                                         \
    }
FAULTY(find_init, FIND_INIT)
FAULTY(generate_key_pair, GENERATE_KEY_PAIR)
FAULTY(wrap_key, WRAP_KEY)
FAULTY(unwrap_key, UNWRAP_KEY)
FAULTY(generate_random, GENERATE_RANDOM)

static ulong_t sign_init(PARAMETERS)
{
    ulong_t fault = session_fault();
    if (fault != OK)
        return fault;
    return is_hidden(*(ulong_t *)b) ? MECHANISM_INVALID : FORWARD(SIGN_INIT);
}

static ulong_t sign(PARAMETERS)
{
    char delay[32];
    read_file(".delay", delay, sizeof delay);
    if (delay[0] != '\0')
        usleep((useconds_t)atoi(delay));
    while (fault_is("stall-sign"))
        usleep(20000);
    if (fault_is("fail"))
        return DEVICE_ERROR;
    return FORWARD(SIGN);
}

static ulong_t open_session(PARAMETERS)
{
    char text[32], name[32];
    while (fault_is("stall"))
        usleep(20000);
    if (fault_is("removed"))
        return TOKEN_NOT_PRESENT;
    read_file(".sessions", text, sizeof text);
    if (text[0] != '\0' && session_lock < 0) {
        for (int n = 0; n < atoi(text); n++) {
            snprintf(name, sizeof name, ".session-%d", n);
            session_lock = open(beside(name), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
            if (flock(session_lock, LOCK_EX | LOCK_NB) == 0)
                break;
            close(session_lock);
            session_lock = -1;
        }
        if (session_lock < 0)
            return SESSION_COUNT;
    }
    clock_gettime(CLOCK_REALTIME, &opened);
    return FORWARD(OPEN_SESSION);
}

static ulong_t close_session(PARAMETERS)
{
    if (session_lock >= 0)
        close(session_lock);
    session_lock = -1;
    return FORWARD(CLOSE_SESSION);
}

static ulong_t get_mechanism_list(PARAMETERS)
{
    ulong_t *mechanisms = (ulong_t *)b, *count = (ulong_t *)c;
    ulong_t result = FORWARD(GET_MECHANISM_LIST), kept = 0;
    char text[256];
    read_file(".hide", text, sizeof text);
    if (result != OK || mechanisms == NULL || text[0] == 'l')
        return result;
    for (ulong_t n = 0; n < *count; n++)
        if (!is_hidden(mechanisms[n]))
            mechanisms[kept++] = mechanisms[n];
    *count = kept;
    return OK;
}

ulong_t C_GetFunctionList(function_list_t **given)
{
    void *module = dlopen(FORWARD_TO, RTLD_NOW | RTLD_LOCAL);
    ulong_t (*get)(function_list_t **) =
        module == NULL ? NULL : (ulong_t(*)(function_list_t **))dlsym(module, "C_GetFunctionList");
    if (get == NULL || get(&real) != OK)
        return DEVICE_ERROR;
    list = *real;
    list.call[GET_MECHANISM_LIST] = get_mechanism_list;
    list.call[OPEN_SESSION] = open_session;
    list.call[CLOSE_SESSION] = close_session;
    list.call[FIND_INIT] = find_init;
    list.call[SIGN_INIT] = sign_init;
    list.call[SIGN] = sign;
    list.call[GENERATE_KEY_PAIR] = generate_key_pair;
    list.call[WRAP_KEY] = wrap_key;
    list.call[UNWRAP_KEY] = unwrap_key;
    list.call[GENERATE_RANDOM] = generate_random;
    *given = &list;
    return OK;
}
