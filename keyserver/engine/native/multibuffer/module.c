/* keyreeve_engine._multibuffer: the Python face of pieces and keys. Lists in, a list out, the global lock
 * released in between. */
#include <Python.h>

#include "arena.h"
#include "piece.h"

#include <stdlib.h>

struct key_object {
    PyObject_HEAD struct keyreeve_key *key;
};

static PyTypeObject *key_type;
static PyObject *key_invalid, *key_unsuited;

static void key_object_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    keyreeve_key_free(((struct key_object *)self)->key);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *key_object_repr(PyObject *self)
{
    (void)self;
    return PyUnicode_FromString("Key()");
}

static PyObject *key_object_reduce(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    PyErr_SetString(PyExc_TypeError, "a Key is neither copied nor pickled");
    return NULL;
}

static PyMethodDef KEY_METHODS[] = {
    {"__reduce__", key_object_reduce, METH_NOARGS, NULL},
    {"__reduce_ex__", key_object_reduce, METH_O, NULL},
    {"__copy__", key_object_reduce, METH_NOARGS, NULL},
    {"__deepcopy__", key_object_reduce, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot KEY_SLOTS[] = {
    {Py_tp_dealloc, key_object_dealloc},
    {Py_tp_repr, key_object_repr},
    {Py_tp_methods, KEY_METHODS},
    {Py_tp_doc, "A private key in locked memory; it leaves it never, and is wiped with the last reference."},
    {0, NULL},
};

static PyType_Spec KEY_SPEC = {
    .name = "keyreeve_engine._multibuffer.Key",
    .basicsize = sizeof(struct key_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = KEY_SLOTS,
};

static int kind_from(int number)
{
    if (number >= 0 && number < KEYREEVE_KINDS && keyreeve_kind_is_supported((enum keyreeve_kind)number))
        return 1;
    PyErr_SetString(PyExc_ValueError, "no kind of key that this processor signs with");
    return 0;
}

static PyObject *multibuffer_kinds(PyObject *self, PyObject *unused)
{
    PyObject *kinds = PyList_New(0);
    int kind;
    (void)self;
    (void)unused;
    for (kind = 0; kinds != NULL && kind < KEYREEVE_KINDS; kind++) {
        PyObject *number;
        if (!keyreeve_kind_is_supported((enum keyreeve_kind)kind))
            continue;
        number = PyLong_FromLong(kind);
        if (number == NULL || PyList_Append(kinds, number) != 0)
            Py_CLEAR(kinds);
        Py_XDECREF(number);
    }
    return kinds;
}

static PyObject *multibuffer_memory(PyObject *self, PyObject *unused)
{
    struct keyreeve_arena_use use = keyreeve_arena_use();
    (void)self;
    (void)unused;
    return Py_BuildValue("(nnn)", (Py_ssize_t)use.mapped, (Py_ssize_t)use.locked, (Py_ssize_t)use.taken);
}

static PyObject *multibuffer_load(PyObject *self, PyObject *args)
{
    int kind;
    Py_buffer pkcs8;
    struct keyreeve_key *key = NULL;
    enum keyreeve_status status;
    struct key_object *object;
    (void)self;
    if (!PyArg_ParseTuple(args, "iy*:load", &kind, &pkcs8))
        return NULL;
    if (!kind_from(kind)) {
        PyBuffer_Release(&pkcs8);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS status =
        keyreeve_key_load((enum keyreeve_kind)kind, pkcs8.buf, (size_t)pkcs8.len, &key);
    Py_END_ALLOW_THREADS PyBuffer_Release(&pkcs8);
    switch (status) {
    case KEYREEVE_OK:
        break;
    case KEYREEVE_NO_MEMORY:
        return PyErr_NoMemory();
    case KEYREEVE_UNSUITED:
        PyErr_SetString(key_unsuited, "lanes cannot sign with this key");
        return NULL;
    default:
        PyErr_SetString(key_invalid, "not a key of this kind, or its parts do not belong together");
        return NULL;
    }
    object = (struct key_object *)key_type->tp_alloc(key_type, 0);
    if (object == NULL) {
        keyreeve_key_free(key);
        return NULL;
    }
    object->key = key;
    return (PyObject *)object;
}

/* One call's items, with the references that hold their keys and messages while other threads run. */
struct batch {
    struct keyreeve_item items[KEYREEVE_PIECE_MAX];
    unsigned char signatures[KEYREEVE_PIECE_MAX][KEYREEVE_SIGNATURE_MAX];
};

static int fill(struct batch *batch, PyObject *keys, PyObject *messages, const unsigned char *forms,
                Py_ssize_t count)
{
    Py_ssize_t number;
    for (number = 0; number < count; number++) {
        PyObject *key = PyTuple_GET_ITEM(keys, number), *message = PyTuple_GET_ITEM(messages, number);
        struct keyreeve_item *item = &batch->items[number];
        if (Py_TYPE(key) != key_type || !PyBytes_CheckExact(message)) {
            PyErr_SetString(PyExc_TypeError, "keys are Key objects, messages are bytes");
            return 0;
        }
        item->key = ((struct key_object *)key)->key;
        item->message = (const unsigned char *)PyBytes_AS_STRING(message);
        item->length = (size_t)PyBytes_GET_SIZE(message);
        item->form = forms[number];
        item->status = KEYREEVE_LANE_FAILED;
        item->signature = batch->signatures[number];
    }
    return 1;
}

/* A signature, or the number of a status. */
static PyObject *outcome_of(const struct keyreeve_item *item)
{
    if (item->status != KEYREEVE_OK)
        return PyLong_FromLong(item->status);
    return PyBytes_FromStringAndSize((const char *)item->signature, (Py_ssize_t)item->signature_length);
}

static PyObject *multibuffer_sign(PyObject *self, PyObject *args)
{
    int kind;
    PyObject *key_list, *message_list, *keys = NULL, *messages = NULL, *outcomes = NULL;
    const char *forms;
    Py_ssize_t forms_length, number;
    struct batch *batch = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "iO!O!y#:sign", &kind, &PyList_Type, &key_list, &PyList_Type, &message_list,
                          &forms, &forms_length) ||
        !kind_from(kind))
        return NULL;
    keys = PyList_AsTuple(key_list);
    messages = PyList_AsTuple(message_list);
    if (keys == NULL || messages == NULL)
        goto done;
    if (forms_length > KEYREEVE_PIECE_MAX || PyTuple_GET_SIZE(keys) != forms_length ||
        PyTuple_GET_SIZE(messages) != forms_length) {
        PyErr_SetString(PyExc_ValueError, "keys, messages and forms are not of one length, or more than 64");
        goto done;
    }
    batch = malloc(sizeof(*batch)); /* what it holds is public, or has its owner elsewhere */
    if (batch == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (!fill(batch, keys, messages, (const unsigned char *)forms, forms_length))
        goto done;
    Py_BEGIN_ALLOW_THREADS keyreeve_piece_sign((enum keyreeve_kind)kind, batch->items, (size_t)forms_length);
    Py_END_ALLOW_THREADS outcomes = PyList_New(forms_length);
    for (number = 0; outcomes != NULL && number < forms_length; number++) {
        PyObject *outcome = outcome_of(&batch->items[number]);
        if (outcome == NULL)
            Py_CLEAR(outcomes);
        else
            PyList_SET_ITEM(outcomes, number, outcome);
    }
done:
    free(batch);
    Py_XDECREF(keys);
    Py_XDECREF(messages);
    return outcomes;
}

static PyMethodDef METHODS[] = {
    {"kinds", multibuffer_kinds, METH_NOARGS, NULL},
    {"load", multibuffer_load, METH_VARARGS, NULL},
    {"sign", multibuffer_sign, METH_VARARGS, NULL},
    {"memory", multibuffer_memory, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "keyreeve_engine._multibuffer",
    .m_doc = "Signatures eight at a time.",
    .m_size = -1, /* one arena and one table of hashes in a process: no subinterpreters */
    .m_methods = METHODS,
};

static int add_constants(PyObject *module)
{
    return PyModule_AddIntConstant(module, "PIECE_MAX", KEYREEVE_PIECE_MAX) == 0 &&
           PyModule_AddIntConstant(module, "LANES", KEYREEVE_LANES) == 0 &&
           PyModule_AddObjectRef(module, "Key", (PyObject *)key_type) == 0 &&
           PyModule_AddObjectRef(module, "KeyInvalid", key_invalid) == 0 &&
           PyModule_AddObjectRef(module, "KeyUnsuited", key_unsuited) == 0;
}

PyMODINIT_FUNC PyInit__multibuffer(void);
PyMODINIT_FUNC PyInit__multibuffer(void)
{
    PyObject *module = NULL;
    if (!keyreeve_piece_init()) {
        PyErr_SetString(PyExc_ImportError, "libcrypto has not every hash of SHA-2");
        return NULL;
    }
    key_type = (PyTypeObject *)PyType_FromSpec(&KEY_SPEC);
    key_invalid = PyErr_NewException("keyreeve_engine._multibuffer.KeyInvalid", PyExc_ValueError, NULL);
    key_unsuited = PyErr_NewException("keyreeve_engine._multibuffer.KeyUnsuited", PyExc_ValueError, NULL);
    if (key_type == NULL || key_invalid == NULL || key_unsuited == NULL)
        return NULL;
    module = PyModule_Create(&MODULE);
    if (module != NULL && !add_constants(module))
        Py_CLEAR(module);
    return module;
}
