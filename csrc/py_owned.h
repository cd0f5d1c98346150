/* SPDX-License-Identifier: Apache-2.0
 *
 * Tensors in memory of their own, read from the descriptor of a handle: what backend="pread" means.
 * GIL held on entry, given up while reading; a signal that arrives meanwhile ends the reading.
 */
#ifndef STX_PY_OWNED_H
#define STX_PY_OWNED_H

#include "load.h"
#include "owned.h"
#include "py_handle.h"

/* Whether a tensor like this is made here: stock refuses to read 4-bit ones this way. Pure. */
bool stx_py_owned_is_native(const struct stx_tensor *tensor);

/* A dict of all kept tensors in file order: one block of memory, all of it made before the first
 * read. NULL with an exception, and nothing kept. */
PyObject *stx_py_owned_load(struct stx_py_handle *self, int dispatch_depth);

/* Tensor `index` in fresh memory: the exact bytes are read. NULL with an exception. */
PyObject *stx_py_owned_tensor(struct stx_py_handle *self, size_t index);

/* Rows [first, first + count) of a tensor of at least one dimension, in fresh memory, read from
 * `file`. NULL with an exception. */
PyObject *stx_py_owned_rows(struct stx_py_state *state, const struct stx_file *file,
                            uint64_t data_begin_bytes, const struct stx_tensor *tensor,
                            uint64_t first, uint64_t count);

/* What reading `file` for a handle ended with: SafetensorError as stock has it, naming the tensor
 * at `offset_bytes` of the file, or the first from `first` on that a file cut short does not hold;
 * MemoryError naming the file. NULL. */
PyObject *stx_py_owned_raise(struct stx_py_handle *self, const struct stx_file *file, size_t first,
                             uint64_t offset_bytes, const struct stx_err *err);

/* Add what a load did to the counters, and how it was done. */
void stx_py_owned_count(struct stx_py_handle *self, const struct stx_load_result *result,
                        uint64_t wanted_bytes, const struct stx_owned_way *way);

/* The core's form of a handle's options. */
struct stx_owned_options stx_py_owned_options(const struct stx_py_handle *self);

#endif
