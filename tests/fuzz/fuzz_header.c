/* SPDX-License-Identifier: Apache-2.0
 *
 * libFuzzer's target: its bytes are a whole safetensors file. No bytes may make the parser read or
 * write outside of its memory, overflow, or leak; and what it accepts keeps header.h's promises:
 * the data section is covered once and in order, each name is found and stands once in the order of
 * names, and a plan of all of it reads all of it. What stock thinks of the same bytes is the
 * differential fuzzer's question.
 *
 * Built with tiny JSON pieces, so that short inputs reach the parsing in pieces.
 */
#include <stdlib.h>
#include <string.h>

#include "checked.h"
#include "header.h"
#include "json.h"
#include "plan.h"

#define REQUIRE(condition)                  \
    do {                                    \
        if (!(condition)) __builtin_trap(); \
    } while (0)

static void check_tensors(const struct stx_header *header) {
    uint64_t covered = 0;
    for (size_t i = 0; i < header->tensors_count; i++) {
        const struct stx_tensor *tensor = &header->tensors[i];
        uint64_t bits = stx_dtype_info(tensor->dtype)->bits;
        for (uint32_t axis = 0; axis < tensor->rank; axis++)
            REQUIRE(stx_checked_mul(bits, tensor->shape[axis], &bits));
        REQUIRE(tensor->begin == covered && tensor->end - tensor->begin == bits / 8);
        REQUIRE(stx_header_find(header, tensor->name, tensor->name_bytes) == tensor);
        covered = tensor->end;
    }
    REQUIRE(header->data_begin_bytes + covered == header->file_size_bytes);
}

static void check_names(const struct stx_header *header) {
    struct stx_err err;
    uint32_t *order = calloc(header->tensors_count + 1, sizeof *order);
    REQUIRE(order != NULL && stx_header_sort_names(header, order, &err) == STX_OK);
    for (size_t i = 1; i < header->tensors_count; i++) {
        const struct stx_tensor *a = &header->tensors[order[i - 1]];
        const struct stx_tensor *b = &header->tensors[order[i]];
        const size_t common = a->name_bytes < b->name_bytes ? a->name_bytes : b->name_bytes;
        const int difference = memcmp(a->name, b->name, common);
        REQUIRE(difference < 0 || (difference == 0 && a->name_bytes < b->name_bytes));
    }
    free(order);
}

static void check_plan(const struct stx_header *header) {
    const struct stx_plan_input input = {.header = header};
    const struct stx_plan_limits limits = {
        .gap_bytes = 0, .align_bytes = 1, .block_bytes = UINT64_C(1) << 20};
    struct stx_plan plan;
    struct stx_err err;
    REQUIRE(stx_plan_build(&plan, &input, 1, &limits, &err) == STX_OK);
    REQUIRE(plan.tensors_kept == header->tensors_count && plan.bytes_read == plan.bytes_kept);
    REQUIRE(plan.bytes_kept == header->file_size_bytes - header->data_begin_bytes);
    stx_plan_free(&plan);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct stx_header header;
    struct stx_err err;
    uint64_t json_bytes = 0;
    if (size < STX_HEADER_PREFIX_BYTES) return 0;
    if (stx_header_length(data, size, &json_bytes, &err) != STX_OK) /* the JSON is worth a try */
        json_bytes = size - STX_HEADER_PREFIX_BYTES;
    char *text = calloc(1, (size_t)json_bytes + STX_JSON_PADDING_BYTES);
    REQUIRE(text != NULL);
    memcpy(text, data + STX_HEADER_PREFIX_BYTES, (size_t)json_bytes);
    const enum stx_status status = stx_header_parse(&header, text, json_bytes, size, &err);
    if (status == STX_OK) {
        check_tensors(&header);
        check_names(&header);
        check_plan(&header);
    } else {
        REQUIRE(header.tensors == NULL && header.arena == NULL);
        REQUIRE(status != STX_ERR_FORMAT || err.position_bytes <= size);
    }
    stx_header_free(&header);
    free(text);
    return 0;
}
