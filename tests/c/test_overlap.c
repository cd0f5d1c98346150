/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: two headers overlap exactly where they keep a name in common, whatever its bytes;
 * names made to fall into one slot end in "look closer", not in quadratic time.
 */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "overlap.h"

#define MANY 5000

static struct stx_err err;

/* Headers with names alone: what is asked looks at nothing else. */
static struct stx_tensor named(const char *name, size_t name_bytes, uint32_t hash) {
    return (struct stx_tensor){.name = name, .name_bytes = (uint32_t)name_bytes, .hash = hash};
}

static bool overlap(const struct stx_overlap_part *parts, size_t count) {
    bool found = false;
    CHECK(stx_overlap_find(&found, parts, count, &err) == STX_OK);
    return found;
}

static void test_few(void) {
    struct stx_tensor left[] = {named("a", 1, 7), named("b", 1, 7)};
    struct stx_tensor right[] = {named("c", 1, 7), named("b\0", 2, 7), named("b", 1, 7)};
    const struct stx_header one = {.tensors = left, .tensors_count = 2};
    struct stx_header other = {.tensors = right, .tensors_count = 2};
    const uint8_t last_left_out[] = {1, 1, 0}, b_left_out[] = {1, 0};
    struct stx_overlap_part parts[] = {{&one, NULL}, {&other, NULL}, {&other, NULL}};

    CHECK(!overlap(parts, 0));
    CHECK(!overlap(parts, 1));
    CHECK(!overlap(parts, 2)); /* "b" is not "b\0" */
    CHECK(overlap(parts, 3));
    other.tensors_count = 3;
    CHECK(overlap(parts, 2));
    parts[1].keep = last_left_out;
    CHECK(!overlap(parts, 2));
    parts[1].keep = NULL;
    parts[0].keep = b_left_out;
    CHECK(!overlap(parts, 2));
}

static void test_many(void) {
    struct stx_tensor *tensors = calloc(2 * MANY, sizeof *tensors);
    char(*names)[8] = calloc(2 * MANY, sizeof *names);
    CHECK(tensors != NULL && names != NULL);
    for (uint32_t i = 0; i < 2 * MANY; i++) {
        memcpy(names[i], &i, sizeof i);
        tensors[i] = named(names[i], sizeof i, i * 2654435761u);
    }
    const struct stx_header one = {.tensors = tensors, .tensors_count = MANY};
    struct stx_header other = {.tensors = tensors + MANY, .tensors_count = MANY};
    const struct stx_overlap_part parts[] = {{&one, NULL}, {&other, NULL}};
    CHECK(!overlap(parts, 2));
    other.tensors--; /* one that both have */
    CHECK(overlap(parts, 2));
    other.tensors++;
    for (uint32_t i = 0; i < 2 * MANY; i++) tensors[i].hash = 3;
    CHECK(overlap(parts, 2)); /* cannot be told cheaply */
    free(names);
    free(tensors);
}

int main(void) {
    test_few();
    test_many();
    return 0;
}
