/* SPDX-License-Identifier: Apache-2.0
 *
 * Asks mincore about samples, and /proc and /sys about memory. A control group counts where its
 * files are found at the usual mount point; its inactive file pages count as free, as the kernel
 * gives them up first.
 */
#include "residency.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checked.h"
#include "trace.h"

#define SAMPLES_MAX 64
#define STEP_BYTES_MIN (UINT64_C(256) << 10)
#define TEXT_BYTES 8192

enum stx_residency stx_residency_ask(const struct stx_mapping *mapping,
                                     const struct stx_range *ranges, size_t count) {
    uint64_t total_bytes = 0, passed_bytes = 0, sample = 0;
    uint32_t resident_pages = 0, asked_pages = 0;
    const uint64_t begin_ns = stx_trace_begin();
    for (size_t i = 0; i < count; i++) total_bytes += ranges[i].end_bytes - ranges[i].begin_bytes;
    if (total_bytes == 0) return STX_RESIDENCY_WARM;
    const uint64_t step_bytes = stx_max_u64(total_bytes / SAMPLES_MAX, STEP_BYTES_MIN);
    for (size_t i = 0; i < count; i++) {
        const uint64_t size_bytes = ranges[i].end_bytes - ranges[i].begin_bytes;
        while (sample < passed_bytes + size_bytes) { /* this range holds the byte `sample` */
            const uint64_t begin = ranges[i].begin_bytes + (sample - passed_bytes);
            const uint64_t end = stx_min_u64(begin + step_bytes, ranges[i].end_bytes);
            stx_mapping_sample(mapping, begin, end, &resident_pages, &asked_pages);
            sample += step_bytes;
        }
        passed_bytes += size_bytes;
    }
    const bool is_warm = resident_pages >= asked_pages - asked_pages / 10;
    const enum stx_residency found = is_warm ? STX_RESIDENCY_WARM : STX_RESIDENCY_COLD;
    const enum stx_residency residency = asked_pages == 0 ? STX_RESIDENCY_UNKNOWN : found;
    STX_TRACE(STX_TRACE_CACHE, begin_ns, stx_mapping_label(mapping), stx_residency_name(residency),
              total_bytes, asked_pages * (uint64_t)sysconf(_SC_PAGESIZE),
              resident_pages * (uint64_t)sysconf(_SC_PAGESIZE));
    return residency;
}

const char *stx_residency_name(enum stx_residency residency) {
    static const char *const names[] = {[STX_RESIDENCY_UNKNOWN] = "unknown",
                                        [STX_RESIDENCY_COLD] = "cold",
                                        [STX_RESIDENCY_WARM] = "warm"};
    return names[residency];
}

/* The beginning of a small file as text; false if there is none. */
static bool read_text(const char *path, char text[TEXT_BYTES]) {
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return false;
    const ssize_t got = read(fd, text, TEXT_BYTES - 1);
    (void)close(fd);
    text[got < 0 ? 0 : got] = '\0';
    return got > 0;
}

/* The number behind `label`, or `otherwise`. */
static uint64_t number_after(const char *text, const char *label, uint64_t otherwise) {
    const char *at = strstr(text, label);
    char *end = NULL;
    if (at == NULL) return otherwise;
    at += strlen(label);
    const uint64_t number = strtoull(at, &end, 10);
    return end == at ? otherwise : number;
}

static uint64_t number_in(const char *path, uint64_t otherwise) {
    char text[TEXT_BYTES];
    return read_text(path, text) ? number_after(text, "", otherwise) : otherwise;
}

/* What a group of `limit_bytes` has left; `statistics` is its memory.stat. */
static uint64_t left_in_group(uint64_t limit_bytes, uint64_t used_bytes, const char *statistics,
                              const char *label) {
    char text[TEXT_BYTES];
    if (limit_bytes == UINT64_MAX) return UINT64_MAX;
    const uint64_t inactive = read_text(statistics, text) ? number_after(text, label, 0) : 0;
    used_bytes -= stx_min_u64(used_bytes, inactive);
    return limit_bytes - stx_min_u64(limit_bytes, used_bytes);
}

/* The path of this process's group below `root`, with `file` in it; the root's own where a
 * container shows nothing else. */
static void group_file(char path[TEXT_BYTES], const char *root, const char *group,
                       const char *file) {
    (void)snprintf(path, TEXT_BYTES, "%s%s/%s", root, group, file);
    if (access(path, R_OK) != 0) (void)snprintf(path, TEXT_BYTES, "%s/%s", root, file);
}

static uint64_t free_in_group(void) {
    char text[TEXT_BYTES], limit[TEXT_BYTES], used[TEXT_BYTES], statistics[TEXT_BYTES];
    char group[TEXT_BYTES / 4] = "";
    const char *line = read_text("/proc/self/cgroup", text) ? strstr(text, "0::/") : NULL;
    if (line != NULL) {
        const size_t length = strcspn(line + 3, "\n");
        if (length < sizeof group) memcpy(group, line + 3, length);
        if (length < sizeof group) group[length] = '\0';
    }
    group_file(limit, "/sys/fs/cgroup", group, "memory.max");
    group_file(used, "/sys/fs/cgroup", group, "memory.current");
    group_file(statistics, "/sys/fs/cgroup", group, "memory.stat");
    const uint64_t second = left_in_group(number_in(limit, UINT64_MAX), number_in(used, 0),
                                          statistics, "inactive_file ");
    const uint64_t first =
        left_in_group(number_in("/sys/fs/cgroup/memory/memory.limit_in_bytes", UINT64_MAX),
                      number_in("/sys/fs/cgroup/memory/memory.usage_in_bytes", 0),
                      "/sys/fs/cgroup/memory/memory.stat", "total_inactive_file ");
    return stx_min_u64(first, second);
}

uint64_t stx_residency_free_bytes(void) {
    char text[TEXT_BYTES];
    uint64_t free_bytes = UINT64_MAX;
    if (read_text("/proc/meminfo", text))
        free_bytes = number_after(text, "MemAvailable:", UINT64_MAX / 1024) * 1024;
    return stx_min_u64(free_bytes, free_in_group()) / 4;
}
