/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: a header is accepted or refused with the right status and byte position, names are
 * found and sorted, and large headers, which are parsed in pieces, come out as small ones do.
 */
#include <string.h>

#include "check.h"
#include "header.h"
#include "json.h"

static struct stx_err err;

/* Parse `json` as the header of a file with `data_bytes` of data. */
static enum stx_status parse(struct stx_header *header, const char *json, uint64_t data_bytes) {
    const size_t length = strlen(json);
    char *text = calloc(1, length + STX_JSON_PADDING_BYTES);
    memcpy(text, json, length);
    const enum stx_status status =
        stx_header_parse(header, text, length, 8 + length + data_bytes, &err);
    free(text);
    return status;
}

static void check_refused(const char *json, uint64_t data_bytes, enum stx_status expected,
                          uint64_t position_bytes) {
    struct stx_header header;
    const enum stx_status status = parse(&header, json, data_bytes);
    if (status != expected || (status == STX_ERR_FORMAT && err.position_bytes != position_bytes))
        fprintf(stderr, "%s: status %d at %llu: %s\n", json, (int)status,
                (unsigned long long)err.position_bytes, err.message);
    CHECK(status == expected);
    CHECK(status != STX_ERR_FORMAT || err.position_bytes == position_bytes);
    CHECK(header.tensors == NULL && header.arena == NULL && header.slots == NULL);
}

static void test_accepted(void) {
    struct stx_header header;
    const char *json =
        " {\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[1,9]},"
        "\"__metadata__\":{\"k\":\"v\"},"
        "\"a\\u0000\":{\"shape\":[],\"dtype\":\"U8\",\"data_offsets\":[0,1],\"extra\":[1.5]}}\n ";
    CHECK(parse(&header, json, 9) == STX_OK);
    CHECK(header.tensors_count == 2 && header.has_metadata && header.metadata_count == 1);
    CHECK(header.tensors[0].name_bytes == 2 && memcmp(header.tensors[0].name, "a\0", 2) == 0);
    CHECK(header.tensors[0].rank == 0 && header.tensors[0].dtype == STX_DTYPE_U8);
    CHECK(header.tensors[1].shape[0] == 2 && header.tensors[1].end == 9);
    CHECK(stx_header_find(&header, "b", 1) == &header.tensors[1]);
    CHECK(stx_header_find(&header, "a\0", 2) == &header.tensors[0]);
    CHECK(stx_header_find(&header, "a", 1) == NULL && stx_header_find(&header, "", 0) == NULL);
    stx_header_free(&header);
    CHECK(parse(&header, "{}", 0) == STX_OK && header.tensors_count == 0 && !header.has_metadata);
    CHECK(stx_header_find(&header, "x", 1) == NULL);
    stx_header_free(&header);
    CHECK(parse(&header, "{\"__metadata__\":null}", 0) == STX_OK && !header.has_metadata);
    stx_header_free(&header);
    CHECK(parse(&header, "{\"z\":{\"dtype\":\"F32\",\"shape\":[0,3],\"data_offsets\":[0,0]}}", 0) ==
          STX_OK);
    stx_header_free(&header);
}

#define ENTRY(name, dtype, shape, begin, end)                 \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape \
    "],"                                                      \
    "\"data_offsets\":[" begin "," end "]}"

