/* SPDX-License-Identifier: Apache-2.0
 *
 * Fills `struct stx_err`. Guarantee: the message always ends in NUL, nothing is allocated, and no
 * output is written anywhere.
 */
#include "err.h"

#include <stdarg.h>
#include <stdio.h>  /* vsnprintf */
#include <string.h> /* strerror_r */

static void format_message(struct stx_err *err, const char *format, va_list arguments) {
    if (vsnprintf(err->message, sizeof err->message, format, arguments) < 0) err->message[0] = '\0';
}

enum stx_status stx_err_set(struct stx_err *err, enum stx_status status, const char *format, ...) {
    va_list arguments;
    err->status = status;
    err->sys_errno = 0;
    err->position_bytes = 0;
    va_start(arguments, format);
    format_message(err, format, arguments);
    va_end(arguments);
    return status;
}

enum stx_status stx_err_set_at(struct stx_err *err, uint64_t position_bytes, const char *format,
                               ...) {
    va_list arguments;
    err->status = STX_ERR_FORMAT;
    err->sys_errno = 0;
    err->position_bytes = position_bytes;
    va_start(arguments, format);
    format_message(err, format, arguments);
    va_end(arguments);
    return STX_ERR_FORMAT;
}

enum stx_status stx_err_set_errno(struct stx_err *err, int sys_errno, const char *operation) {
    char text[128];
    const char *reason = strerror_r(sys_errno, text, sizeof text); /* the GNU form returns it */
    (void)stx_err_set(err, STX_ERR_IO, "%s: %s", operation, reason);
    err->sys_errno = sys_errno;
    return STX_ERR_IO;
}

const char *stx_err_name(enum stx_status status) {
    static const char *const names[] = {[STX_OK] = "ok",
                                        [STX_ERR_FORMAT] = "format",
                                        [STX_ERR_IO] = "io",
                                        [STX_ERR_MEMORY] = "memory",
                                        [STX_ERR_UNSUPPORTED] = "unsupported",
                                        [STX_ERR_DEVICE] = "device"};
    return names[status];
}
