/* SPDX-License-Identifier: Apache-2.0
 *
 * Which names a pattern means: globs, module prefixes, ranges of layers, experts. Pure, over UTF-8
 * bytes.
 */
#ifndef STX_MATCH_H
#define STX_MATCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Borrowed UTF-8 text, not NUL-terminated. */
struct stx_text {
    const char *bytes;
    size_t size_bytes;
};

/* Whether `pattern` matches the whole `name`: a name equal to the pattern does; else `*`, `?`,
 * `[set]` and `[!set]` mean what Python's fnmatch.fnmatchcase means by them. */
bool stx_match_glob(struct stx_text pattern, struct stx_text name);

/* Whether `name` is `prefix` or lies below it: "model.layers.1" is above "model.layers.1.weight"
 * and not above "model.layers.10.weight". A prefix that ends in a dot is taken as it is. */
bool stx_match_prefix(struct stx_text prefix, struct stx_text name);

/* Whether `name` has a component layers, layer, blocks, block or h followed by a component that is
 * an integer in [start, stop). */
bool stx_match_layers(uint64_t start, uint64_t stop, struct stx_text name);

/* Whether `name` belongs to an expert: a component `experts` is followed by a component that is an
 * integer. The first such integer is `*number`; `*is_weight` says whether the last component is
 * weight, weight_packed or qweight, so no scale, zero point or bias. */
bool stx_match_expert(struct stx_text name, uint64_t *number, bool *is_weight);

#endif
