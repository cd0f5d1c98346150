/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: what is given out ahead of a consumer: each byte once, never more than the
 * limit, in the order that the consumer shows, and nothing to one that shows none.
 */
#include "follow.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"

#define MIB (UINT64_C(1) << 20)
#define COUNT 64

/* COUNT tensors of `size_bytes` each, one behind the other. */
static struct stx_range *make_tensors(uint64_t size_bytes) {
    struct stx_range *tensors = calloc(COUNT, sizeof *tensors);
    for (size_t i = 0; i < COUNT; i++)
        tensors[i] = (struct stx_range){i * size_bytes, (i + 1) * size_bytes};
    return tensors;
}

/* An order that visits the tensors backwards. */
static uint32_t *make_reverse(void) {
    uint32_t *order = calloc(COUNT, sizeof *order);
    for (uint32_t i = 0; i < COUNT; i++) order[i] = COUNT - 1 - i;
    return order;
}

static void open_follow(struct stx_follow *follow, uint64_t size_bytes, uint64_t limit_bytes) {
    struct stx_err err;
    uint32_t *others[STX_FOLLOW_ORDERS - 1] = {make_reverse(), NULL};
    CHECK(stx_follow_init(follow, make_tensors(size_bytes), COUNT, others, limit_bytes, &err) ==
          STX_OK);
}

/* Take all there is; answers the bytes, and the first range. */
static uint64_t drain(struct stx_follow *follow, struct stx_range *first) {
    struct stx_range range;
    uint64_t bytes = 0;
    while (stx_follow_next(follow, 8 * MIB, &range)) {
        CHECK(range.end_bytes - range.begin_bytes <= 8 * MIB);
        if (bytes == 0 && first != NULL) *first = range;
        bytes += range.end_bytes - range.begin_bytes;
    }
    return bytes;
}

static void all_is_given_out_once(void) {
    struct stx_follow follow;
    struct stx_err err;
    CHECK(stx_follow_init_all(&follow, make_tensors(10 * MIB), COUNT, 1000 * MIB, &err) == STX_OK);
    struct stx_range range;
    uint64_t at = 0;
    while (stx_follow_next(&follow, 8 * MIB, &range)) {
        CHECK(range.begin_bytes == at && range.end_bytes > at);
        at = range.end_bytes;
    }
    CHECK(at == COUNT * 10 * MIB);
    stx_follow_free(&follow);
}

static void all_stops_at_the_limit(void) {
    struct stx_follow follow;
    struct stx_err err;
    CHECK(stx_follow_init_all(&follow, make_tensors(MIB), COUNT, 20 * MIB, &err) == STX_OK);
    CHECK(drain(&follow, NULL) == 20 * MIB);
    stx_follow_free(&follow);
}

static void one_demand_gives_only_itself(void) {
    struct stx_follow follow;
    open_follow(&follow, MIB, 1000 * MIB);
    const struct stx_range missing = stx_follow_demand(&follow, 5);
    CHECK(missing.begin_bytes == 5 * MIB && missing.end_bytes == 6 * MIB);
    CHECK(!stx_follow_has_next(&follow) && drain(&follow, NULL) == 0);
    stx_follow_free(&follow);
}

static void a_consumer_in_file_order_is_read_ahead_of(void) {
    struct stx_follow follow;
    struct stx_range first;
    open_follow(&follow, MIB, 1000 * MIB);
    (void)stx_follow_demand(&follow, 0);
    (void)stx_follow_demand(&follow, 1);
    CHECK(drain(&follow, &first) == 4 * MIB + 2 * 2 * MIB);
    CHECK(first.begin_bytes == 2 * MIB);
    const struct stx_range none = stx_follow_demand(&follow, 2);
    CHECK(none.begin_bytes == none.end_bytes); /* was given out */
    CHECK(drain(&follow, &first) == 3 * MIB && first.begin_bytes == 10 * MIB);
    stx_follow_free(&follow);
}

