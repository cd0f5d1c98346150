/* SPDX-License-Identifier: Apache-2.0
 *
 * What every C test uses: CHECK ends the program with status 1 and the line, status 77 skips.
 */
#ifndef STX_TEST_CHECK_H
#define STX_TEST_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

/* A small seeded generator (xorshift), so that a failure comes back. */
static inline uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline uint64_t random_below(uint64_t *state, uint64_t bound) {
    return next_random(state) % bound;
}

#endif
