/* SPDX-License-Identifier: Apache-2.0
 *
 * Decides, per handle, whether its file is warm, and prepares the read-ahead where it is not.
 *
 * DESIGN. The question costs a few system calls and is put as late as possible: a handle that is
 * opened for its names, or for one tensor, must cost no more than that. A wrong answer costs time
 * and nothing else.
 */
#include "py_ahead.h"

#include "order.h"
#include "py_plan.h"
#include "readahead.h"
#include "residency.h"
#include "trace.h"

static uint64_t limit_of(const struct stx_py_handle *self) {
    const int64_t wanted = self->options.read_ahead_bytes;
    return wanted < 0 ? stx_residency_free_bytes() : (uint64_t)wanted;
}

/* Write down what was found out about the file as a whole. */
static void settle(struct stx_py_handle *self, enum stx_residency residency) {
    struct stx_py_counters *counters = &self->state->counters;
    self->ahead = residency == STX_RESIDENCY_WARM ? STX_AHEAD_WARM : STX_AHEAD_COLD;
    if (residency == STX_RESIDENCY_WARM) counters->files_warm++;
    if (residency == STX_RESIDENCY_COLD) counters->files_cold++;
    if (residency == STX_RESIDENCY_UNKNOWN) counters->files_unknown++;
}

/* Each tensor's range in the file, an empty one for what is left out. NULL without memory. */
static struct stx_range *list_tensors(const struct stx_py_handle *self) {
    const struct stx_header *header = &self->source.header;
    struct stx_range *ranges = calloc(header->tensors_count + 1, sizeof *ranges);
    for (size_t i = 0; ranges != NULL && i < header->tensors_count; i++)
        if (stx_py_handle_keeps(self, i))
            ranges[i] = (struct stx_range){header->data_begin_bytes + header->tensors[i].begin,
                                           header->data_begin_bytes + header->tensors[i].end};
    return ranges;
}

/* Whether `order` is anything but the file's own. */
static bool is_another(const uint32_t *order, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (order[i] != i) return true;
    return false;
}

/* The orders that differ from the file's: by name, and by name with numbers as numbers. */
static void list_orders(const struct stx_header *header, uint32_t *orders[STX_FOLLOW_ORDERS - 1]) {
    struct stx_err err;
    for (int o = 0; o < STX_FOLLOW_ORDERS - 1; o++) {
        orders[o] = malloc((header->tensors_count + 1) * sizeof *orders[o]);
        if (orders[o] == NULL) continue;
        bool useful = true;
        if (o == 0) useful = stx_header_sort_names(header, orders[o], &err) == STX_OK;
        if (o == 1) stx_order_naturally(header, orders[o]);
        if (useful && is_another(orders[o], header->tensors_count)) continue;
        free(orders[o]);
        orders[o] = NULL;
    }
}

/* The second tensor or slice: find out about the file, and prepare for more if it is cold. */
static void prepare(struct stx_py_handle *self) {
    uint32_t *orders[STX_FOLLOW_ORDERS - 1] = {NULL};
    const struct stx_header *header = &self->source.header;
    struct stx_mapping *const mapping = self->source.mapping;
    const bool dense = self->skipped_count == 0;
    enum stx_residency residency = STX_RESIDENCY_UNKNOWN;
    Py_BEGIN_ALLOW_THREADS; /* `busy` keeps the source */
    struct stx_range *tensors = list_tensors(self);
    if (tensors != NULL) residency = stx_residency_ask(mapping, tensors, header->tensors_count);
    if (tensors != NULL && residency != STX_RESIDENCY_WARM) {
        list_orders(header, orders);
        stx_readahead_prepare(mapping, tensors, header->tensors_count, orders, dense,
                              limit_of(self));
    } else {
        free(tensors);
    }
    Py_END_ALLOW_THREADS;
    if (self->ahead == STX_AHEAD_UNDECIDED) settle(self, residency);
}

/* One more tensor or slice was asked for. */
static void count_demand(struct stx_py_handle *self) {
    if (self->ahead == STX_AHEAD_UNDECIDED && self->demands_count++ != 0) prepare(self);
}

