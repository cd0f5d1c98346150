/* SPDX-License-Identifier: Apache-2.0
 *
 * When a handle reads ahead: what it is told about the consumer, turned into wishes of the
 * read-ahead. GIL held on entry; it is given up while the system is asked.
 *
 * Opening reads ahead nothing; the first tensor or slice that is asked for is read by itself; from
 * the second on the handle follows the consumer. All at once is planned first.
 */
#ifndef STX_PY_AHEAD_H
#define STX_PY_AHEAD_H

#include "py_handle.h"

/* Tensor `index` is about to be handed out. */
void stx_py_ahead_tensor(struct stx_py_handle *self, size_t index);

/* A slice is about to be handed out: nothing is read, but its consumer may be worth following. */
void stx_py_ahead_slice(struct stx_py_handle *self);

/* [begin, end) of the file, all or a part of tensor `index`, is about to be touched through a
 * slice. The caller holds a use of the mapping. Whether it was in the page cache, as far as was
 * asked. */
bool stx_py_ahead_range(const struct stx_py_place *place, size_t index, uint64_t begin_bytes,
                        uint64_t end_bytes);

/* All kept tensors are about to be handed out. 0, or -1 with an exception. */
int stx_py_ahead_all(struct stx_py_handle *self);

#endif