static void a_consumer_in_another_order_too(void) {
    struct stx_follow follow;
    struct stx_range first;
    open_follow(&follow, MIB, 1000 * MIB);
    (void)stx_follow_demand(&follow, 40);
    (void)stx_follow_demand(&follow, 39);
    (void)stx_follow_demand(&follow, 38);
    CHECK(drain(&follow, &first) != 0);
    CHECK(first.begin_bytes == 37 * MIB);
    stx_follow_free(&follow);
}

static void one_that_jumps_is_given_nothing(void) {
    struct stx_follow follow;
    open_follow(&follow, MIB, 1000 * MIB);
    for (size_t i = 0; i < 10; i++) {
        (void)stx_follow_demand(&follow, (i * 29) % COUNT);
        CHECK(drain(&follow, NULL) == 0);
    }
    stx_follow_free(&follow);
}

static void a_skip_voids_what_was_earned(void) {
    struct stx_follow follow;
    open_follow(&follow, MIB, 1000 * MIB);
    for (size_t i = 0; i < 12; i++) {
        (void)stx_follow_demand(&follow, i);
        (void)drain(&follow, NULL);
    }
    CHECK(follow.window_bytes == 4 * MIB + 24 * MIB);
    (void)stx_follow_demand(&follow, 20);
    CHECK(follow.window_bytes == 4 * MIB + 2 * MIB);
    stx_follow_free(&follow);
}

static void never_more_than_the_limit_ahead(void) {
    struct stx_follow follow;
    struct stx_range range;
    uint8_t given[COUNT] = {0};
    open_follow(&follow, MIB, 6 * MIB);
    for (size_t i = 0; i < COUNT; i++) {
        const struct stx_range missing = stx_follow_demand(&follow, i);
        if (missing.begin_bytes < missing.end_bytes) given[i]++;
        while (stx_follow_next(&follow, 8 * MIB, &range)) {
            given[range.begin_bytes / MIB]++;
            CHECK(range.end_bytes <= (i + 1 + 6) * MIB);
        }
    }
    for (size_t i = 0; i < COUNT; i++) CHECK(given[i] == 1);
    stx_follow_free(&follow);
}

/* A tensor larger than the window is given out in part; the rest comes with its demand. */
static void the_rest_of_a_large_tensor_is_missing(void) {
    struct stx_follow follow;
    open_follow(&follow, 64 * MIB, 80 * MIB);
    (void)stx_follow_demand(&follow, 0);
    (void)stx_follow_demand(&follow, 1);
    const uint64_t bytes = drain(&follow, NULL);
    CHECK(bytes == 80 * MIB);
    const struct stx_range none = stx_follow_demand(&follow, 2);
    CHECK(none.begin_bytes == none.end_bytes);
    const struct stx_range rest = stx_follow_demand(&follow, 3);
    CHECK(rest.begin_bytes > 3 * 64 * MIB && rest.end_bytes == 4 * 64 * MIB);
    stx_follow_free(&follow);
}

static void what_is_left_out_is_never_given(void) {
    struct stx_follow follow;
    struct stx_err err;
    struct stx_range range, *tensors = make_tensors(MIB);
    uint32_t *others[STX_FOLLOW_ORDERS - 1] = {NULL, NULL};
    for (size_t i = 1; i < COUNT; i += 2) tensors[i] = (struct stx_range){0, 0};
    CHECK(stx_follow_init(&follow, tensors, COUNT, others, 1000 * MIB, &err) == STX_OK);
    (void)stx_follow_demand(&follow, 0);
    (void)stx_follow_demand(&follow, 2);
    while (stx_follow_next(&follow, 8 * MIB, &range))
        CHECK(range.begin_bytes / MIB % 2 == 0 && range.end_bytes == range.begin_bytes + MIB);
    stx_follow_free(&follow);
}

int main(void) {
    all_is_given_out_once();
    all_stops_at_the_limit();
    one_demand_gives_only_itself();
    a_consumer_in_file_order_is_read_ahead_of();
    a_consumer_in_another_order_too();
    one_that_jumps_is_given_nothing();
    a_skip_voids_what_was_earned();
    never_more_than_the_limit_ahead();
    the_rest_of_a_large_tensor_is_missing();
    what_is_left_out_is_never_given();
    return 0;
}
