/* SPDX-License-Identifier: Apache-2.0
 *
 * The JSON walk by simdjson's DOM: the only file that knows simdjson, and the only C++.
 *
 * DESIGN. The DOM validates the text (syntax, UTF-8, escapes, trailing bytes) before the first
 * element is seen, which on-demand parsing does not, and it keeps fields that occur twice in their
 * order, so that they can be refused. Nothing of simdjson's types leaves this file, and nothing
 * throws: it is compiled without exceptions.
 *
 * A DOM of a large header costs mostly the page faults of its fresh memory. So a large header is
 * parsed in pieces of whole entries: it is cut at commas between entries, each piece gets braces of
 * its own, and one small parser serves all. Where to cut is guessed from three bytes, which is
 * safe: if every piece by itself is an object with entries, then, by JSON's grammar, the whole is
 * the object with all these entries; and if one is not, the whole is parsed in one go.
 *
 * It does not find the byte of a syntax error (the DOM does not tell it); the position in such an
 * error is the header's beginning.
 */
#include "json.h"

#include <simdjson.h>

#include <cstdlib>
#include <cstring>

namespace {

namespace dom = simdjson::dom;

/* Deep enough for a header and for some nesting in fields that nobody reads. */
constexpr size_t depth_max = 16;

/* Small enough that text, tape and strings of a piece stay in the second-level cache. The fuzzer
 * makes it tiny, to see pieces in short headers. */
#ifndef STX_JSON_PIECE_BYTES
#define STX_JSON_PIECE_BYTES 65536
#endif
constexpr size_t piece_bytes = STX_JSON_PIECE_BYTES;

/* A list of uint64_t that grows; one is reused for all shapes of a header. */
struct number_list {
    uint64_t *values = nullptr;
    size_t count = 0;
    size_t capacity = 0;

    number_list() = default;
    number_list(const number_list &) = delete;
    number_list &operator=(const number_list &) = delete;
    ~number_list() { std::free(values); }

    bool push(uint64_t value) {
        if (count == capacity) {
            const size_t wanted = capacity == 0 ? 16 : capacity * 2;
            void *grown = std::realloc(values, wanted * sizeof *values);
            if (grown == nullptr) return false;
            values = static_cast<uint64_t *>(grown);
            capacity = wanted;
        }
        values[count++] = value;
        return true;
    }
};

enum stx_status refuse_type(struct stx_err *err, const char *what) {
    return stx_err_set_at(err, 0, "invalid JSON in header: %s", what);
}

/* simdjson reads `-0` as the integer 0, the reference reader as a float, which it refuses. A minus
 * where a value can begin is rare enough to leave the whole header to the reference reader. */
bool has_negative_zero(const char *text, size_t text_bytes) {
    const char *at = text;
    const char *const end = text + text_bytes;
    while ((at = static_cast<const char *>(std::memchr(at, '-', static_cast<size_t>(end - at)))) !=
           nullptr) {
        if (at > text && at + 1 < end && at[1] == '0' && std::strchr("[,: \t\r\n", at[-1]) &&
            at[-1] != '\0')
            return true;
        at++;
    }
    return false;
}

/* Whether a number that nobody reads lies at the edge of double's range, where the reference
 * reader's own arithmetic overflows, and it refuses what is, rounded well, the largest double. The
 * parser's depth limit bounds the recursion. */
bool holds_extreme_number(const dom::element &element) {
    dom::array values;
    dom::object fields;
    double number = 0;
    if (element.is<double>() && element.get(number) == simdjson::SUCCESS)
        return number > 1e308 || number < -1e308;
    if (element.get(values) == simdjson::SUCCESS)
        for (const dom::element value : values)
            if (holds_extreme_number(value)) return true;
    if (element.get(fields) == simdjson::SUCCESS)
        for (const dom::key_value_pair field : fields)
            if (holds_extreme_number(field.value)) return true;
    return false;
}

enum stx_status read_unsigned(const dom::element &element, uint64_t *value, struct stx_err *err) {
    if (!element.is<int64_t>() && !element.is<uint64_t>())
        return refuse_type(err, "expected an unsigned integer");
    if (element.get(*value) != simdjson::SUCCESS)
        return refuse_type(err, "expected an unsigned integer");
    return STX_OK;
}

enum stx_status read_shape(const dom::element &element, number_list *shape, struct stx_err *err) {
    dom::array numbers;
    if (element.get(numbers) != simdjson::SUCCESS) return refuse_type(err, "shape is no array");
    shape->count = 0;
    for (const dom::element number : numbers) {
        uint64_t value = 0;
        STX_TRY(read_unsigned(number, &value, err));
        if (!shape->push(value)) return stx_err_set(err, STX_ERR_MEMORY, "no memory for a shape");
    }
    return STX_OK;
}

enum stx_status read_offsets(const dom::element &element, struct stx_json_tensor *tensor,
                             struct stx_err *err) {
    dom::array numbers;
    uint64_t bounds[2] = {0, 0};
    size_t count = 0;
    if (element.get(numbers) != simdjson::SUCCESS)
        return refuse_type(err, "data_offsets is no array");
    for (const dom::element number : numbers) {
        if (count == 2) return refuse_type(err, "data_offsets has more than two numbers");
        STX_TRY(read_unsigned(number, &bounds[count], err));
        count++;
    }
    if (count != 2) return refuse_type(err, "data_offsets has fewer than two numbers");
    tensor->begin = bounds[0];
    tensor->end = bounds[1];
    return STX_OK;
}

enum stx_status read_tensor(const dom::element &element, struct stx_json_tensor *tensor,
                            number_list *shape, struct stx_err *err) {
    enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4 };
    unsigned seen = 0;
    dom::object fields;
    /* The reference reader also takes an entry written as an array; it may serve that one. */
    if (element.get(fields) != simdjson::SUCCESS)
        return stx_err_set(err, STX_ERR_UNSUPPORTED, "a header entry is no object");
    for (const dom::key_value_pair field : fields) {
        unsigned bit = 0;
        if (field.key == "dtype") bit = DTYPE;
        if (field.key == "shape") bit = SHAPE;
        if (field.key == "data_offsets") bit = OFFSETS;
        if (bit == 0 && holds_extreme_number(field.value))
            return stx_err_set(err, STX_ERR_UNSUPPORTED, "a number at the edge of its range");
        if (bit == 0) continue; /* unknown fields are allowed */
        if ((seen & bit) != 0) return refuse_type(err, "a field occurs twice in an entry");
        seen |= bit;
        if (bit == DTYPE) {
            std::string_view text;
            if (field.value.get(text) != simdjson::SUCCESS)
                return stx_err_set(err, STX_ERR_UNSUPPORTED, "a dtype is no string");
            tensor->dtype = text.data();
            tensor->dtype_bytes = text.size();
        }
        if (bit == SHAPE) STX_TRY(read_shape(field.value, shape, err));
        if (bit == OFFSETS) STX_TRY(read_offsets(field.value, tensor, err));
    }
    if (seen != (DTYPE | SHAPE | OFFSETS))
        return refuse_type(err, "an entry lacks dtype, shape or data_offsets");
    tensor->shape = shape->values;
    tensor->rank = shape->count;
    return STX_OK;
}

