/* SPDX-License-Identifier: Apache-2.0
 *
 * The dtype table, a copy of the format's list as of safetensors 0.8. Does not say whether the
 * installed torch has the type: that is asked when the first such tensor is made.
 */
#include "dtype.h"

#include <assert.h>
#include <string.h>

static const struct stx_dtype_info table[] = {
    [STX_DTYPE_BOOL] = {"BOOL", "bool", 8},
    [STX_DTYPE_F4] = {"F4", "float4_e2m1fn_x2", 4},
    [STX_DTYPE_F6_E2M3] = {"F6_E2M3", NULL, 6},
    [STX_DTYPE_F6_E3M2] = {"F6_E3M2", NULL, 6},
    [STX_DTYPE_U8] = {"U8", "uint8", 8},
    [STX_DTYPE_I8] = {"I8", "int8", 8},
    [STX_DTYPE_F8_E5M2] = {"F8_E5M2", "float8_e5m2", 8},
    [STX_DTYPE_F8_E4M3] = {"F8_E4M3", "float8_e4m3fn", 8},
    [STX_DTYPE_F8_E8M0] = {"F8_E8M0", "float8_e8m0fnu", 8},
    [STX_DTYPE_F8_E4M3FNUZ] = {"F8_E4M3FNUZ", "float8_e4m3fnuz", 8},
    [STX_DTYPE_F8_E5M2FNUZ] = {"F8_E5M2FNUZ", "float8_e5m2fnuz", 8},
    [STX_DTYPE_I16] = {"I16", "int16", 16},
    [STX_DTYPE_U16] = {"U16", "uint16", 16},
    [STX_DTYPE_F16] = {"F16", "float16", 16},
    [STX_DTYPE_BF16] = {"BF16", "bfloat16", 16},
    [STX_DTYPE_I32] = {"I32", "int32", 32},
    [STX_DTYPE_U32] = {"U32", "uint32", 32},
    [STX_DTYPE_F32] = {"F32", "float32", 32},
    [STX_DTYPE_C64] = {"C64", "complex64", 64},
    [STX_DTYPE_F64] = {"F64", "float64", 64},
    [STX_DTYPE_I64] = {"I64", "int64", 64},
    [STX_DTYPE_U64] = {"U64", "uint64", 64},
};
_Static_assert(sizeof table / sizeof table[0] == STX_DTYPE_COUNT, "one row for each dtype");

const struct stx_dtype_info *stx_dtype_info(enum stx_dtype dtype) {
    assert(dtype < STX_DTYPE_COUNT);
    return &table[dtype];
}

enum stx_dtype stx_dtype_find(const char *name, size_t name_bytes) {
    for (int dtype = 0; dtype < STX_DTYPE_COUNT; dtype++) {
        const char *candidate = table[dtype].name;
        if (strlen(candidate) == name_bytes && memcmp(candidate, name, name_bytes) == 0)
            return (enum stx_dtype)dtype;
    }
    return STX_DTYPE_COUNT;
}
