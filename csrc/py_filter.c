/* SPDX-License-Identifier: Apache-2.0
 *
 * Runs filters.
 *
 * DESIGN. The Python side normalises whatever the user gave into a rule: nested tuples
 * (operation, operands). They are read once per load into a tree of structs and then evaluated
 * for each header entry; names are matched on the header's own bytes, without making a Python
 * string, and only a "call" rule enters Python. The tree borrows from the tuples, which the caller
 * holds.
 *
 *   ("all" | "any" | "none", (rule, ...))      ("names", frozenset)      ("call", callable)
 *   ("glob" | "prefixes", (str, ...))          ("layers", start, stop)
 *   ("experts", frozenset of int, keep_scales)
 *   ("index", dict of name -> base name of its file, frozenset of these files)
 */
#include "py_filter.h"

#include "match.h"

#define DEPTH_MAX 32

enum operation {
    OP_ALL,
    OP_ANY,
    OP_NONE,
    OP_GLOB,
    OP_PREFIXES,
    OP_NAMES,
    OP_LAYERS,
    OP_EXPERTS,
    OP_INDEX,
    OP_CALL
};

/* Everything behind the pointers is borrowed from the rule's tuples, but the arrays. */
struct rule {
    enum operation operation;
    struct rule *children;  /* OP_ALL, OP_ANY, OP_NONE */
    struct stx_text *texts; /* OP_GLOB, OP_PREFIXES */
    size_t count;           /* of children or texts */
    PyObject *py_operand;   /* OP_NAMES, OP_EXPERTS: frozenset; OP_INDEX: dict; OP_CALL: callable */
    PyObject *py_files;     /* OP_INDEX: frozenset */
    uint64_t start, stop;   /* OP_LAYERS */
    bool keep_scales;       /* OP_EXPERTS */
};

/* What one evaluation looks at. */
struct subject {
    struct stx_py_state *state;
    struct stx_py_names *names;
    size_t index;
    struct stx_text name;
    PyObject *py_filename;
    bool asked_python;
};

/* --- reading a rule --- */

static void free_rule(struct rule *rule) {
    for (size_t i = 0; rule->children != NULL && i < rule->count; i++)
        free_rule(&rule->children[i]);
    PyMem_Free(rule->children);
    PyMem_Free(rule->texts);
}

static int read_texts(struct rule *rule, PyObject *py_texts) {
    const Py_ssize_t count = PyTuple_Size(py_texts);
    if (count < 0) return -1;
    rule->texts = PyMem_Calloc((size_t)count + 1, sizeof *rule->texts);
    if (rule->texts == NULL) return PyErr_NoMemory(), -1;
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t size_bytes = 0;
        const char *bytes = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(py_texts, i), &size_bytes);
        if (bytes == NULL) return -1;
        rule->texts[i] = (struct stx_text){.bytes = bytes, .size_bytes = (size_t)size_bytes};
        rule->count++;
    }
    return 0;
}

static int read_rule(struct rule *rule, PyObject *py_rule, int depth);

static int read_children(struct rule *rule, PyObject *py_rules, int depth) {
    const Py_ssize_t count = PyTuple_Size(py_rules);
    if (count < 0) return -1;
    rule->children = PyMem_Calloc((size_t)count + 1, sizeof *rule->children);
    if (rule->children == NULL) return PyErr_NoMemory(), -1;
    for (Py_ssize_t i = 0; i < count; i++) {
        rule->count++; /* a child that was read half is freed too */
        if (read_rule(&rule->children[i], PyTuple_GetItem(py_rules, i), depth + 1) != 0) return -1;
    }
    return 0;
}

static int read_layers(struct rule *rule, PyObject *py_rule) {
    rule->start = PyLong_AsUnsignedLongLong(PyTuple_GetItem(py_rule, 1));
    rule->stop = PyLong_AsUnsignedLongLong(PyTuple_GetItem(py_rule, 2));
    return PyErr_Occurred() == NULL ? 0 : -1;
}

static int read_experts(struct rule *rule, PyObject *py_rule, PyObject *py_ids) {
    PyObject *py_keep_scales = PyTuple_GetItem(py_rule, 2);
    const int keep_scales = py_keep_scales == NULL ? -1 : PyObject_IsTrue(py_keep_scales);
    rule->py_operand = py_ids;
    rule->keep_scales = keep_scales == 1;
    return keep_scales < 0 ? -1 : 0;
}

