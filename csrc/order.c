/* SPDX-License-Identifier: Apache-2.0
 *
 * Sorts by comparing names where they lie. Numbers are compared by their length without leading
 * zeros, then digit by digit, so that no number is too long.
 */
#include "order.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

/* The run of digits at `*at`, without leading zeros; moves `*at` behind it. */
static uint32_t digits_at(const struct stx_tensor *tensor, uint32_t *at, const char **digits) {
    while (*at < tensor->name_bytes && tensor->name[*at] == '0') ++*at;
    const uint32_t first = *at;
    while (*at < tensor->name_bytes && is_digit(tensor->name[*at])) ++*at;
    *digits = tensor->name + first;
    return *at - first;
}

static int weigh(char c) { return c == '.' ? -1 : (unsigned char)c; }

static int compare(const struct stx_tensor *a, const struct stx_tensor *b) {
    uint32_t i = 0, j = 0;
    while (i < a->name_bytes && j < b->name_bytes) {
        if (is_digit(a->name[i]) && is_digit(b->name[j])) {
            const char *left, *right;
            const uint32_t left_count = digits_at(a, &i, &left);
            const uint32_t right_count = digits_at(b, &j, &right);
            if (left_count != right_count) return left_count < right_count ? -1 : 1;
            const int order = memcmp(left, right, left_count);
            if (order != 0) return order;
            continue;
        }
        if (a->name[i] != b->name[j]) return weigh(a->name[i]) < weigh(b->name[j]) ? -1 : 1;
        i++;
        j++;
    }
    return (a->name_bytes - i > b->name_bytes - j) - (a->name_bytes - i < b->name_bytes - j);
}

static int compare_indexes(const void *left, const void *right, void *context) {
    const struct stx_tensor *tensors = context;
    const uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    const int order = compare(&tensors[a], &tensors[b]);
    return order != 0 ? order : (a > b) - (a < b);
}

void stx_order_naturally(const struct stx_header *header, uint32_t *order) {
    for (size_t i = 0; i < header->tensors_count; i++) order[i] = (uint32_t)i;
    qsort_r(order, header->tensors_count, sizeof *order, compare_indexes, header->tensors);
}
