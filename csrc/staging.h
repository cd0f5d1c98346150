/* SPDX-License-Identifier: Apache-2.0
 *
 * The way from files to a device: a ring of slots in memory that the device reads quickly. Files
 * are read into a slot, the slot is copied, and is free again when its copies have happened.
 *
 * One ring serves all loads to a device, for pinning memory is slow: it is made once and kept.
 * Guarantees: a slot is never handed out while a copy may still read it; the I/O side never waits
 * for the device unless it says so. Where the device cannot pin, copies are slower and no less
 * right. Any thread; slots are taken and sent between enter and leave of the device.
 */
#ifndef STX_STAGING_H
#define STX_STAGING_H

#include <stdbool.h>
#include <stdint.h>

#include "device.h"
#include "err.h"

#define STX_STAGING_SLOT_BYTES (UINT64_C(4) << 20)
#define STX_STAGING_BYTES (UINT64_C(64) << 20)
#define STX_STAGING_SLOTS_MIN 2

struct stx_staging; /* opaque */

/* A ring of about `size_bytes` for `device`, whose `ops` and `index` are set and which is the
 * ring's from here on. Errors: STX_ERR_MEMORY, STX_ERR_DEVICE. */
enum stx_status stx_staging_open(struct stx_staging **staging, const struct stx_device *device,
                                 uint64_t size_bytes, struct stx_err *err) STX_NODISCARD;

/* No load uses it and no copy is under way. NULL is fine. */
void stx_staging_close(struct stx_staging *staging);

/* The process's ring for a device, made by the first who asks; its size is that one's. Errors: as
 * stx_staging_open. A forked child makes its own. */
enum stx_status stx_staging_get(struct stx_staging **staging, const struct stx_device_ops *ops,
                                int index, uint64_t size_bytes, struct stx_err *err) STX_NODISCARD;

struct stx_device *stx_staging_device(struct stx_staging *staging);
bool stx_staging_is_pinned(const struct stx_staging *staging);

/* A free slot, aligned to 4096, for the caller to fill; `*memory` is NULL if there is none within
 * about `wait_ms`. Errors: STX_ERR_DEVICE. */
enum stx_status stx_staging_take(struct stx_staging *staging, uint32_t wait_ms, char **memory,
                                 struct stx_err *err) STX_NODISCARD;

/* The copies out of a slot, of `size_bytes`, are begun: it becomes free when they have happened.
 * Whatever this returns, the slot is not the caller's any more. Errors: STX_ERR_DEVICE. */
enum stx_status stx_staging_send(struct stx_staging *staging, char *memory, uint64_t size_bytes,
                                 struct stx_err *err) STX_NODISCARD;

/* Wait until all copies so far have happened: what anybody does from then on comes after them.
 * `mark` is set on the way. Errors: STX_ERR_DEVICE, also where all went well at a second try. */
enum stx_status stx_staging_drain(struct stx_staging *staging, void *mark,
                                  struct stx_err *err) STX_NODISCARD;

/* A slot from which nothing was copied is not needed. */
void stx_staging_give_back(struct stx_staging *staging, char *memory);

#endif