static int read_rule(struct rule *rule, PyObject *py_rule, int depth) {
    static const char *const operations[] = {"all",   "any",    "none",    "glob",  "prefixes",
                                             "names", "layers", "experts", "index", "call"};
    PyObject *py_operation = depth < DEPTH_MAX ? PyTuple_GetItem(py_rule, 0) : NULL;
    PyObject *py_operand = py_operation == NULL ? NULL : PyTuple_GetItem(py_rule, 1);
    if (py_operand == NULL) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "filters nested too deeply");
        return -1;
    }
    for (int i = OP_ALL; i <= OP_CALL; i++) {
        if (PyUnicode_CompareWithASCIIString(py_operation, operations[i]) != 0) continue;
        rule->operation = (enum operation)i;
        switch (rule->operation) {
            case OP_ALL:
            case OP_ANY:
            case OP_NONE:
                return read_children(rule, py_operand, depth);
            case OP_GLOB:
            case OP_PREFIXES:
                return read_texts(rule, py_operand);
            case OP_LAYERS:
                return read_layers(rule, py_rule);
            case OP_EXPERTS:
                return read_experts(rule, py_rule, py_operand);
            case OP_INDEX:
                rule->py_files = PyTuple_GetItem(py_rule, 2);
                rule->py_operand = py_operand;
                return rule->py_files == NULL ? -1 : 0;
            case OP_NAMES:
            case OP_CALL:
                rule->py_operand = py_operand;
                return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "unknown filter operation %R", py_operation);
    return -1;
}

/* --- evaluating: 1 keep, 0 leave out, -1 exception --- */

static int call_filter(const struct subject *subject, PyObject *py_callable) {
    const struct stx_tensor *tensor = &subject->names->header->tensors[subject->index];
    PyObject *py_name = stx_py_names_get(subject->names, subject->index);
    PyObject *py_shape = py_name == NULL ? NULL : PyTuple_New((Py_ssize_t)tensor->rank);
    if (py_shape == NULL) return -1;
    for (uint32_t i = 0; i < tensor->rank; i++) {
        PyObject *py_extent = PyLong_FromUnsignedLongLong(tensor->shape[i]);
        if (py_extent == NULL || PyTuple_SetItem(py_shape, (Py_ssize_t)i, py_extent) != 0) {
            Py_DECREF(py_shape);
            return -1;
        }
    }
    PyObject *py_key = PyObject_CallFunction(
        subject->state->tensor_key, "OsNKO", py_name, stx_dtype_info(tensor->dtype)->name, py_shape,
        (unsigned long long)(tensor->end - tensor->begin), subject->py_filename);
    if (py_key == NULL) return -1;
    PyObject *py_answer = PyObject_CallFunctionObjArgs(py_callable, py_key, NULL);
    Py_DECREF(py_key);
    if (py_answer == NULL) return -1;
    const int keep = PyObject_IsTrue(py_answer);
    Py_DECREF(py_answer);
    return keep;
}

/* What belongs to no expert is kept, and every expert's scales where they are wanted. */
static int evaluate_experts(const struct rule *rule, const struct subject *subject) {
    uint64_t number = 0;
    bool is_weight = false;
    if (!stx_match_expert(subject->name, &number, &is_weight)) return 1;
    if (rule->keep_scales && !is_weight) return 1;
    PyObject *py_number = PyLong_FromUnsignedLongLong(number);
    if (py_number == NULL) return -1;
    const int keep = PySet_Contains(rule->py_operand, py_number);
    Py_DECREF(py_number);
    return keep;
}

static int evaluate(const struct rule *rule, struct subject *subject);

/* The first child that decides ends it, so an expensive callable can stand behind a cheap glob. */
static int evaluate_children(const struct rule *rule, struct subject *subject) {
    for (size_t i = 0; i < rule->count; i++) {
        const int child = evaluate(&rule->children[i], subject);
        if (child < 0) return -1;
        if (rule->operation == OP_ALL && child == 0) return 0;
        if (rule->operation != OP_ALL && child == 1) return rule->operation == OP_ANY;
    }
    return rule->operation != OP_ANY;
}

/* The last component of the path being opened; empty where there is no path. A new reference. */
static PyObject *get_file(const struct subject *subject) {
    if (!PyUnicode_Check(subject->py_filename)) return PyUnicode_FromString("");
    const Py_ssize_t length = PyUnicode_GetLength(subject->py_filename);
    const Py_ssize_t slash = PyUnicode_FindChar(subject->py_filename, '/', 0, length, -1);
    return slash == -2 ? NULL : PyUnicode_Substring(subject->py_filename, slash + 1, length);
}

