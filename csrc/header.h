/* SPDX-License-Identifier: Apache-2.0
 *
 * The bytes of a safetensors header, turned into a validated table of tensors.
 *
 * A header that stx_header_parse accepts describes a file whose data section is covered by its
 * tensors exactly once, in order, without holes; every size fits and every offset lies in the
 * file. Whatever it does not accept the reference reader rejects too, or serves instead of us
 * (STX_ERR_UNSUPPORTED). The table does not change after the parse, so any number of threads may
 * read it.
 */
#ifndef STX_HEADER_H
#define STX_HEADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"
#include "err.h"

/* The format's own limit. */
#define STX_HEADER_BYTES_MAX UINT64_C(100000000)
/* The little-endian length in front of the JSON. */
#define STX_HEADER_PREFIX_BYTES 8

/* One tensor. Names and shapes are borrowed from the header until stx_header_free. */
struct stx_tensor {
    const char *name; /* UTF-8, not NUL-terminated, may hold NUL */
    const uint64_t *shape;
    uint64_t begin; /* relative to the first data byte */
    uint64_t end;
    uint32_t name_bytes;
    uint32_t rank;
    uint32_t hash; /* of the name */
    enum stx_dtype dtype;
};

struct stx_metadata_pair {
    const char *key;
    const char *value;
    uint32_t key_bytes;
    uint32_t value_bytes;
};

struct stx_header_block; /* a piece of the arena */

/* Caller-owned; a zeroed struct is an empty header. */
struct stx_header {
    struct stx_tensor *tensors; /* by (begin, end); among empty ones, unspecified */
    size_t tensors_count;
    struct stx_metadata_pair *metadata; /* in the header's order */
    size_t metadata_count;
    bool has_metadata;         /* false: `__metadata__` is absent or null */
    uint64_t data_begin_bytes; /* file offset of the first data byte */
    uint64_t file_size_bytes;
    uint32_t *slots; /* open addressing: tensor index + 1, 0 is free */
    uint32_t slots_mask;
    struct stx_header_block *arena; /* owns names, shapes, metadata text */
};

/* The length of the JSON, from the file's first 8 bytes. Errors: STX_ERR_FORMAT when the file is
 * smaller than the prefix, the length over the format's limit, or longer than the file. */
enum stx_status stx_header_length(const unsigned char *prefix, uint64_t file_size_bytes,
                                  uint64_t *json_bytes, struct stx_err *err) STX_NODISCARD;

/* Parse and validate `json_bytes` of JSON that stood at offset 8 of a file of `file_size_bytes`.
 * `json` is borrowed during the call and has STX_JSON_PADDING_BYTES readable behind it. On error
 * `header` is left empty. Errors: STX_ERR_FORMAT with the byte position in the file,
 * STX_ERR_UNSUPPORTED, STX_ERR_MEMORY. */
enum stx_status stx_header_parse(struct stx_header *header, const char *json, uint64_t json_bytes,
                                 uint64_t file_size_bytes, struct stx_err *err) STX_NODISCARD;

/* Release everything and leave an empty header. A zeroed header is fine. */
void stx_header_free(struct stx_header *header);

/* The tensor called `name`, or NULL. Constant time. */
const struct stx_tensor *stx_header_find(const struct stx_header *header, const char *name,
                                         size_t name_bytes);

/* Fill `order` (tensors_count indexes) so that the names ascend by code point, which for UTF-8 is
 * the order of their bytes. Errors: STX_ERR_MEMORY. */
enum stx_status stx_header_sort_names(const struct stx_header *header, uint32_t *order,
                                      struct stx_err *err) STX_NODISCARD;

#endif
