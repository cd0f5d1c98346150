/* SPDX-License-Identifier: Apache-2.0
 *
 * The table of safetensors dtypes: header spelling, size in bits, and the torch attribute that
 * holds the same type. Order is the format's own enum order. No Python here.
 */
#ifndef STX_DTYPE_H
#define STX_DTYPE_H

#include <stddef.h>
#include <stdint.h>

enum stx_dtype {
    STX_DTYPE_BOOL = 0,
    STX_DTYPE_F4,
    STX_DTYPE_F6_E2M3,
    STX_DTYPE_F6_E3M2,
    STX_DTYPE_U8,
    STX_DTYPE_I8,
    STX_DTYPE_F8_E5M2,
    STX_DTYPE_F8_E4M3,
    STX_DTYPE_F8_E8M0,
    STX_DTYPE_F8_E4M3FNUZ,
    STX_DTYPE_F8_E5M2FNUZ,
    STX_DTYPE_I16,
    STX_DTYPE_U16,
    STX_DTYPE_F16,
    STX_DTYPE_BF16,
    STX_DTYPE_I32,
    STX_DTYPE_U32,
    STX_DTYPE_F32,
    STX_DTYPE_C64,
    STX_DTYPE_F64,
    STX_DTYPE_I64,
    STX_DTYPE_U64,
    STX_DTYPE_COUNT
};

struct stx_dtype_info {
    const char *name;       /* as the header spells it */
    const char *torch_name; /* attribute of the torch module; NULL where torch has none */
    uint8_t bits;           /* of one element */
};

/* The row of `dtype`. Static storage. */
const struct stx_dtype_info *stx_dtype_info(enum stx_dtype dtype);

/* The dtype spelled by `name`, or STX_DTYPE_COUNT where there is none. */
enum stx_dtype stx_dtype_find(const char *name, size_t name_bytes);

#endif