bool stx_py_ahead_range(const struct stx_py_place *place, size_t index, uint64_t begin_bytes,
                        uint64_t end_bytes) {
    const struct stx_range range = {begin_bytes, end_bytes};
    struct stx_mapping *const mapping = place->mapping;
    bool warm = false;
    if (!place->ahead || begin_bytes >= end_bytes) return false;
    Py_BEGIN_ALLOW_THREADS; /* whoever called keeps the mapping */
    if (stx_readahead_is_prepared(mapping))
        stx_readahead_demand(mapping, index, begin_bytes, end_bytes);
    else
        warm = stx_residency_ask(mapping, &range, 1) == STX_RESIDENCY_WARM;
    if (!warm && !stx_readahead_is_prepared(mapping))
        stx_readahead_one(mapping, begin_bytes, end_bytes);
    Py_END_ALLOW_THREADS;
    return warm;
}

void stx_py_ahead_tensor(struct stx_py_handle *self, size_t index) {
    const struct stx_tensor *tensor = &self->source.header.tensors[index];
    const uint64_t data_begin_bytes = self->source.header.data_begin_bytes;
    count_demand(self);
    if (self->ahead == STX_AHEAD_OFF || self->ahead == STX_AHEAD_WARM) return;
    const struct stx_py_place place = stx_py_handle_place(self);
    (void)stx_py_ahead_range(&place, index, data_begin_bytes + tensor->begin,
                             data_begin_bytes + tensor->end);
}

void stx_py_ahead_slice(struct stx_py_handle *self) { count_demand(self); }

/* Have a cold plan read. Answers what was found out. */
static enum stx_residency start(const struct stx_py_handle *self, const struct stx_plan *plan) {
    struct stx_mapping *const mapping = self->source.mapping;
    struct stx_range *ranges = stx_py_plan_ranges(plan);
    if (ranges == NULL) return STX_RESIDENCY_UNKNOWN;
    const enum stx_residency residency = stx_residency_ask(mapping, ranges, plan->reads_count);
    if (residency == STX_RESIDENCY_WARM)
        free(ranges);
    else
        stx_readahead_all(mapping, ranges, plan->reads_count, self->skipped_count == 0,
                          limit_of(self));
    return residency;
}

int stx_py_ahead_all(struct stx_py_handle *self) {
    struct stx_py_counters *counters = &self->state->counters;
    const struct stx_header *header = &self->source.header;
    const struct stx_range whole = {header->data_begin_bytes, header->file_size_bytes};
    struct stx_plan plan;
    enum stx_residency residency;
    if (self->ahead != STX_AHEAD_UNDECIDED && self->ahead != STX_AHEAD_COLD) return 0;
    /* Without a filter the plan is not needed to see that everything is there. */
    if (self->skipped_count == 0 &&
        stx_residency_ask(self->source.mapping, &whole, 1) == STX_RESIDENCY_WARM) {
        if (self->ahead == STX_AHEAD_UNDECIDED) settle(self, STX_RESIDENCY_WARM);
        return 0;
    }
    const uint64_t start_ns = stx_py_clock_ns(), begin_ns = stx_trace_begin();
    if (stx_py_plan_build(&plan, header, self->keep) != 0) return -1;
    counters->plan_ns += stx_py_clock_ns() - start_ns;
    STX_TRACE(STX_TRACE_PLAN, begin_ns, self->source.file.label, NULL, plan.spans_count,
              plan.reads_count, plan.bytes_kept, plan.bytes_read);
    Py_BEGIN_ALLOW_THREADS; /* `busy` keeps the source */
    residency = start(self, &plan);
    Py_END_ALLOW_THREADS;
    if (residency != STX_RESIDENCY_WARM)
        counters->bytes_over_read += plan.bytes_read - plan.bytes_kept;
    if (self->ahead == STX_AHEAD_UNDECIDED) settle(self, residency);
    stx_plan_free(&plan);
    return 0;
}
