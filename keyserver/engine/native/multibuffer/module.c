#include <Python.h>
#include <crypto_mb/cpu_features.h>

static PyObject *multibuffer_key_types(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    return PyTuple_New(0);
}

static PyMethodDef METHODS[] = {
    {"key_types", multibuffer_key_types, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "keyreeve_engine._multibuffer",
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__multibuffer(void);
PyMODINIT_FUNC PyInit__multibuffer(void)
{
    return PyModule_Create(&MODULE);
}
