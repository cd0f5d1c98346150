/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: a plan covers every kept byte exactly once, reads nothing of a wide hole, and is a
 * function of its inputs alone; shown on random files, masks and limits.
 */
#include <string.h>

#include "check.h"
#include "plan.h"

#define TENSORS_MAX 60
#define FILES_MAX 3
#define SMALL_BYTES 60

struct scene {
    struct stx_tensor tensors[FILES_MAX][TENSORS_MAX];
    struct stx_header headers[FILES_MAX];
    uint8_t keep[FILES_MAX][TENSORS_MAX];
    struct stx_plan_input inputs[FILES_MAX];
    struct stx_plan_limits limits;
    uint32_t files_count;
};

static void make_scene(struct scene *scene, uint64_t *seed, uint64_t tensor_bytes,
                       unsigned align_log_max) {
    memset(scene, 0, sizeof *scene);
    scene->files_count = 1 + (uint32_t)random_below(seed, FILES_MAX);
    scene->limits.align_bytes = UINT64_C(1) << random_below(seed, align_log_max);
    scene->limits.block_bytes = scene->limits.align_bytes << random_below(seed, 6);
    scene->limits.gap_bytes = random_below(seed, 2) ? 0 : random_below(seed, tensor_bytes);
    for (uint32_t f = 0; f < scene->files_count; f++) {
        struct stx_header *header = &scene->headers[f];
        uint64_t at = 0;
        header->tensors = scene->tensors[f];
        header->tensors_count = random_below(seed, TENSORS_MAX);
        header->data_begin_bytes = 8 + random_below(seed, 3000);
        for (size_t i = 0; i < header->tensors_count; i++) {
            const uint64_t size_bytes =
                random_below(seed, 5) == 0 ? 0 : random_below(seed, tensor_bytes);
            scene->tensors[f][i].begin = at;
            scene->tensors[f][i].end = at += size_bytes;
            scene->keep[f][i] = (uint8_t)(random_below(seed, 3) != 0);
        }
        header->file_size_bytes = header->data_begin_bytes + at;
        scene->inputs[f].header = header;
        scene->inputs[f].keep = random_below(seed, 4) == 0 ? NULL : scene->keep[f];
    }
}

static int is_kept(const struct scene *scene, uint32_t f, size_t i) {
    return scene->inputs[f].keep == NULL || scene->keep[f][i] != 0;
}

static uint64_t largest(uint64_t a, uint64_t b) { return a > b ? a : b; }