static void test_refused(void) {
    const enum stx_status bad = STX_ERR_FORMAT, stock = STX_ERR_UNSUPPORTED;
    check_refused("", 0, bad, 8);
    check_refused("[]", 0, bad, 8);
    check_refused("{", 0, bad, 8);
    check_refused("{}x", 0, bad, 8);
    check_refused("{\"a\":1}", 0, stock, 0);
    check_refused("{" ENTRY("a", "U8", "1", "0", "1") ",}", 1, bad, 8);
    check_refused("{" ENTRY("a", "U8", "1", "0", "1") "," ENTRY("a", "U8", "1", "0", "1") "}", 1,
                  bad, 9); /* the second one's offset */
    check_refused("{" ENTRY("z", "U8", "0", "0", "0") "," ENTRY("z", "U8", "0", "0", "0") "}", 0,
                  stock, 0); /* twice, offsets fine */
    check_refused("{" ENTRY("a", "U9", "1", "0", "1") "}", 1, stock, 0);
    check_refused("{" ENTRY("a", "U8", "-0", "0", "0") "}", 0, stock, 0);
    check_refused("{" ENTRY("a", "U8", "-1", "0", "1") "}", 1, bad, 8);
    check_refused("{" ENTRY("a", "U8", "1.0", "0", "1") "}", 1, bad, 8);
    check_refused("{" ENTRY("a", "U8", "1", "1", "2") "}", 2, bad, 9);
    check_refused("{" ENTRY("a", "U8", "1", "0", "1") "," ENTRY("b", "U8", "1", "2", "3") "}", 3,
                  bad, 61);
    check_refused("{" ENTRY("a", "U8", "2", "0", "1") "}", 1, bad, 9);
    check_refused("{" ENTRY("a", "U8", "1", "0", "1") "}", 2, bad, 8 + 53);
    check_refused("{" ENTRY("a", "U8", "1", "0", "1") "}", 0, bad, 8 + 53);
    check_refused("{" ENTRY("a", "F4", "1", "0", "1") "}", 1, bad, 9);
    check_refused("{" ENTRY("a", "U8", "9223372036854775807,3", "0", "1") "}", 1, bad, 9);
    check_refused("{" ENTRY("a", "F64", "2305843009213693952", "0", "1") "}", 1, bad, 9);
    check_refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, bad, 8);
    check_refused(
        "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],"
        "\"data_offsets\":[0,1]}}",
        1, bad, 8);
    check_refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,2]}}", 1, bad, 8);
    check_refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, bad, 8);
    check_refused("{\"__metadata__\":{\"a\":1}}", 0, bad, 8);
    check_refused("{\"__metadata__\":{},\"__metadata__\":{}}", 0, bad, 8);
    check_refused("{\"\xFF\":1}", 0, bad, 8);
    check_refused("{\"a\":[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]}", 0, stock, 0);
}

static void test_lengths(void) {
    const unsigned char huge[8] = {1, 0xE1, 0xF5, 5}; /* 100,000,001 */
    const unsigned char most[8] = {0, 0xE1, 0xF5, 5};
    uint64_t length = 0;
    CHECK(stx_header_length(huge, UINT64_C(1) << 40, &length, &err) == STX_ERR_FORMAT);
    CHECK(stx_header_length(most, UINT64_C(1) << 40, &length, &err) == STX_OK);
    CHECK(length == STX_HEADER_BYTES_MAX);
    CHECK(stx_header_length(most, 100000007, &length, &err) == STX_ERR_FORMAT);
    CHECK(stx_header_length(most, 100000008, &length, &err) == STX_OK);
    CHECK(stx_header_length(most, 7, &length, &err) == STX_ERR_FORMAT);
}

/* `count` entries of one byte, named so that file order is not name order. */
static char *make_large(size_t count, const char *end) {
    char *json = malloc(count * 96 + 64);
    char *at = json;
    *at++ = '{';
    for (size_t i = 0; i < count; i++)
        at += sprintf(at,
                      "%s\"t},%05zu\":{\"dtype\":\"U8\",\"shape\":[1],"
                      "\"data_offsets\":[%zu,%zu]}",
                      i == 0 ? "" : ",", (i * 7919) % count, i, i + 1);
    (void)strcpy(at, end);
    return json;
}

static void test_large(void) {
    const size_t count = 50000;
    struct stx_header header;
    char *json = make_large(count, "}");
    uint32_t *order = malloc(count * sizeof *order);
    CHECK(parse(&header, json, count) == STX_OK && header.tensors_count == count);
    for (size_t i = 0; i < count; i += 997) {
        char name[16];
        const int name_bytes = sprintf(name, "t},%05zu", (i * 7919) % count);
        CHECK(stx_header_find(&header, name, (size_t)name_bytes) == &header.tensors[i]);
    }
    CHECK(stx_header_sort_names(&header, order, &err) == STX_OK);
    for (size_t i = 1; i < count; i++)
        CHECK(memcmp(header.tensors[order[i - 1]].name, header.tensors[order[i]].name, 8) < 0);
    stx_header_free(&header);
    free(json);
    json = make_large(count, ",}"); /* wrong in the last piece only */
    CHECK(parse(&header, json, count) == STX_ERR_FORMAT && header.tensors == NULL);
    free(json);
    json = make_large(count, ",\"__metadata__\":{\"a\":\"b\"}}");
    CHECK(parse(&header, json, count) == STX_OK && header.metadata_count == 1);
    stx_header_free(&header);
    free(json);
    free(order);
}

/* What a parsed header promises, whatever the text was. */
static void check_promises(const struct stx_header *header) {
    uint32_t order[16];
    uint64_t covered_bytes = 0;
    CHECK(header->tensors_count <= 16);
    for (size_t i = 0; i < header->tensors_count; i++) {
        const struct stx_tensor *tensor = &header->tensors[i];
        uint64_t bits = stx_dtype_info(tensor->dtype)->bits;
        for (uint32_t axis = 0; axis < tensor->rank; axis++) bits *= tensor->shape[axis];
        CHECK(tensor->begin == covered_bytes && tensor->end == covered_bytes + bits / 8);
        CHECK(stx_header_find(header, tensor->name, tensor->name_bytes) == tensor);
        covered_bytes = tensor->end;
    }
    CHECK(header->data_begin_bytes + covered_bytes == header->file_size_bytes);
    CHECK(stx_header_sort_names(header, order, &err) == STX_OK);
}