enum stx_status walk_metadata(const dom::element &element, const struct stx_json_visitor *visitor,
                              struct stx_err *err) {
    dom::object pairs;
    if (element.is_null()) return STX_OK; /* as if it were not there */
    if (element.get(pairs) != simdjson::SUCCESS)
        return refuse_type(err, "__metadata__ is no object");
    STX_TRY(visitor->metadata_begin(visitor->context, err));
    for (const dom::key_value_pair pair : pairs) {
        std::string_view value;
        if (pair.value.get(value) != simdjson::SUCCESS)
            return refuse_type(err, "a value of __metadata__ is no string");
        STX_TRY(visitor->metadata_pair(visitor->context, pair.key.data(), pair.key.size(),
                                       value.data(), value.size(), err));
    }
    return STX_OK;
}

/* One walk over a header, in as many pieces as it takes. */
struct walk {
    const struct stx_json_visitor *visitor;
    struct stx_err *err;
    dom::parser parser;
    number_list shape;
    bool metadata_seen = false;

    walk(const struct stx_json_visitor *visitor_, struct stx_err *err_)
        : visitor(visitor_), err(err_) {}
};

/* Visit the entries of one object; `*count` becomes their number. */
enum stx_status walk_entries(struct walk *walk, const dom::element &root, size_t *count) {
    const struct stx_json_visitor *visitor = walk->visitor;
    struct stx_err *err = walk->err;
    dom::object entries;
    *count = 0;
    if (root.get(entries) != simdjson::SUCCESS) return refuse_type(err, "the header is no object");
    for (const dom::key_value_pair entry : entries) {
        ++*count;
        if (entry.key == "__metadata__") {
            if (walk->metadata_seen) return refuse_type(err, "__metadata__ occurs twice");
            walk->metadata_seen = true;
            STX_TRY(walk_metadata(entry.value, visitor, err));
            continue;
        }
        struct stx_json_tensor tensor = {};
        tensor.name = entry.key.data();
        tensor.name_bytes = entry.key.size();
        STX_TRY(read_tensor(entry.value, &tensor, &walk->shape, err));
        STX_TRY(visitor->tensor(visitor->context, &tensor, err));
    }
    return STX_OK;
}

/* Where to end a piece that begins at `begin`: the comma of the first `},"` after a piece's worth
 * of bytes, or `end`. */
