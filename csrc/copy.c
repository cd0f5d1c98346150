/* SPDX-License-Identifier: Apache-2.0
 *
 * Each thread gets the same number of bytes: a stretch of all pieces laid end to end.
 */
#include "copy.h"

#include <string.h>
#include <unistd.h>

#include "checked.h"
#include "thread.h"

#define THREADS_MAX 4
/* Less than this is not worth a thread. */
#define SHARE_BYTES_MIN (UINT64_C(4) << 20)

struct share {
    const struct stx_copy *copies;
    size_t count;
    uint64_t begin_bytes; /* of the stretch */
    uint64_t end_bytes;
    pthread_t thread;
};

static void *copy_share(void *argument) {
    const struct share *share = argument;
    uint64_t at_bytes = 0;
    for (size_t i = 0; i < share->count && at_bytes < share->end_bytes; i++) {
        const struct stx_copy *copy = &share->copies[i];
        const uint64_t begin = stx_max_u64(at_bytes, share->begin_bytes);
        const uint64_t end = stx_min_u64(at_bytes + copy->size_bytes, share->end_bytes);
        if (begin < end)
            memcpy(copy->target + (begin - at_bytes), copy->source + (begin - at_bytes),
                   (size_t)(end - begin));
        at_bytes += copy->size_bytes;
    }
    return NULL;
}

void stx_copy_run(const struct stx_copy *copies, size_t count) {
    struct share shares[THREADS_MAX];
    bool started[THREADS_MAX] = {false};
    uint64_t total_bytes = 0;
    for (size_t i = 0; i < count; i++) total_bytes += copies[i].size_bytes;
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    const uint64_t most = processors > 0 ? (uint64_t)processors : 1;
    const uint64_t shares_count =
        stx_max_u64(1, stx_min_u64(stx_min_u64(most, THREADS_MAX), total_bytes / SHARE_BYTES_MIN));
    const uint64_t share_bytes = total_bytes / shares_count + 1;
    for (uint64_t i = 0; i < shares_count; i++) {
        shares[i] = (struct share){.copies = copies,
                                   .count = count,
                                   .begin_bytes = i * share_bytes,
                                   .end_bytes = stx_min_u64((i + 1) * share_bytes, total_bytes)};
        started[i] = i != 0 && stx_thread_start(&shares[i].thread, copy_share, &shares[i]) == 0;
    }
    for (uint64_t i = 0; i < shares_count; i++)
        if (!started[i]) (void)copy_share(&shares[i]);
    for (uint64_t i = 0; i < shares_count; i++)
        if (started[i]) (void)pthread_join(shares[i].thread, NULL);
}
