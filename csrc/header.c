/* SPDX-License-Identifier: Apache-2.0
 *
 * Parses and validates a header.
 *
 * DESIGN. The walk collects entries in the header's order, copying names and shapes into an arena
 * of large blocks; then the entries are put in offset order (nearly always they are already), and
 * one pass checks what the reference reader checks, in its order: contiguity, overflow, sub-byte
 * alignment, size, and at last that the file ends where the data ends. Names go into an open
 * addressing table; a name that occurs twice leaves the file to the reference reader, which
 * decides which entry wins.
 *
 * Does no I/O: who reads the bytes is file.c's business.
 */
#include "header.h"

#include <stdlib.h>
#include <string.h>

#include "array.h"
#include "checked.h"
#include "json.h"
#include "memory.h"

/* Names and shapes take less than half of the text they stand in; what is more goes into a second
 * block. */
#define ARENA_BYTES_MIN 4096
/* The shortest entry that anybody writes; where there are more, the table grows. */
#define ENTRY_BYTES_MIN 72

struct stx_header_block {
    struct stx_header_block *next;
    size_t used_bytes;
    size_t size_bytes;
    max_align_t bytes[];
};

/* What the walk fills; capacities live here, not in the finished header. */
struct parse {
    struct stx_header *header;
    const char *json;
    uint64_t json_bytes;
    size_t tensors_capacity;
    size_t metadata_capacity;
    enum stx_dtype dtype; /* of the entry before, and its spelling's length */
    size_t dtype_bytes;
};

/* --- arena --- */

static void *arena_take(struct stx_header *header, size_t size_bytes) {
    struct stx_header_block *block = header->arena;
    const size_t usual_bytes = (size_t)header->data_begin_bytes / 2 + ARENA_BYTES_MIN;
    const size_t rounded = (size_bytes + 7) & ~(size_t)7;
    if (block == NULL || block->size_bytes - block->used_bytes < rounded) {
        const size_t block_bytes = rounded > usual_bytes ? rounded : usual_bytes;
        block = stx_memory_alloc(sizeof *block + block_bytes);
        if (block == NULL) return NULL;
        *block = (struct stx_header_block){.next = header->arena, .size_bytes = block_bytes};
        header->arena = block;
    }
    void *taken = (char *)block->bytes + block->used_bytes;
    block->used_bytes += rounded;
    return taken;
}

static char *arena_copy(struct stx_header *header, const void *bytes, size_t size_bytes) {
    char *copy = arena_take(header, size_bytes);
    if (copy != NULL && size_bytes != 0) memcpy(copy, bytes, size_bytes);
    return copy;
}

/* --- names --- */

/* Names whose hashes fill this many slots in a row are no accident: at half full, a run of a
 * quarter of it is not expected in any header. */
#define PROBES_MAX 256

/* A multiply-and-fold hash, eight bytes a step. Names that collide are easy to make; PROBES_MAX
 * keeps what they cost linear. */
static uint32_t hash_name(const char *name, size_t name_bytes) {
    uint64_t hash = UINT64_C(0x9E3779B97F4A7C15) ^ name_bytes;
    while (name_bytes >= 8) {
        uint64_t word;
        memcpy(&word, name, 8);
        hash = (hash ^ word) * UINT64_C(0xFF51AFD7ED558CCD);
        hash ^= hash >> 32;
        name += 8;
        name_bytes -= 8;
    }
    uint64_t tail = 0;
    if (name_bytes != 0) memcpy(&tail, name, name_bytes);
    hash = (hash ^ tail) * UINT64_C(0xC4CEB9FE1A85EC53);
    return (uint32_t)(hash ^ (hash >> 32));
}

static bool is_named(const struct stx_tensor *tensor, uint32_t hash, const char *name,
                     size_t name_bytes) {
    return tensor->hash == hash && tensor->name_bytes == name_bytes &&
           memcmp(tensor->name, name, name_bytes) == 0;
}

/* The slot that holds `name`, or the free one where it belongs, or NULL after PROBES_MAX. */
static uint32_t *find_slot(const struct stx_header *header, uint32_t hash, const char *name,
                           size_t name_bytes) {
    for (uint32_t probe = 0; probe < PROBES_MAX; probe++) {
        uint32_t *slot = &header->slots[(hash + probe) & header->slots_mask];
        if (*slot == 0 || is_named(&header->tensors[*slot - 1], hash, name, name_bytes))
            return slot;
    }
    return NULL;
}

