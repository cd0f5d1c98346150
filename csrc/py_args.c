/* SPDX-License-Identifier: Apache-2.0
 *
 * Binds arguments by hand: PyArg_Parse has other texts than the binding generator that stock
 * uses, and users match on what they see.
 */
#include "py_args.h"

#include <stdio.h>
#include <string.h>

static int fail_missing(const char *function, const char *const *parameters, Py_ssize_t count,
                        PyObject *const *py_bound) {
    char list[160] = "";
    Py_ssize_t missing_count = 0, listed_count = 0;
    size_t used = 0;
    for (Py_ssize_t i = 0; i < count; i++) missing_count += py_bound[i] == NULL;
    for (Py_ssize_t i = 0; i < count && used < sizeof list; i++) {
        if (py_bound[i] != NULL) continue;
        const char *separator = "";
        if (listed_count > 0) separator = missing_count > 2 ? ", " : " ";
        const char *last = listed_count > 0 && listed_count + 1 == missing_count ? "and " : "";
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%s'%s'", separator, last,
                                 parameters[i]);
        listed_count++;
    }
    PyErr_Format(PyExc_TypeError, "%s() missing %zd required positional argument%s: %s", function,
                 missing_count, missing_count == 1 ? "" : "s", list);
    return -1;
}

static Py_ssize_t find_parameter(const char *const *parameters, Py_ssize_t count,
                                 PyObject *py_keyword) {
    for (Py_ssize_t i = 0; i < count; i++)
        if (PyUnicode_CompareWithASCIIString(py_keyword, parameters[i]) == 0) return i;
    return -1;
}

int stx_py_args_bind(const char *function, const char *const *parameters, Py_ssize_t count,
                     PyObject *const *py_arguments, Py_ssize_t positional_count,
                     PyObject *py_keywords, PyObject **py_bound) {
    const Py_ssize_t keywords_count = py_keywords == NULL ? 0 : PyTuple_Size(py_keywords);
    if (positional_count > count) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd positional arguments but %zd were given",
                     function, count, positional_count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        py_bound[i] = i < positional_count ? py_arguments[i] : NULL;
    for (Py_ssize_t i = 0; i < keywords_count; i++) {
        PyObject *py_keyword = PyTuple_GetItem(py_keywords, i);
        const Py_ssize_t at = find_parameter(parameters, count, py_keyword);
        if (at < 0 || py_bound[at] != NULL) {
            PyErr_Format(PyExc_TypeError,
                         at < 0 ? "%s() got an unexpected keyword argument '%U'"
                                : "%s() got multiple values for argument '%U'",
                         function, py_keyword);
            return -1;
        }
        py_bound[at] = py_arguments[positional_count + i];
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (py_bound[i] == NULL) return fail_missing(function, parameters, count, py_bound);
    return 0;
}

PyObject *stx_py_args_name(const char *function, PyObject *const *py_arguments,
                           Py_ssize_t positional_count, PyObject *py_keywords) {
    static const char *const parameters[] = {"name"};
    PyObject *py_bound[1];
    if (stx_py_args_bind(function, parameters, 1, py_arguments, positional_count, py_keywords,
                         py_bound) != 0)
        return NULL;
    return py_bound[0];
}