static const char small_header[] =
    "{\"__metadata__\":{\"k\":\"\\u00e9\"},\"b\":{\"dtype\":\"F32\",\"shape\":[2],"
    "\"data_offsets\":[1,9]},\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
    "\"c\\ud83e\\udd99\":{\"dtype\":\"F4\",\"shape\":[0,3],\"data_offsets\":[9,9]}}";

/* Cut anywhere or with bytes changed, a header is refused, or taken and right. Run with the
 * address sanitizer, this also shows that nothing is read beyond the padding. */
static void test_damaged(void) {
    const char letters[] = "\0 \"\\{}[],:0123456789-+.eEnulltruesU8F64\x80\xC3\xFF";
    const size_t length = sizeof small_header - 1;
    uint64_t seed = 77;
    int taken = 0;
    for (int round = 0; round < 40000; round++) {
        struct stx_header header;
        const size_t cut = round <= (int)length ? (size_t)round : length;
        char *text = calloc(1, cut + STX_JSON_PADDING_BYTES);
        memcpy(text, small_header, cut);
        for (uint64_t edits = round <= (int)length ? 0 : 1 + random_below(&seed, 3); edits > 0;
             edits--)
            text[random_below(&seed, cut)] = letters[random_below(&seed, sizeof letters - 1)];
        const enum stx_status status = stx_header_parse(&header, text, cut, 8 + cut + 9, &err);
        CHECK(round >= (int)length || status == STX_ERR_FORMAT);
        CHECK(round != (int)length || status == STX_OK);
        if (status == STX_OK) check_promises(&header);
        if (status != STX_OK) CHECK(err.status == status && strlen(err.message) > 0);
        if (status == STX_ERR_FORMAT) CHECK(err.position_bytes <= 8 + cut);
        taken += status == STX_OK;
        stx_header_free(&header);
        CHECK(header.tensors == NULL && header.arena == NULL);
        free(text);
    }
    CHECK(taken > 100); /* changed names and white space */
}

/* A long name that is not UTF-8 any more where it is cut, and one that stands there escaped. */
static void test_messages(void) {
    struct stx_header header;
    char json[2048] = "{\"";
    size_t at = 2;
    for (int i = 0; i < 300; i++) at += (size_t)snprintf(json + at, sizeof json - at, "\xC3\xA9");
    (void)snprintf(json + at, sizeof json - at,
                   "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}");
    CHECK(parse(&header, json, 2) == STX_ERR_FORMAT);
    CHECK(strlen(err.message) < STX_ERR_MESSAGE_BYTES && err.position_bytes == 9);
    check_refused("{\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}", 2,
                  STX_ERR_FORMAT, 8);
}

/* The order of code points, with empty names, prefixes of each other and all planes. */
static void test_order(void) {
    static const char *const sorted[] = {"",
                                         "\x01",
                                         "A",
                                         "a",
                                         "a.0",
                                         "a.10",
                                         "a.2",
                                         "aa",
                                         "\xC3\xA9",
                                         "\xEF\xBF\xBF",
                                         "\xF0\x9F\xA6\x99"};
    enum { COUNT = sizeof sorted / sizeof sorted[0] };
    uint64_t seed = 5;
    for (int round = 0; round < 200; round++) {
        struct stx_tensor tensors[COUNT];
        uint32_t order[COUNT];
        const struct stx_header header = {.tensors = tensors, .tensors_count = COUNT};
        for (size_t i = 0; i < COUNT; i++)
            tensors[i] =
                (struct stx_tensor){.name = sorted[i], .name_bytes = (uint32_t)strlen(sorted[i])};
        for (size_t i = COUNT - 1; i > 0; i--) {
            const size_t other = random_below(&seed, i + 1);
            const struct stx_tensor swapped = tensors[i];
            tensors[i] = tensors[other];
            tensors[other] = swapped;
        }
        CHECK(stx_header_sort_names(&header, order, &err) == STX_OK);
        for (size_t i = 0; i < COUNT; i++) CHECK(tensors[order[i]].name == sorted[i]);
    }
}

int main(void) {
    test_accepted();
    test_refused();
    test_lengths();
    test_large();
    test_damaged();
    test_messages();
    test_order();
    return 0;
}