static enum stx_status index_names(struct stx_header *header, struct stx_err *err) {
    uint64_t slots_count = 8;
    while (slots_count < 2 * (uint64_t)header->tensors_count) slots_count *= 2;
    header->slots = calloc((size_t)slots_count, sizeof *header->slots);
    if (header->slots == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for names");
    header->slots_mask = (uint32_t)(slots_count - 1);
    for (size_t i = 0; i < header->tensors_count; i++) {
        const struct stx_tensor *tensor = &header->tensors[i];
        uint32_t *slot = find_slot(header, tensor->hash, tensor->name, tensor->name_bytes);
        if (slot == NULL) return stx_err_set(err, STX_ERR_UNSUPPORTED, "too many names collide");
        if (*slot != 0) return stx_err_set(err, STX_ERR_UNSUPPORTED, "a tensor name occurs twice");
        *slot = (uint32_t)(i + 1);
    }
    return STX_OK;
}

const struct stx_tensor *stx_header_find(const struct stx_header *header, const char *name,
                                         size_t name_bytes) {
    if (header->slots == NULL) return NULL;
    const uint32_t *slot = find_slot(header, hash_name(name, name_bytes), name, name_bytes);
    return slot == NULL || *slot == 0 ? NULL : &header->tensors[*slot - 1];
}

static int compare_names(const struct stx_tensor *a, const struct stx_tensor *b) {
    const size_t common = a->name_bytes < b->name_bytes ? a->name_bytes : b->name_bytes;
    const int order = memcmp(a->name, b->name, common);
    if (order != 0) return order;
    return (a->name_bytes > b->name_bytes) - (a->name_bytes < b->name_bytes);
}

/* Merge two sorted neighbours of `source` into `target`. */
static void merge_runs(const struct stx_header *header, const uint32_t *source, size_t begin,
                       size_t middle, size_t end, uint32_t *target) {
    size_t left = begin, right = middle;
    for (size_t at = begin; at < end; at++) {
        const bool take_left =
            right == end || (left < middle && compare_names(&header->tensors[source[left]],
                                                            &header->tensors[source[right]]) <= 0);
        target[at] = take_left ? source[left++] : source[right++];
    }
}

/* The end of the ascending run of names that begins at `begin`. */
static size_t find_run_end(const struct stx_header *header, const uint32_t *order, size_t begin) {
    size_t end = begin + 1;
    while (end < header->tensors_count &&
           compare_names(&header->tensors[order[end - 1]], &header->tensors[order[end]]) <= 0)
        end++;
    return end;
}

/* A natural merge sort: files are written sorted by (dtype, name), so there are few runs. */
enum stx_status stx_header_sort_names(const struct stx_header *header, uint32_t *order,
                                      struct stx_err *err) {
    const size_t count = header->tensors_count;
    for (size_t i = 0; i < count; i++) order[i] = (uint32_t)i;
    if (count == 0 || find_run_end(header, order, 0) == count) return STX_OK;
    uint32_t *const spare = malloc(count * sizeof *spare);
    if (spare == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory to sort names");
    uint32_t *source = order, *target = spare;
    for (bool merged = true; merged;) {
        merged = false;
        for (size_t begin = 0; begin < count;) {
            const size_t middle = find_run_end(header, source, begin);
            const size_t end = middle == count ? count : find_run_end(header, source, middle);
            merge_runs(header, source, begin, middle, end, target);
            merged = merged || middle != count;
            begin = end;
        }
        uint32_t *const swapped = source;
        source = target;
        target = swapped;
    }
    if (source != order) memcpy(order, source, count * sizeof *order);
    free(spare);
    return STX_OK;
}

/* --- the walk --- */

static void visit_restart(void *context) {
    struct parse *parse = context;
    const struct stx_header empty = {.data_begin_bytes = parse->header->data_begin_bytes,
                                     .file_size_bytes = parse->header->file_size_bytes};
    stx_header_free(parse->header);
    *parse->header = empty;
    parse->tensors_capacity = 0;
    parse->metadata_capacity = 0;
}

static enum stx_status visit_metadata_begin(void *context, struct stx_err *err) {
    (void)err;
    ((struct parse *)context)->header->has_metadata = true;
    return STX_OK;
}

static enum stx_status visit_metadata_pair(void *context, const char *key, size_t key_bytes,
                                           const char *value, size_t value_bytes,
                                           struct stx_err *err) {
    struct parse *parse = context;
    struct stx_header *header = parse->header;
    if (!stx_array_reserve((void **)&header->metadata, &parse->metadata_capacity,
                           header->metadata_count, sizeof *header->metadata))
        return stx_err_set(err, STX_ERR_MEMORY, "no memory for metadata");
    const char *key_copy = arena_copy(header, key, key_bytes);
    const char *value_copy = arena_copy(header, value, value_bytes);
    if (key_copy == NULL || value_copy == NULL)
        return stx_err_set(err, STX_ERR_MEMORY, "no memory for metadata");
    header->metadata[header->metadata_count++] =
        (struct stx_metadata_pair){.key = key_copy,
                                   .value = value_copy,
                                   .key_bytes = (uint32_t)key_bytes,
                                   .value_bytes = (uint32_t)value_bytes};
    return STX_OK;
}

/* Neighbours mostly have the same dtype: compare before searching. */
static enum stx_dtype find_dtype(struct parse *parse, const struct stx_json_tensor *entry) {
    if (parse->dtype == STX_DTYPE_COUNT || parse->dtype_bytes != entry->dtype_bytes ||
        memcmp(stx_dtype_info(parse->dtype)->name, entry->dtype, entry->dtype_bytes) != 0) {
        parse->dtype = stx_dtype_find(entry->dtype, entry->dtype_bytes);
        parse->dtype_bytes = entry->dtype_bytes;
    }
    return parse->dtype;
}

static enum stx_status visit_tensor(void *context, const struct stx_json_tensor *entry,
                                    struct stx_err *err) {
    struct parse *parse = context;
    struct stx_header *header = parse->header;
    const enum stx_dtype dtype = find_dtype(parse, entry);
    if (dtype == STX_DTYPE_COUNT) /* a newer safetensors may know it */
        return stx_err_set(err, STX_ERR_UNSUPPORTED, "unknown dtype");
    if (!stx_array_reserve((void **)&header->tensors, &parse->tensors_capacity,
                           header->tensors_count, sizeof *header->tensors))
        return stx_err_set(err, STX_ERR_MEMORY, "no memory for the tensor table");
    const char *name = arena_copy(header, entry->name, entry->name_bytes);
    const char *shape = arena_copy(header, entry->shape, entry->rank * sizeof *entry->shape);
    if (name == NULL || shape == NULL)
        return stx_err_set(err, STX_ERR_MEMORY, "no memory for the tensor table");
    header->tensors[header->tensors_count++] =
        (struct stx_tensor){.name = name,
                            .name_bytes = (uint32_t)entry->name_bytes,
                            .shape = (const uint64_t *)(const void *)shape,
                            .rank = (uint32_t)entry->rank,
                            .dtype = dtype,
                            .hash = hash_name(entry->name, entry->name_bytes),
                            .begin = entry->begin,
                            .end = entry->end};
    return STX_OK;
}

/* --- validation --- */

/* Where `"name"` stands in the file, for an error text; the header's begin if it is escaped. */
static uint64_t locate_name(const struct parse *parse, const struct stx_tensor *tensor) {
    const char *at = parse->json;
    const char *const end = parse->json + parse->json_bytes;
    while (tensor->name_bytes != 0 &&
           (at = memmem(at, (size_t)(end - at), tensor->name, tensor->name_bytes)) != NULL) {
        const char *behind = at + tensor->name_bytes;
        if (at > parse->json && at[-1] == '"' && behind < end && *behind == '"')
            return STX_HEADER_PREFIX_BYTES + (uint64_t)(at - parse->json) - 1;
        at++;
    }
    return STX_HEADER_PREFIX_BYTES;
}

/* The bytes that shape and dtype ask for. */
static enum stx_status measure_tensor(const struct parse *parse, const struct stx_tensor *tensor,
                                      uint64_t *size_bytes, struct stx_err *err) {
    uint64_t bits = 1;
    for (uint32_t axis = 0; axis < tensor->rank; axis++)
        if (!stx_checked_mul(bits, tensor->shape[axis], &bits))
            return stx_err_set_at(err, locate_name(parse, tensor),
                                  "overflow computing buffer size from shape");
    if (!stx_checked_mul(bits, stx_dtype_info(tensor->dtype)->bits, &bits))
        return stx_err_set_at(err, locate_name(parse, tensor),
                              "overflow computing buffer size from element type");
    if (bits % 8 != 0)
        return stx_err_set_at(err, locate_name(parse, tensor),
                              "a sub-byte tensor does not end at a byte boundary");
    *size_bytes = bits / 8;
    return STX_OK;
}

static enum stx_status check_tensors(const struct parse *parse, struct stx_err *err) {
    const struct stx_header *header = parse->header;
    uint64_t covered = 0;
    for (size_t i = 0; i < header->tensors_count; i++) {
        const struct stx_tensor *tensor = &header->tensors[i];
        uint64_t size_bytes = 0;
        if (tensor->begin != covered || tensor->end < tensor->begin)
            return stx_err_set_at(err, locate_name(parse, tensor), "invalid offset for tensor %.*s",
                                  tensor->name_bytes < 128 ? (int)tensor->name_bytes : 128,
                                  tensor->name);
        STX_TRY(measure_tensor(parse, tensor, &size_bytes, err));
        if (tensor->end - tensor->begin != size_bytes)
            return stx_err_set_at(err, locate_name(parse, tensor),
                                  "invalid shape, data type, or offset for tensor");
        covered = tensor->end;
    }
    uint64_t end = 0;
    if (!stx_checked_add(covered, header->data_begin_bytes, &end) || end != header->file_size_bytes)
        return stx_err_set_at(err, header->data_begin_bytes,
                              "incomplete metadata, file not fully covered");
    return STX_OK;
}

static int compare_offsets(const void *left, const void *right) {
    const struct stx_tensor *a = left, *b = right;
    if (a->begin != b->begin) return a->begin < b->begin ? -1 : 1;
    if (a->end != b->end) return a->end < b->end ? -1 : 1;
    return compare_names(a, b); /* only empty tensors tie; qsort is not stable, names are */
}

static void sort_offsets(struct stx_header *header) {
    for (size_t i = 1; i < header->tensors_count; i++) {
        const struct stx_tensor *a = &header->tensors[i - 1], *b = &header->tensors[i];
        if (a->begin > b->begin || (a->begin == b->begin && a->end > b->end)) {
            qsort(header->tensors, header->tensors_count, sizeof *header->tensors, compare_offsets);
            return;
        }
    }
}

static enum stx_status walk_json(struct parse *parse, struct stx_err *err) {
    const struct stx_json_visitor visitor = {.context = parse,
                                             .restart = visit_restart,
                                             .metadata_begin = visit_metadata_begin,
                                             .metadata_pair = visit_metadata_pair,
                                             .tensor = visit_tensor};
    const enum stx_status status = stx_json_walk(parse->json, parse->json_bytes, &visitor, err);
    if (status == STX_ERR_FORMAT) err->position_bytes += STX_HEADER_PREFIX_BYTES;
    return status;
}

enum stx_status stx_header_length(const unsigned char *prefix, uint64_t file_size_bytes,
                                  uint64_t *json_bytes, struct stx_err *err) {
    if (file_size_bytes < STX_HEADER_PREFIX_BYTES)
        return stx_err_set_at(err, file_size_bytes, "header too small");
    uint64_t length = 0;
    for (int i = STX_HEADER_PREFIX_BYTES - 1; i >= 0; i--) length = length << 8 | prefix[i];
    if (length > STX_HEADER_BYTES_MAX) return stx_err_set_at(err, 0, "header too large");
    if (length > file_size_bytes - STX_HEADER_PREFIX_BYTES)
        return stx_err_set_at(err, 0, "invalid header length");
    *json_bytes = length;
    return STX_OK;
}

enum stx_status stx_header_parse(struct stx_header *header, const char *json, uint64_t json_bytes,
                                 uint64_t file_size_bytes, struct stx_err *err) {
    assert(json_bytes <= STX_HEADER_BYTES_MAX);
    *header = (struct stx_header){.data_begin_bytes = STX_HEADER_PREFIX_BYTES + json_bytes,
                                  .file_size_bytes = file_size_bytes};
    struct parse parse = {
        .header = header, .json = json, .json_bytes = json_bytes, .dtype = STX_DTYPE_COUNT};
    parse.tensors_capacity = (size_t)json_bytes / ENTRY_BYTES_MIN + 1;
    header->tensors = stx_memory_alloc(parse.tensors_capacity * sizeof *header->tensors);
    if (header->tensors == NULL)
        return stx_err_set(err, STX_ERR_MEMORY, "no memory for the tensor table");
    enum stx_status status = walk_json(&parse, err);
    if (status == STX_OK) sort_offsets(header);
    if (status == STX_OK) status = check_tensors(&parse, err);
    if (status == STX_OK) status = index_names(header, err);
    if (status != STX_OK) stx_header_free(header);
    return status;
}

void stx_header_free(struct stx_header *header) {
    while (header->arena != NULL) {
        struct stx_header_block *next = header->arena->next;
        free(header->arena);
        header->arena = next;
    }
    free(header->tensors);
    free(header->metadata);
    free(header->slots);
    *header = (struct stx_header){0};
}
