/* SPDX-License-Identifier: Apache-2.0
 *
 * Arithmetic on sizes and offsets that cannot wrap unseen. All values are `uint64_t` bytes or
 * counts; the checked forms answer false on overflow and leave the result unspecified.
 */
#ifndef STX_CHECKED_H
#define STX_CHECKED_H

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>

static inline bool stx_checked_add(uint64_t a, uint64_t b, uint64_t *sum) {
    return !__builtin_add_overflow(a, b, sum);
}

static inline bool stx_checked_mul(uint64_t a, uint64_t b, uint64_t *product) {
    return !__builtin_mul_overflow(a, b, product);
}

static inline uint64_t stx_min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }

static inline uint64_t stx_max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* `alignment` is a power of two. */
static inline uint64_t stx_align_down(uint64_t value, uint64_t alignment) {
    assert(alignment != 0 && (alignment & (alignment - 1)) == 0);
    return value & ~(alignment - 1);
}

/* Saturates at the largest aligned value instead of wrapping. */
static inline uint64_t stx_align_up(uint64_t value, uint64_t alignment) {
    uint64_t sum;
    if (!stx_checked_add(value, alignment - 1, &sum)) return ~(alignment - 1);
    return stx_align_down(sum, alignment);
}

#endif
