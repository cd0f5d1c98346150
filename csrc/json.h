/* SPDX-License-Identifier: Apache-2.0
 *
 * The walk over a header's JSON, through a C visitor: the seam that keeps the parser replaceable.
 *
 * The walker checks syntax and types (objects, strings, unsigned integers, two offsets, no field
 * twice); what the numbers mean is the visitor's business. It is at least as strict as the
 * reference reader's JSON parser; where it is stricter it answers STX_ERR_UNSUPPORTED, and the
 * reference reader has the last word.
 */
#ifndef STX_JSON_H
#define STX_JSON_H

#include <stddef.h>
#include <stdint.h>

#include "err.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes that must be readable behind the text (their values do not matter). */
#define STX_JSON_PADDING_BYTES 64

/* One tensor entry. Everything is borrowed until the visitor's function returns. */
struct stx_json_tensor {
    const char *name; /* UTF-8, escapes decoded, may hold NUL */
    size_t name_bytes;
    const char *dtype;
    size_t dtype_bytes;
    const uint64_t *shape;
    size_t rank;
    uint64_t begin; /* relative to the first data byte */
    uint64_t end;
};

/* Called in the header's order. A status other than STX_OK ends the walk and is its result. */
struct stx_json_visitor {
    void *context;
    /* Forget everything: the walk begins anew. Called at most once. */
    void (*restart)(void *context);
    /* `__metadata__` is there (also when it is empty). */
    enum stx_status (*metadata_begin)(void *context, struct stx_err *err);
    enum stx_status (*metadata_pair)(void *context, const char *key, size_t key_bytes,
                                     const char *value, size_t value_bytes, struct stx_err *err);
    enum stx_status (*tensor)(void *context, const struct stx_json_tensor *tensor,
                              struct stx_err *err);
};

/* Walk `text_bytes` of JSON. `text` is borrowed during the call and has STX_JSON_PADDING_BYTES
 * behind it. Errors: STX_ERR_FORMAT (position relative to `text`), STX_ERR_UNSUPPORTED,
 * STX_ERR_MEMORY, or what the visitor answered. Any thread. */
enum stx_status stx_json_walk(const char *text, size_t text_bytes,
                              const struct stx_json_visitor *visitor,
                              struct stx_err *err) STX_NODISCARD;

#ifdef __cplusplus
}
#endif

#endif