static uint64_t smallest(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* How many bytes of [begin, end) of file `f` the reads, or the spans, cover. */
static uint64_t covered(const struct stx_plan *plan, int by_reads, uint32_t f, uint64_t begin,
                        uint64_t end) {
    uint64_t sum = 0;
    const size_t count = by_reads ? plan->reads_count : plan->spans_count;
    for (size_t i = 0; i < count; i++) {
        const uint32_t file = by_reads ? plan->reads[i].file_index : plan->spans[i].file_index;
        const uint64_t from = by_reads ? plan->reads[i].begin_bytes : plan->spans[i].begin_bytes;
        const uint64_t to = by_reads ? plan->reads[i].end_bytes : plan->spans[i].end_bytes;
        const uint64_t low = largest(from, begin), high = smallest(to, end);
        if (file == f && low < high) sum += high - low;
    }
    return sum;
}

static void check_tensors(const struct scene *scene, const struct stx_plan *plan) {
    uint64_t kept = 0, kept_bytes = 0;
    for (uint32_t f = 0; f < scene->files_count; f++)
        for (size_t i = 0; i < scene->headers[f].tensors_count; i++) {
            if (!is_kept(scene, f, i)) continue;
            const uint64_t base = scene->headers[f].data_begin_bytes;
            const uint64_t begin = base + scene->tensors[f][i].begin;
            const uint64_t end = base + scene->tensors[f][i].end;
            kept++;
            kept_bytes += end - begin;
            CHECK(covered(plan, 0, f, begin, end) == end - begin);
            CHECK(covered(plan, 1, f, begin, end) == end - begin);
        }
    CHECK(plan->tensors_kept == kept);
    CHECK(plan->bytes_kept == kept_bytes);
}

/* Runs of tensors that are left out, with the gap limit and the alignment taken off both ends. */
static void check_holes(const struct scene *scene, const struct stx_plan *plan) {
    const uint64_t margin = scene->limits.align_bytes;
    for (uint32_t f = 0; f < scene->files_count; f++) {
        const struct stx_header *header = &scene->headers[f];
        uint64_t begin = header->data_begin_bytes;
        for (size_t i = 0; i <= header->tensors_count; i++) {
            const int last = i == header->tensors_count;
            if (!last &&
                (!is_kept(scene, f, i) || header->tensors[i].begin == header->tensors[i].end))
                continue;
            const uint64_t end = last ? header->file_size_bytes
                                      : header->data_begin_bytes + header->tensors[i].begin;
            const int at_border = begin == header->data_begin_bytes || last;
            if (end > begin + 2 * margin && (at_border || end - begin > scene->limits.gap_bytes))
                CHECK(covered(plan, 1, f, begin + margin, end - margin) == 0);
            if (!last) begin = header->data_begin_bytes + header->tensors[i].end;
        }
    }
}

static void check_reads(const struct scene *scene, const struct stx_plan *plan) {
    uint64_t sum = 0;
    for (size_t i = 0; i < plan->reads_count; i++) {
        const struct stx_read *read = &plan->reads[i];
        const struct stx_plan_limits *limits = &scene->limits;
        const uint64_t size_bytes = scene->headers[read->file_index].file_size_bytes;
        CHECK(read->begin_bytes < read->end_bytes && read->end_bytes <= size_bytes);
        CHECK(read->begin_bytes % limits->align_bytes == 0);
        CHECK(read->end_bytes % limits->align_bytes == 0 || read->end_bytes == size_bytes);
        CHECK(read->begin_bytes / limits->block_bytes ==
              (read->end_bytes - 1) / limits->block_bytes);
        sum += read->end_bytes - read->begin_bytes;
        if (i == 0) continue;
        const struct stx_read *before = &plan->reads[i - 1];
        CHECK(before->file_index < read->file_index ||
              (before->file_index == read->file_index && before->end_bytes <= read->begin_bytes));
    }
    CHECK(plan->bytes_read == sum);
    for (size_t i = 1; i < plan->spans_count; i++) {
        const struct stx_span *before = &plan->spans[i - 1], *span = &plan->spans[i];
        CHECK(before->file_index < span->file_index ||
              before->end_bytes + scene->limits.gap_bytes < span->begin_bytes);
    }
}

static void check_same(const struct stx_plan *a, const struct stx_plan *b) {
    CHECK(a->spans_count == b->spans_count && a->reads_count == b->reads_count);
    CHECK(a->bytes_read == b->bytes_read && a->bytes_kept == b->bytes_kept);
    for (size_t i = 0; i < a->reads_count; i++)
        CHECK(a->reads[i].begin_bytes == b->reads[i].begin_bytes &&
              a->reads[i].end_bytes == b->reads[i].end_bytes);
}

/* A span's tensors are exactly the kept, non-empty ones between its ends. */
static void check_spans(const struct scene *scene, const struct stx_plan *plan) {
    for (size_t s = 0; s < plan->spans_count; s++) {
        const struct stx_span *span = &plan->spans[s];
        const struct stx_header *header = &scene->headers[span->file_index];
        const struct stx_tensor *first = &header->tensors[span->tensor_first];
        const uint64_t base = header->data_begin_bytes;
        uint32_t count = 0;
        uint64_t last_end = 0;
        for (size_t i = 0; i < header->tensors_count; i++) {
            const struct stx_tensor *tensor = &header->tensors[i];
            if (!is_kept(scene, span->file_index, i) || tensor->begin == tensor->end) continue;
            if (base + tensor->begin < span->begin_bytes || base + tensor->end > span->end_bytes)
                continue;
            count++;
            last_end = base + tensor->end;
        }
        CHECK(is_kept(scene, span->file_index, span->tensor_first));
        CHECK(base + first->begin == span->begin_bytes && last_end == span->end_bytes);
        CHECK(count == span->tensor_count);
    }
}

/* What a plan should read, byte by byte: kept bytes, gaps up to the limit, then whole alignment
 * blocks of all these, as far as the file goes. */
static void check_bytes(const struct scene *scene, const struct stx_plan *plan, uint32_t f) {
    enum { BYTES_MAX = TENSORS_MAX * SMALL_BYTES + 4096 };
    static unsigned char wanted[BYTES_MAX], whole[BYTES_MAX], read[BYTES_MAX];
    const struct stx_header *header = &scene->headers[f];
    const uint64_t size = header->file_size_bytes, align = scene->limits.align_bytes;
    uint64_t last_end = UINT64_MAX;
    CHECK(size <= BYTES_MAX);
    memset(wanted, 0, sizeof wanted);
    memset(whole, 0, sizeof whole);
    memset(read, 0, sizeof read);
    for (size_t i = 0; i < header->tensors_count; i++) {
        const uint64_t begin = header->data_begin_bytes + header->tensors[i].begin;
        const uint64_t end = header->data_begin_bytes + header->tensors[i].end;
        if (!is_kept(scene, f, i) || begin == end) continue;
        const int joined = last_end != UINT64_MAX && begin - last_end <= scene->limits.gap_bytes;
        for (uint64_t at = joined ? last_end : begin; at < end; at++) wanted[at] = 1;
        last_end = end;
    }
    for (uint64_t at = 0; at < size; at++)
        for (uint64_t near = at - at % align; wanted[at] && near < at - at % align + align; near++)
            if (near < size) whole[near] = 1;
    for (size_t i = 0; i < plan->reads_count; i++)
        for (uint64_t at = plan->reads[i].begin_bytes;
             plan->reads[i].file_index == f && at < plan->reads[i].end_bytes; at++)
            read[at]++;
    CHECK(memcmp(whole, read, sizeof read) == 0);
}

static void run_scenes(int rounds, uint64_t tensor_bytes, unsigned align_log_max) {
    uint64_t seed = 20250101 + tensor_bytes;
    struct scene scene;
    struct stx_err err;
    for (int round = 0; round < rounds; round++) {
        struct stx_plan plan, again;
        make_scene(&scene, &seed, tensor_bytes, align_log_max);
        CHECK(stx_plan_build(&plan, scene.inputs, scene.files_count, &scene.limits, &err) ==
              STX_OK);
        CHECK(stx_plan_build(&again, scene.inputs, scene.files_count, &scene.limits, &err) ==
              STX_OK);
        check_tensors(&scene, &plan);
        check_holes(&scene, &plan);
        check_reads(&scene, &plan);
        check_spans(&scene, &plan);
        for (uint32_t f = 0; tensor_bytes <= SMALL_BYTES && f < scene.files_count; f++)
            check_bytes(&scene, &plan, f);
        check_same(&plan, &again);
        stx_plan_free(&plan);
        stx_plan_free(&again);
        CHECK(plan.spans == NULL && plan.reads == NULL && plan.reads_count == 0);
    }
}

static void test_nothing(void) {
    const struct stx_header empty = {.data_begin_bytes = 10, .file_size_bytes = 10};
    const struct stx_plan_input input = {.header = &empty, .keep = NULL};
    const struct stx_plan_limits limits = {.gap_bytes = 0, .align_bytes = 1, .block_bytes = 1};
    struct stx_plan plan;
    struct stx_err err;
    CHECK(stx_plan_build(&plan, NULL, 0, &limits, &err) == STX_OK);
    CHECK(plan.reads_count == 0 && plan.spans_count == 0 && plan.tensors_kept == 0);
    stx_plan_free(&plan);
    CHECK(stx_plan_build(&plan, &input, 1, &limits, &err) == STX_OK);
    CHECK(plan.reads_count == 0 && plan.bytes_read == 0);
    stx_plan_free(&plan);
}

/* One tensor of many blocks, far out in a file larger than any memory. */
static void test_far_out(void) {
    const uint64_t far = UINT64_C(1) << 62, block = UINT64_C(8) << 20;
    struct stx_tensor tensors[] = {{.begin = 0, .end = far},
                                   {.begin = far, .end = far + block + 1}};
    const uint8_t keep[] = {0, 1};
    const struct stx_header header = {.tensors = tensors,
                                      .tensors_count = 2,
                                      .data_begin_bytes = 4097,
                                      .file_size_bytes = 4097 + far + block + 1};
    const struct stx_plan_input input = {.header = &header, .keep = keep};
    const struct stx_plan_limits limits = {
        .gap_bytes = 4096, .align_bytes = 4096, .block_bytes = block};
    struct stx_plan plan;
    struct stx_err err;
    CHECK(stx_plan_build(&plan, &input, 1, &limits, &err) == STX_OK);
    CHECK(plan.spans_count == 1 && plan.reads_count == 2);
    CHECK(plan.spans[0].begin_bytes == far + 4097 && plan.spans[0].tensor_first == 1);
    CHECK(plan.reads[0].begin_bytes == far + 4096 && plan.reads[0].end_bytes == far + block);
    CHECK(plan.reads[1].begin_bytes == far + block);
    CHECK(plan.reads[1].end_bytes == header.file_size_bytes); /* clipped */
    CHECK(plan.bytes_kept == block + 1 && plan.bytes_read == block + 2);
    stx_plan_free(&plan);
}

int main(void) {
    run_scenes(400, 9000, 13);
    run_scenes(400, SMALL_BYTES, 7);
    test_nothing();
    test_far_out();
    return 0;
}
