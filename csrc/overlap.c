/* SPDX-License-Identifier: Apache-2.0
 *
 * One table of all names by the hashes that the headers have, open addressing, at most half full.
 */
#include "overlap.h"

#include <stdlib.h>
#include <string.h>

/* As many slots in a row are no accident, as in header.c. */
#define PROBES_MAX 128

static bool is_same(const struct stx_tensor *a, const struct stx_tensor *b) {
    return a->hash == b->hash && a->name_bytes == b->name_bytes &&
           memcmp(a->name, b->name, a->name_bytes) == 0;
}

/* Put a name into the table. False: it is there, or cannot be placed. */
static bool place(const struct stx_tensor **slots, size_t mask, const struct stx_tensor *tensor) {
    for (size_t probe = 0; probe < PROBES_MAX; probe++) {
        const struct stx_tensor **const slot = &slots[(tensor->hash + probe) & mask];
        if (*slot == NULL) {
            *slot = tensor;
            return true;
        }
        if (is_same(*slot, tensor)) return false;
    }
    return false;
}

enum stx_status stx_overlap_find(bool *found, const struct stx_overlap_part *parts,
                                 size_t parts_count, struct stx_err *err) {
    size_t names_count = 0, slots_count = 16;
    for (size_t i = 0; i < parts_count; i++) names_count += parts[i].header->tensors_count;
    while (slots_count < 2 * names_count) slots_count *= 2;
    const struct stx_tensor **const slots = calloc(slots_count, sizeof *slots);
    if (slots == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for the names");
    *found = false;
    for (size_t i = 0; i < parts_count && !*found; i++) {
        const struct stx_header *const header = parts[i].header;
        for (size_t j = 0; j < header->tensors_count && !*found; j++) {
            if (parts[i].keep != NULL && parts[i].keep[j] == 0) continue;
            *found = !place(slots, slots_count - 1, &header->tensors[j]);
        }
    }
    free((void *)slots);
    return STX_OK;
}
