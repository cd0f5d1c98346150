/* SPDX-License-Identifier: Apache-2.0
 *
 * What can go wrong, said once: a status to branch on and a struct with the details.
 *
 * Every fallible function of the core returns `enum stx_status` and takes `struct stx_err *err` as
 * its last argument, never NULL. On STX_OK the struct is untouched; on anything else it is filled.
 * Nothing here prints, exits or allocates. Statuses are for the world (files, kernels, memory);
 * assertions are for our own mistakes.
 */
#ifndef STX_ERR_H
#define STX_ERR_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum stx_status {
    STX_OK = 0,
    STX_ERR_FORMAT,      /* the file's bytes are not a valid safetensors file */
    STX_ERR_IO,          /* the system refused; `sys_errno` says how */
    STX_ERR_MEMORY,      /* an allocation failed */
    STX_ERR_UNSUPPORTED, /* valid perhaps, but not served here: the next in line decides */
    STX_ERR_DEVICE,      /* the runtime of a device refused */
};

#define STX_ERR_MESSAGE_BYTES 256

/* Caller-owned; valid text and numbers only after a status other than STX_OK. */
struct stx_err {
    enum stx_status status;
    int sys_errno;           /* 0 unless STX_ERR_IO */
    uint64_t position_bytes; /* where in the file, for STX_ERR_FORMAT; else 0 */
    char message[STX_ERR_MESSAGE_BYTES];
};

#define STX_NODISCARD __attribute__((warn_unused_result))

/* Fill `err` and return its status, so that a site reads `return stx_err_set(...)`.
 * A message longer than the buffer is cut. Any thread. */
enum stx_status stx_err_set(struct stx_err *err, enum stx_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* A format error at byte `position_bytes` of the file. */
enum stx_status stx_err_set_at(struct stx_err *err, uint64_t position_bytes, const char *format,
                               ...) __attribute__((format(printf, 3, 4)));

/* A system error; `sys_errno` is the errno value, `operation` the failing call's name. */
enum stx_status stx_err_set_errno(struct stx_err *err, int sys_errno, const char *operation);

/* A status in one word, as it is told to people. Static. */
const char *stx_err_name(enum stx_status status);

/* Return early, only while nothing is held: otherwise go to one `out:` label. */
#define STX_TRY(expression)                              \
    do {                                                 \
        const enum stx_status stx_status = (expression); \
        if (stx_status != STX_OK) return stx_status;     \
    } while (0)

#ifdef __cplusplus
}
#endif

#endif
