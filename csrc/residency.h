/* SPDX-License-Identifier: Apache-2.0
 *
 * What this machine has at the moment: how much of a mapping is in the page cache, and how much
 * memory is free to read ahead into. Answers are guesses that cost microseconds; nothing but speed
 * depends on them.
 */
#ifndef STX_RESIDENCY_H
#define STX_RESIDENCY_H

#include <stddef.h>
#include <stdint.h>

#include "follow.h"
#include "mapping.h"

enum stx_residency {
    STX_RESIDENCY_UNKNOWN = 0, /* the system does not tell; treated as cold */
    STX_RESIDENCY_COLD,
    STX_RESIDENCY_WARM, /* nine tenths or more */
};

/* Look at samples of `ranges`, which ascend: spread evenly over their bytes, at most 64. Nothing to
 * read is warm. */
enum stx_residency stx_residency_ask(const struct stx_mapping *mapping,
                                     const struct stx_range *ranges, size_t count);

/* In one word. Static. */
const char *stx_residency_name(enum stx_residency residency);

/* How many bytes may be read ahead of a consumer where nobody says: a quarter of the memory that is
 * available to this process, by /proc/meminfo and its control group. */
uint64_t stx_residency_free_bytes(void);

#endif