/* In the file that the index says; in a file the index does not know, by the name alone. */
static int evaluate_index(const struct rule *rule, struct subject *subject) {
    PyObject *py_name = stx_py_names_get(subject->names, subject->index);
    PyObject *py_wanted =
        py_name == NULL ? NULL : PyDict_GetItemWithError(rule->py_operand, py_name);
    if (py_wanted == NULL) return PyErr_Occurred() == NULL ? 0 : -1;
    PyObject *py_file = get_file(subject);
    int keep = py_file == NULL ? -1 : PySet_Contains(rule->py_files, py_file);
    if (keep == 0)
        keep = 1;
    else if (keep == 1)
        keep = PyObject_RichCompareBool(py_file, py_wanted, Py_EQ);
    Py_XDECREF(py_file);
    subject->asked_python = true; /* the same header in another file is another question */
    return keep;
}

static int evaluate(const struct rule *rule, struct subject *subject) {
    PyObject *py_name;
    switch (rule->operation) {
        case OP_ALL:
        case OP_ANY:
        case OP_NONE:
            return evaluate_children(rule, subject);
        case OP_GLOB:
            for (size_t i = 0; i < rule->count; i++)
                if (stx_match_glob(rule->texts[i], subject->name)) return 1;
            return 0;
        case OP_PREFIXES:
            for (size_t i = 0; i < rule->count; i++)
                if (stx_match_prefix(rule->texts[i], subject->name)) return 1;
            return 0;
        case OP_LAYERS:
            return stx_match_layers(rule->start, rule->stop, subject->name);
        case OP_EXPERTS:
            return evaluate_experts(rule, subject);
        case OP_INDEX:
            return evaluate_index(rule, subject);
        case OP_NAMES:
            py_name = stx_py_names_get(subject->names, subject->index);
            return py_name == NULL ? -1 : PySet_Contains(rule->py_operand, py_name);
        case OP_CALL:
            break;
    }
    return call_filter(subject, rule->py_operand);
}

static bool has_callable(const struct rule *rule) {
    if (rule->operation == OP_CALL) return true;
    for (size_t i = 0; rule->children != NULL && i < rule->count; i++)
        if (has_callable(&rule->children[i])) return true;
    return false;
}

static int load_tensor_key(struct stx_py_state *state) {
    if (state->tensor_key != NULL) return 0;
    PyObject *py_module = PyImport_ImportModule("stx_patch._filter");
    if (py_module == NULL) return -1;
    state->tensor_key = PyObject_GetAttrString(py_module, "TensorKey");
    Py_DECREF(py_module);
    return state->tensor_key == NULL ? -1 : 0;
}

int stx_py_filter_run(struct stx_py_state *state, PyObject *py_rule, PyObject *py_filename,
                      struct stx_py_names *names, uint8_t *keep, bool *asked_python) {
    struct rule rule = {.operation = OP_ALL};
    struct subject subject = {.state = state, .names = names, .py_filename = py_filename};
    int result = -1;
    if (load_tensor_key(state) != 0 || read_rule(&rule, py_rule, 0) != 0) goto out;
    for (size_t i = 0; i < names->header->tensors_count; i++) {
        const struct stx_tensor *tensor = &names->header->tensors[i];
        subject.index = i;
        subject.name = (struct stx_text){.bytes = tensor->name, .size_bytes = tensor->name_bytes};
        const int decision = evaluate(&rule, &subject);
        if (decision < 0) goto out;
        keep[i] = (uint8_t)decision;
    }
    if (asked_python != NULL) *asked_python = subject.asked_python || has_callable(&rule);
    result = 0;
out:
    free_rule(&rule);
    return result;
}

PyObject *stx_py_filter_match(PyObject *py_module, PyObject *py_arguments) {
    struct stx_py_state *state = PyModule_GetState(py_module);
    PyObject *py_rule, *py_name;
    Py_ssize_t name_bytes = 0;
    uint8_t keep = 0;
    if (!PyArg_ParseTuple(py_arguments, "OU:match_rule", &py_rule, &py_name)) return NULL;
    const char *name = PyUnicode_AsUTF8AndSize(py_name, &name_bytes);
    if (name == NULL) return NULL;
    struct stx_tensor tensor = {.name = name, .name_bytes = (uint32_t)name_bytes};
    const struct stx_header header = {.tensors = &tensor, .tensors_count = 1};
    struct stx_py_names names = {0};
    if (stx_py_names_init(&names, &header) != 0) return NULL;
    const int failed = stx_py_filter_run(state, py_rule, Py_None, &names, &keep, NULL);
    stx_py_names_free(&names);
    return failed ? NULL : PyBool_FromLong(keep);
}