const char *find_cut(const char *begin, const char *end) {
    if (static_cast<size_t>(end - begin) <= 2 * piece_bytes) return end;
    const void *found =
        memmem(begin + piece_bytes, static_cast<size_t>(end - begin) - piece_bytes, "},\"", 3);
    return found == nullptr ? end : static_cast<const char *>(found) + 1;
}

/* Parse `{` + [begin, end) + `}` and visit it. False: it is no object with entries by itself. */
bool walk_piece(struct walk *walk, char *buffer, const char *begin, const char *end,
                enum stx_status *status) {
    const size_t inner_bytes = static_cast<size_t>(end - begin);
    dom::element root;
    size_t count = 0;
    buffer[0] = '{';
    std::memcpy(buffer + 1, begin, inner_bytes);
    buffer[inner_bytes + 1] = '}';
    std::memset(buffer + inner_bytes + 2, 0, STX_JSON_PADDING_BYTES);
    if (walk->parser.parse(buffer, inner_bytes + 2, false).get(root) != simdjson::SUCCESS)
        return false;
    *status = walk_entries(walk, root, &count);
    return count != 0;
}

/* The longest piece that cutting [begin, end) gives. */
size_t measure_pieces(const char *begin, const char *end) {
    size_t longest_bytes = 0;
    while (begin < end) {
        const char *cut = find_cut(begin, end);
        const size_t bytes = static_cast<size_t>(cut - begin);
        if (bytes > longest_bytes) longest_bytes = bytes;
        begin = cut + 1;
    }
    return longest_bytes;
}

/* Walk a large header piece by piece. False: it has to be parsed in one go, from the start. */
bool walk_pieces(struct walk *walk, const char *text, size_t text_bytes, enum stx_status *status) {
    const char *begin = text, *end = text + text_bytes;
    while (begin < end && std::strchr(" \t\r\n", *begin) && *begin != '\0') begin++;
    while (begin < end && std::strchr(" \t\r\n", end[-1]) && end[-1] != '\0') end--;
    if (end - begin < 2 || *begin != '{' || end[-1] != '}') return false;
    begin++;
    end--;
    const size_t longest_bytes = measure_pieces(begin, end);
    char *buffer = static_cast<char *>(std::malloc(longest_bytes + 2 + STX_JSON_PADDING_BYTES));
    bool whole = buffer != nullptr &&
                 walk->parser.allocate(longest_bytes + 2, depth_max) == simdjson::SUCCESS;
    *status = STX_OK;
    while (whole && *status == STX_OK && begin <= end) {
        const char *cut = find_cut(begin, end);
        whole = walk_piece(walk, buffer, begin, cut, status);
        begin = cut + 1;
    }
    std::free(buffer);
    return whole;
}

enum stx_status walk_whole(struct walk *walk, const char *text, size_t text_bytes) {
    dom::element root;
    size_t count = 0;
    simdjson::error_code code = walk->parser.allocate(text_bytes, depth_max);
    if (code == simdjson::SUCCESS) code = walk->parser.parse(text, text_bytes, false).get(root);
    switch (code) {
        case simdjson::SUCCESS:
            return walk_entries(walk, root, &count);
        case simdjson::MEMALLOC:
            return stx_err_set(walk->err, STX_ERR_MEMORY, "no memory for %zu header bytes",
                               text_bytes);
        case simdjson::DEPTH_ERROR:
        case simdjson::NUMBER_ERROR: /* a big number in a field that nobody reads is allowed */
            return stx_err_set(walk->err, STX_ERR_UNSUPPORTED, "JSON: %s",
                               simdjson::error_message(code));
        default:
            return stx_err_set_at(walk->err, 0, "invalid JSON in header: %s",
                                  simdjson::error_message(code));
    }
}

} /* namespace */

extern "C" enum stx_status stx_json_walk(const char *text, size_t text_bytes,
                                         const struct stx_json_visitor *visitor,
                                         struct stx_err *err) {
    static_assert(STX_JSON_PADDING_BYTES >= simdjson::SIMDJSON_PADDING, "padding of the text");
    struct walk walk(visitor, err);
    enum stx_status status = STX_OK;
    if (has_negative_zero(text, text_bytes))
        return stx_err_set(err, STX_ERR_UNSUPPORTED, "the header has a negative zero");
    if (text_bytes != 0 && static_cast<unsigned char>(text[0]) == 0xEF)
        return refuse_type(err, "a byte order mark"); /* newer parsers skip it */
    if (text_bytes > 2 * piece_bytes) {
        if (walk_pieces(&walk, text, text_bytes, &status)) return status;
        visitor->restart(visitor->context);
        walk.metadata_seen = false;
    }
    return walk_whole(&walk, text, text_bytes);
}
