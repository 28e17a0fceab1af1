/* keyreeve_engine._asyncsign: the ASYNC engine for Python. A key goes in as PKCS#8 and never comes out. */
#include <Python.h>

#include <stdbool.h>

#include "engine.h"

#define PIECE_MAX 1024
#define PREHASHED 0x10000L
#define NANOSECONDS 1e9
#define WHY_MAX 256

typedef struct {
    PyObject_HEAD keyreeve_async_engine *engine;
} Engine;

typedef struct {
    PyObject_HEAD keyreeve_async_key *key;
    keyreeve_async_engine *engine; /* held: its library context has to outlive the key */
} Key;

typedef struct {
    PyTypeObject *engine_type;
    PyTypeObject *key_type;
    PyObject *unusable;
    PyObject *not_offered;
} module_state;

static struct PyModuleDef definition;

static module_state *state_of(PyTypeObject *type)
{
    PyObject *module = PyType_GetModuleByDef(type, &definition);
    return module == NULL ? NULL : PyModule_GetState(module);
}

/* ---- Key ---- */

static void key_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    keyreeve_async_key_release(((Key *)self)->key);
    keyreeve_async_engine_release(((Key *)self)->engine);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *key_repr(PyObject *self)
{
    (void)self;
    return PyUnicode_FromString("<Key>");
}

static PyObject *key_reduce(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyErr_SetString(PyExc_TypeError, "a private key can be neither copied nor pickled");
    return NULL;
}

