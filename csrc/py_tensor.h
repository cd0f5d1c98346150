/* SPDX-License-Identifier: Apache-2.0
 *
 * torch tensors over mapped bytes, or over memory of our own. The only file besides its .c that
 * knows DLPack and torch.
 *
 * A tensor made here has a storage of its own of exactly its bytes, at offset 0, contiguous and
 * writable, and is one user of the mapping or the arena until torch drops that storage. GIL held
 * throughout.
 */
#ifndef STX_PY_TENSOR_H
#define STX_PY_TENSOR_H

#include <stdbool.h>

#include "arena.h"
#include "header.h"
#include "mapping.h"
#include "py_modes.h"
#include "py_state.h"

/* Import torch and look up what is needed, once. 0, or -1 with an exception. */
int stx_py_torch_load(struct stx_py_state *state);

/* Drop what stx_py_torch_load took; for the module's clear. */
void stx_py_torch_clear(struct stx_py_state *state);

/* Whether a tensor like this is made here at all. Not: 6-bit types and odd 4-bit rows (stock's
 * error is due), more dimensions than torch's own limit, extents beyond int64. Pure. */
bool stx_py_tensor_is_native(const struct stx_tensor *tensor);

/* Where tensors of one file lie. Borrowed by whoever makes a tensor, for that call. */
struct stx_py_place {
    struct stx_mapping *mapping;
    uint64_t data_begin_bytes;
    bool ahead; /* what is touched may have to come from the disk: tell the read-ahead */
};

/* A new tensor over the bytes of `tensor` in `place`. Requires stx_py_tensor_is_native. NULL with
 * an exception. */
PyObject *stx_py_tensor_make(struct stx_py_state *state, const struct stx_py_place *place,
                             const struct stx_tensor *tensor);

/* `tensor`'s shape as a new list of int. NULL with an exception. */
PyObject *stx_py_tensor_shape(const struct stx_tensor *tensor);

/* A new tensor whose bytes lie at `offset_bytes` of `arena`, which it becomes a user of; when it is
 * dropped, its pages go back. Requires stx_py_tensor_is_native. NULL with an exception. */
PyObject *stx_py_tensor_make_owned(struct stx_py_state *state, struct stx_arena *arena,
                                   uint64_t offset_bytes, const struct stx_tensor *tensor);

#endif
