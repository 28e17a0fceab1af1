/* keyreeve_engine._hashes: SHA-256 of many messages in one call, for what is hashed with every signature. */
#include <Python.h>

#include <openssl/evp.h>
#include <stdbool.h>

#define DIGEST_BYTES 32

static EVP_MD *algorithm;

/* The digest of prefix || first || second. */
static PyObject *digest_of(EVP_MD_CTX *context, const Py_buffer *prefix, PyObject *first, PyObject *second)
{
    PyObject *digest = PyBytes_FromStringAndSize(NULL, DIGEST_BYTES);
    if (digest == NULL)
        return NULL;
    bool good = EVP_DigestInit_ex2(context, algorithm, NULL) == 1 &&
                EVP_DigestUpdate(context, prefix->buf, (size_t)prefix->len) == 1 &&
                EVP_DigestUpdate(context, PyBytes_AS_STRING(first), (size_t)PyBytes_GET_SIZE(first)) == 1;
    if (good && second != NULL)
        good = EVP_DigestUpdate(context, PyBytes_AS_STRING(second), (size_t)PyBytes_GET_SIZE(second)) == 1;
    if (!good || EVP_DigestFinal_ex(context, (unsigned char *)PyBytes_AS_STRING(digest), NULL) != 1) {
        Py_DECREF(digest);
        PyErr_SetString(PyExc_RuntimeError, "SHA-256 failed");
        return NULL;
    }
    return digest;
}

/* One digest for each `step` messages of the list. */
static PyObject *digests(PyObject *arguments, const char *format, Py_ssize_t step)
{
    Py_buffer prefix;
    PyObject *messages, *list = NULL;
    if (!PyArg_ParseTuple(arguments, format, &prefix, &PyList_Type, &messages))
        return NULL;
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    Py_ssize_t count = PyList_GET_SIZE(messages);
    for (Py_ssize_t i = 0; i < count; i++)
        if (!PyBytes_CheckExact(PyList_GET_ITEM(messages, i))) {
            PyErr_SetString(PyExc_TypeError, "messages are bytes");
            goto done;
        }
    if (context == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (count % step != 0) {
        PyErr_SetString(PyExc_ValueError, "an odd number of nodes has no parents");
        goto done;
    }
    list = PyList_New(count / step);
    for (Py_ssize_t i = 0; list != NULL && i < count / step; i++) {
        PyObject *second = step == 2 ? PyList_GET_ITEM(messages, 2 * i + 1) : NULL;
        PyObject *digest = digest_of(context, &prefix, PyList_GET_ITEM(messages, step * i), second);
        if (digest == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, digest);
    }
done:
    EVP_MD_CTX_free(context);
    PyBuffer_Release(&prefix);
    return list;
}

static PyObject *sha256_each(PyObject *module, PyObject *arguments)
{
    (void)module;
    return digests(arguments, "y*O!:sha256_each", 1);
}

static PyObject *sha256_pairs(PyObject *module, PyObject *arguments)
{
    (void)module;
    return digests(arguments, "y*O!:sha256_pairs", 2);
}

static PyMethodDef methods[] = {
    {"sha256_each", sha256_each, METH_VARARGS, NULL},
    {"sha256_pairs", sha256_pairs, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    (void)module;
    if (algorithm == NULL && (algorithm = EVP_MD_fetch(NULL, "SHA256", NULL)) == NULL) {
        PyErr_SetString(PyExc_ImportError, "libcrypto offers no SHA-256");
        return -1;
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)module_exec}, {0, NULL}};
static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "keyreeve_engine._hashes",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__hashes(void)
{
    return PyModuleDef_Init(&definition);
}