static PyMethodDef key_methods[] = {
    {"__reduce_ex__", key_reduce, METH_O, NULL},
    {"__reduce__", key_reduce, METH_NOARGS, NULL},
    {"__copy__", key_reduce, METH_NOARGS, NULL},
    {"__deepcopy__", key_reduce, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot key_slots[] = {
    {Py_tp_dealloc, (void *)key_dealloc},
    {Py_tp_repr, (void *)key_repr},
    {Py_tp_methods, key_methods},
    {0, NULL},
};
static PyType_Spec key_spec = {
    "keyreeve_engine._asyncsign.Key", sizeof(Key), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE, key_slots};

/* ---- Engine ---- */

static void engine_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    keyreeve_async_engine *engine = ((Engine *)self)->engine;
    if (engine != NULL) {
        PyThreadState *thread = PyEval_SaveThread();
        (void)keyreeve_async_engine_close(engine, 0);
        keyreeve_async_engine_release(engine);
        PyEval_RestoreThread(thread);
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *engine_load(PyObject *self, PyObject *argument)
{
    Py_buffer pkcs8;
    keyreeve_async_key *key = NULL;
    keyreeve_async_status status;
    keyreeve_async_engine *engine = ((Engine *)self)->engine;
    module_state *state = state_of(Py_TYPE(self));
    if (state == NULL || PyObject_GetBuffer(argument, &pkcs8, PyBUF_SIMPLE) != 0)
        return NULL;
    PyThreadState *thread = PyEval_SaveThread();
    status = keyreeve_async_engine_load(engine, pkcs8.buf, (size_t)pkcs8.len, &key);
    PyEval_RestoreThread(thread);
    PyBuffer_Release(&pkcs8);
    if (status == KEYREEVE_ASYNC_NOT_OFFERED)
        return PyErr_Format(state->not_offered, "the provider does not sign with keys of this type");
    if (status == KEYREEVE_ASYNC_NO_MEMORY)
        return PyErr_NoMemory();
    if (status != KEYREEVE_ASYNC_OK)
        return PyErr_Format(PyExc_ValueError, "not a private key in PKCS#8");
    Key *made = (Key *)state->key_type->tp_alloc(state->key_type, 0);
    if (made == NULL) {
        keyreeve_async_key_release(key);
        return NULL;
    }
    keyreeve_async_engine_hold(engine);
    made->key = key;
    made->engine = engine;
    return (PyObject *)made;
}

/* Fills `requests` from tuples, which keep alive what they hold; false with an exception set. */
static bool read_requests(const Engine *self, PyTypeObject *key_type, PyObject *columns[3],
                          keyreeve_async_request *requests, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *key = PyTuple_GET_ITEM(columns[0], i), *message = PyTuple_GET_ITEM(columns[1], i);
        if (!Py_IS_TYPE(key, key_type) || !PyBytes_CheckExact(message)) {
            PyErr_SetString(PyExc_TypeError, "keys are Key, messages are bytes");
            return false;
        }
        if (((Key *)key)->engine != self->engine) {
            PyErr_SetString(PyExc_ValueError, "the key was loaded by another engine");
            return false;
        }
        long scheme = PyLong_AsLong(PyTuple_GET_ITEM(columns[2], i));
        if (scheme == -1 && PyErr_Occurred())
            return false;
        requests[i].key = ((Key *)key)->key;
        requests[i].message = (const unsigned char *)PyBytes_AS_STRING(message);
        requests[i].message_size = (size_t)PyBytes_GET_SIZE(message);
        requests[i].scheme = (uint16_t)(scheme & 0xFFFF);
        requests[i].prehashed = (scheme & PREHASHED) != 0;
        requests[i].status = KEYREEVE_ASYNC_FAILED;
    }
    return true;
}

/* (outcomes, how many of the good ones were with the card) */
static PyObject *outcomes_of(const keyreeve_async_request *requests, Py_ssize_t count)
{
    Py_ssize_t paused = 0;
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        bool good = requests[i].status == KEYREEVE_ASYNC_OK;
        PyObject *outcome = good ? PyBytes_FromStringAndSize((const char *)requests[i].signature,
                                                             (Py_ssize_t)requests[i].signature_size)
                                 : PyLong_FromLong(requests[i].status);
        paused += good && requests[i].paused;
        if (outcome == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, outcome);
    }
    return list == NULL ? NULL : Py_BuildValue("(Nn)", list, paused);
}

static PyObject *engine_sign(PyObject *self, PyObject *arguments)
{
    PyObject *given[3], *columns[3] = {NULL, NULL, NULL}, *outcomes = NULL;
    double timeout;
    keyreeve_async_request *requests = NULL;
    module_state *state = state_of(Py_TYPE(self));
    if (state == NULL || !PyArg_ParseTuple(arguments, "OOOd:sign", &given[0], &given[1], &given[2], &timeout))
        return NULL;
    if (!(timeout >= 0 && timeout <= 3600))
        return PyErr_Format(PyExc_ValueError, "timeout is not 0 to 3600 seconds");
    /* Tuples of our own: nobody changes them while the lock of the interpreter is released. */
    for (int i = 0; i < 3; i++)
        if ((columns[i] = PySequence_Tuple(given[i])) == NULL)
            goto done;
    Py_ssize_t count = PyTuple_GET_SIZE(columns[0]);
    if (count > PIECE_MAX || PyTuple_GET_SIZE(columns[1]) != count || PyTuple_GET_SIZE(columns[2]) != count) {
        PyErr_SetString(PyExc_ValueError, "keys, messages and schemes differ in number, or are too many");
        goto done;
    }
    if ((requests = PyMem_Calloc(count > 0 ? (size_t)count : 1, sizeof(*requests))) == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (!read_requests((Engine *)self, state->key_type, columns, requests, count))
        goto done;
    PyThreadState *thread = PyEval_SaveThread();
    keyreeve_async_engine_sign(((Engine *)self)->engine, requests, (size_t)count,
                               (uint64_t)(timeout * NANOSECONDS));
    PyEval_RestoreThread(thread);
    outcomes = outcomes_of(requests, count);
done:
    PyMem_Free(requests);
    for (int i = 0; i < 3; i++)
        Py_XDECREF(columns[i]);
    return outcomes;
}

static PyObject *engine_state(PyObject *self, PyObject *unused)
{
    (void)unused;
    keyreeve_async_load load = keyreeve_async_engine_load_now(((Engine *)self)->engine);
    return Py_BuildValue("{s:n,s:n,s:n,s:n}", "running", (Py_ssize_t)load.running, "waiting",
                         (Py_ssize_t)load.waiting, "hanging", (Py_ssize_t)load.hanging, "most_running",
                         (Py_ssize_t)load.most_running);
}

static PyObject *engine_close(PyObject *self, PyObject *argument)
{
    bool ended;
    double timeout = PyFloat_AsDouble(argument);
    if (timeout == -1.0 && PyErr_Occurred())
        return NULL;
    if (!(timeout >= 0 && timeout <= 3600))
        return PyErr_Format(PyExc_ValueError, "timeout is not 0 to 3600 seconds");
    PyThreadState *thread = PyEval_SaveThread();
    ended = keyreeve_async_engine_close(((Engine *)self)->engine, (uint64_t)(timeout * NANOSECONDS));
    PyEval_RestoreThread(thread);
    return PyBool_FromLong(ended);
}

static PyMethodDef engine_methods[] = {
    {"load", engine_load, METH_O, NULL},
    {"sign", engine_sign, METH_VARARGS, NULL},
    {"state", engine_state, METH_NOARGS, NULL},
    {"close", engine_close, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot engine_slots[] = {
    {Py_tp_dealloc, (void *)engine_dealloc},
    {Py_tp_methods, engine_methods},
    {0, NULL},
};
static PyType_Spec engine_spec = {
    "keyreeve_engine._asyncsign.Engine", sizeof(Engine), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE, engine_slots};

/* ---- the module ---- */

static PyObject *open_engine(PyObject *module, PyObject *arguments)
{
    const char *provider, *directory;
    int jobs;
    double timeout;
    char why[WHY_MAX];
    keyreeve_async_engine *engine = NULL;
    keyreeve_async_status status;
    module_state *state = PyModule_GetState(module);
    if (!PyArg_ParseTuple(arguments, "szid:open", &provider, &directory, &jobs, &timeout))
        return NULL;
    if (jobs < 1 || jobs > KEYREEVE_ASYNC_JOBS_MAX)
        return PyErr_Format(PyExc_ValueError, "jobs is not 1 to %d", KEYREEVE_ASYNC_JOBS_MAX);
    if (!(timeout >= 0 && timeout <= 3600))
        return PyErr_Format(PyExc_ValueError, "timeout is not 0 to 3600 seconds");
    PyThreadState *thread = PyEval_SaveThread();
    status = keyreeve_async_engine_open(provider, directory, (size_t)jobs, (uint64_t)(timeout * NANOSECONDS),
                                        &engine, why, sizeof(why));
    PyEval_RestoreThread(thread);
    if (status != KEYREEVE_ASYNC_OK)
        return PyErr_Format(state->unusable, "%s", why);
    Engine *made = (Engine *)state->engine_type->tp_alloc(state->engine_type, 0);
    if (made == NULL) {
        (void)keyreeve_async_engine_close(engine, 0);
        keyreeve_async_engine_release(engine);
        return NULL;
    }
    made->engine = engine;
    return (PyObject *)made;
}

static PyMethodDef methods[] = {{"open", open_engine, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};

static const struct {
    const char *name;
    int value;
} constants[] = {
    {"PIECE_MAX", PIECE_MAX},          {"JOBS_MAX", KEYREEVE_ASYNC_JOBS_MAX},
    {"FAILED", KEYREEVE_ASYNC_FAILED}, {"MISMATCH", KEYREEVE_ASYNC_MISMATCH},
    {"LATE", KEYREEVE_ASYNC_LATE},     {"BUSY", KEYREEVE_ASYNC_BUSY},
    {"CLOSED", KEYREEVE_ASYNC_CLOSED}, {"BAD_REQUEST", KEYREEVE_ASYNC_BAD_REQUEST},
};

static int module_exec(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    state->engine_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &engine_spec, NULL);
    state->key_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &key_spec, NULL);
    state->unusable = PyErr_NewException("keyreeve_engine._asyncsign.Unusable", NULL, NULL);
    state->not_offered = PyErr_NewException("keyreeve_engine._asyncsign.NotOffered", NULL, NULL);
    if (state->engine_type == NULL || state->key_type == NULL || state->unusable == NULL ||
        state->not_offered == NULL)
        return -1;
    for (size_t i = 0; i < sizeof(constants) / sizeof(constants[0]); i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) != 0)
            return -1;
    if (PyModule_AddObjectRef(module, "Unusable", state->unusable) != 0 ||
        PyModule_AddObjectRef(module, "NotOffered", state->not_offered) != 0)
        return -1;
    return PyModule_AddType(module, state->engine_type) != 0 || PyModule_AddType(module, state->key_type) != 0
               ? -1
               : 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = PyModule_GetState(module);
    Py_VISIT(state->engine_type);
    Py_VISIT(state->key_type);
    Py_VISIT(state->unusable);
    Py_VISIT(state->not_offered);
    return 0;
}

static int module_clear(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->engine_type);
    Py_CLEAR(state->key_type);
    Py_CLEAR(state->unusable);
    Py_CLEAR(state->not_offered);
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)module_exec}, {0, NULL}};
static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "keyreeve_engine._asyncsign",
    .m_size = sizeof(module_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__asyncsign(void)
{
    return PyModuleDef_Init(&definition);
}
