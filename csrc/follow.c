/* SPDX-License-Identifier: Apache-2.0
 *
 * Follows a consumer.
 *
 * DESIGN. A demand that lies shortly ahead of the last ones in an order is a step in that order;
 * one that lies shortly behind is none, and no jump either (several threads may share the work).
 * The order with the most steps in a row is followed; one step is enough to begin with. The window
 * grows with what was read in order, as the kernel's own read-ahead does, so that a wrong guess
 * costs little and a long run is read far ahead. Tensors that were passed over are not given out
 * any more.
 */
#include "follow.h"

#include <assert.h>
#include <stdlib.h>

#include "checked.h"

/* This many places away is still the same order. */
#define NEAR_PLACES 16
/* A consumer that leaves out more than this many tensors picks; what it earned is void. */
#define SKIP_PLACES 4

static uint64_t size_of(const struct stx_range *range) {
    return range->end_bytes - range->begin_bytes;
}

static size_t tensor_at(const struct stx_follow *follow, unsigned order, size_t place) {
    const uint32_t *indexes = follow->orders[order].indexes;
    return indexes == NULL ? place : indexes[place];
}

enum stx_status stx_follow_init_all(struct stx_follow *follow, struct stx_range *tensors,
                                    size_t count, uint64_t limit_bytes, struct stx_err *err) {
    uint32_t *none[STX_FOLLOW_ORDERS - 1] = {NULL};
    STX_TRY(stx_follow_init(follow, tensors, count, none, limit_bytes, err));
    follow->window_bytes = limit_bytes;
    return STX_OK;
}

enum stx_status stx_follow_init(struct stx_follow *follow, struct stx_range *tensors, size_t count,
                                uint32_t *others[STX_FOLLOW_ORDERS - 1], uint64_t limit_bytes,
                                struct stx_err *err) {
    *follow = (struct stx_follow){.tensors = tensors, .count = count, .limit_bytes = limit_bytes};
    follow->taken = calloc(count + 1, 1);
    bool complete = follow->taken != NULL;
    follow->orders[0].exists = true;
    for (unsigned o = 1; o < STX_FOLLOW_ORDERS; o++) {
        struct stx_follow_order *order = &follow->orders[o];
        order->indexes = others[o - 1];
        if (order->indexes == NULL) continue;
        order->exists = true;
        order->places = malloc((count + 1) * sizeof *order->places);
        if (order->places == NULL) complete = false;
        for (size_t place = 0; order->places != NULL && place < count; place++)
            order->places[order->indexes[place]] = (uint32_t)place;
    }
    if (complete) return STX_OK;
    stx_follow_free(follow);
    return stx_err_set(err, STX_ERR_MEMORY, "no memory for following a consumer");
}

void stx_follow_free(struct stx_follow *follow) {
    for (unsigned o = 0; o < STX_FOLLOW_ORDERS; o++) {
        free(follow->orders[o].indexes);
        free(follow->orders[o].places);
    }
    free(follow->tensors);
    free(follow->taken);
    *follow = (struct stx_follow){0};
}

/* One more demand, as `order` sees it. Answers how many places it left out. */
static size_t step(struct stx_follow_order *order, size_t place, bool is_first) {
    const size_t front = order->front;
    const bool is_near = !is_first && place + NEAR_PLACES >= front && place < front + NEAR_PLACES;
    /* Behind is what another thread of the consumer does: it speaks for no order, against none. */
    if (!is_near) order->run_count = 0;
    if (is_near && place >= front) order->run_count++;
    if (!is_near || place >= front) order->front = place + 1;
    return place > front ? place - front : 0;
}

/* The consumer came from `front` to the current order's new front. */
static void come_nearer(struct stx_follow *follow, size_t front) {
    const size_t reached = follow->orders[follow->current].front;
    for (size_t place = front; place < reached && place < follow->cursor; place++) {
        const struct stx_range *range = &follow->tensors[tensor_at(follow, follow->current, place)];
        follow->ahead_bytes -= stx_min_u64(follow->ahead_bytes, size_of(range));
    }
}

