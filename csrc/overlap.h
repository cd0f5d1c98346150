/* SPDX-License-Identifier: Apache-2.0
 *
 * Whether several headers have a tensor's name in common. Pure, and linear in the number of names,
 * for the many files of one model that are opened together.
 */
#ifndef STX_OVERLAP_H
#define STX_OVERLAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"
#include "header.h"

/* One header's share: the tensors with a flag in `keep`, or all. Both are borrowed. */
struct stx_overlap_part {
    const struct stx_header *header;
    const uint8_t *keep; /* in offset order; NULL keeps all */
};

/* `*found`: some name is in more than one part. It may also be true when none is, where names were
 * made to have hashes in a row: whoever wants to know which ones has to look anyway. Errors:
 * STX_ERR_MEMORY. */
enum stx_status stx_overlap_find(bool *found, const struct stx_overlap_part *parts,
                                 size_t parts_count, struct stx_err *err) STX_NODISCARD;

#endif
