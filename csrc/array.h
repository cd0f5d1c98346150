/* SPDX-License-Identifier: Apache-2.0
 *
 * Room for one more element in an array that doubles: the one growth rule of the core.
 */
#ifndef STX_ARRAY_H
#define STX_ARRAY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

#define STX_ARRAY_FIRST_CAPACITY 64

/* Make `*array`, which holds `count` of `*capacity` elements of `size_bytes`, hold one more. False
 * when memory is out; the array is then as it was. Owned by the caller, freed with free(). */
static inline bool stx_array_reserve(void **array, size_t *capacity, size_t count,
                                     size_t size_bytes) {
    if (count < *capacity) return true;
    const size_t wanted = *capacity == 0 ? STX_ARRAY_FIRST_CAPACITY : *capacity * 2;
    void *grown = realloc(*array, wanted * size_bytes);
    if (grown == NULL) return false;
    *array = grown;
    *capacity = wanted;
    return true;
}

#endif