static void go_on_behind_front(struct stx_follow *follow) {
    follow->cursor = follow->orders[follow->current].front;
    follow->given_bytes = 0;
    follow->ahead_bytes = 0;
}

/* Choose the order to follow after a step in each. */
static void choose(struct stx_follow *follow, size_t front_before, size_t skipped[]) {
    unsigned best = follow->current;
    for (unsigned o = 0; o < STX_FOLLOW_ORDERS; o++)
        if (follow->orders[o].exists &&
            follow->orders[o].run_count > follow->orders[best].run_count)
            best = o;
    const struct stx_follow_order *order = &follow->orders[best];
    if (best != follow->current) {
        follow->current = best;
        follow->earned_bytes = 0;
        go_on_behind_front(follow);
    } else if (order->run_count == 0 || order->front > follow->cursor) {
        go_on_behind_front(follow);
    } else {
        come_nearer(follow, front_before);
    }
    if (order->run_count == 0 || skipped[best] > SKIP_PLACES) follow->earned_bytes = 0;
}

struct stx_range stx_follow_demand(struct stx_follow *follow, size_t index) {
    assert(index < follow->count);
    const struct stx_range range = follow->tensors[index];
    const size_t front_before = follow->orders[follow->current].front;
    size_t skipped[STX_FOLLOW_ORDERS] = {0};
    struct stx_range missing = {0, 0};
    if (follow->taken[index] == 0) missing = range;
    const bool is_at_cursor = follow->cursor < follow->count && follow->given_bytes != 0 &&
                              tensor_at(follow, follow->current, follow->cursor) == index;
    if (is_at_cursor) { /* given out in part: the rest is wanted now */
        missing = range;
        missing.begin_bytes += follow->given_bytes;
        follow->cursor++;
        follow->given_bytes = 0;
    }
    follow->taken[index] = STX_FOLLOW_DEMANDED;
    for (unsigned o = 0; o < STX_FOLLOW_ORDERS; o++) {
        struct stx_follow_order *order = &follow->orders[o];
        const size_t place = order->places == NULL ? index : order->places[index];
        if (order->exists) skipped[o] = step(order, place, !follow->demanded);
    }
    follow->demanded = true;
    choose(follow, front_before, skipped);
    follow->earned_bytes += size_of(&range);
    const uint64_t earned = STX_FOLLOW_FLOOR_BYTES + 2 * follow->earned_bytes;
    follow->window_bytes = follow->orders[follow->current].run_count == 0
                               ? 0
                               : stx_min_u64(earned, follow->limit_bytes);
    return missing;
}

/* Pass over what is not to be read or was given out. */
static bool find_next(struct stx_follow *follow) {
    while (follow->cursor < follow->count && follow->given_bytes == 0) {
        const size_t index = tensor_at(follow, follow->current, follow->cursor);
        if (follow->taken[index] == 0 && size_of(&follow->tensors[index]) != 0) break;
        follow->cursor++;
    }
    return follow->cursor < follow->count;
}

bool stx_follow_has_next(struct stx_follow *follow) {
    return follow->ahead_bytes < follow->window_bytes && find_next(follow);
}

bool stx_follow_next(struct stx_follow *follow, uint64_t block_bytes, struct stx_range *next) {
    if (!stx_follow_has_next(follow)) return false;
    const size_t index = tensor_at(follow, follow->current, follow->cursor);
    const struct stx_range *range = &follow->tensors[index];
    const uint64_t begin_bytes = range->begin_bytes + follow->given_bytes;
    const uint64_t block_end = stx_align_down(begin_bytes, block_bytes) + block_bytes;
    *next = (struct stx_range){begin_bytes, stx_min_u64(range->end_bytes, block_end)};
    follow->taken[index] = STX_FOLLOW_GIVEN;
    follow->ahead_bytes += size_of(next);
    follow->given_bytes = next->end_bytes - range->begin_bytes;
    if (next->end_bytes == range->end_bytes) {
        follow->cursor++;
        follow->given_bytes = 0;
    }
    return true;
}
