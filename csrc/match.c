/* SPDX-License-Identifier: Apache-2.0
 *
 * Name matching. The glob walks both texts once, going back to the last star only, so its time is
 * at most the product of the two lengths. Texts are valid UTF-8 (both come out of Python strings
 * or a validated header); a step is one code point.
 */
#include "match.h"

#include <string.h>

/* The code point at `*at`, which moves behind it. `*at` < `end`, valid UTF-8. */
static uint32_t next_code_point(const char **at, const char *end) {
    const unsigned char lead = (unsigned char)*(*at)++;
    if (lead < 0x80) return lead;
    const int more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
    uint32_t code_point = lead & (0x3Fu >> more);
    for (int i = 0; i < more && *at < end; i++)
        code_point = code_point << 6 | ((unsigned char)*(*at)++ & 0x3Fu);
    return code_point;
}

/* The bracket that closes the set opened before `at`, or NULL: then `[` stands for itself. */
static const char *find_set_end(const char *at, const char *end) {
    if (at < end && *at == '!') at++;
    if (at < end && *at == ']') at++;
    return at < end ? memchr(at, ']', (size_t)(end - at)) : NULL;
}

/* Whether `code_point` is in the set [at, end). An empty range is as if it were not written, so a
 * `!` behind it is the first character: fnmatch reads it so. */
static bool match_set(const char *at, const char *end, uint32_t code_point) {
    bool negated = false, found = false, is_first = true;
    while (at < end) {
        if (is_first && *at == '!') {
            negated = true;
            is_first = false;
            at++;
            continue;
        }
        const uint32_t low = next_code_point(&at, end);
        uint32_t high = low;
        if (at + 1 < end && *at == '-') {
            at++;
            high = next_code_point(&at, end);
        }
        if (low > high) continue;
        is_first = false;
        if (low <= code_point && code_point <= high) found = true;
    }
    return found != negated;
}

/* Match one code point of the name against one element of the pattern that is no star. */
static bool match_one(const char **pattern, const char *pattern_end, const char **name,
                      const char *name_end) {
    const uint32_t wanted = next_code_point(pattern, pattern_end);
    const uint32_t code_point = next_code_point(name, name_end);
    if (wanted == '?') return true;
    if (wanted == '[') {
        const char *set_end = find_set_end(*pattern, pattern_end);
        if (set_end != NULL) {
            const bool matched = match_set(*pattern, set_end, code_point);
            *pattern = set_end + 1;
            return matched;
        }
    }
    return wanted == code_point;
}

static bool equals(struct stx_text a, struct stx_text b) {
    return a.size_bytes == b.size_bytes && memcmp(a.bytes, b.bytes, a.size_bytes) == 0;
}

bool stx_match_glob(struct stx_text pattern, struct stx_text name) {
    const char *pattern_at = pattern.bytes, *name_at = name.bytes;
    const char *const pattern_end = pattern.bytes + pattern.size_bytes;
    const char *const name_end = name.bytes + name.size_bytes;
    const char *star = NULL;      /* behind the last star of the pattern */
    const char *star_name = NULL; /* where the name stood when that star began to match */
    if (equals(pattern, name)) return true;
    while (name_at < name_end) {
        if (pattern_at < pattern_end && *pattern_at == '*') {
            star = ++pattern_at;
            star_name = name_at;
            continue;
        }
        if (pattern_at < pattern_end && match_one(&pattern_at, pattern_end, &name_at, name_end))
            continue;
        if (star == NULL) return false;
        (void)next_code_point(&star_name, name_end); /* the star takes one more */
        pattern_at = star;
        name_at = star_name;
    }
    while (pattern_at < pattern_end && *pattern_at == '*') pattern_at++;
    return pattern_at == pattern_end;
}

bool stx_match_prefix(struct stx_text prefix, struct stx_text name) {
    if (name.size_bytes < prefix.size_bytes ||
        memcmp(name.bytes, prefix.bytes, prefix.size_bytes) != 0)
        return false;
    if (name.size_bytes == prefix.size_bytes) return true;
    const bool ends_in_dot = prefix.size_bytes != 0 && prefix.bytes[prefix.size_bytes - 1] == '.';
    return ends_in_dot || name.bytes[prefix.size_bytes] == '.';
}

static bool is_word(const char *const words[], size_t words_count, const char *word,
                    size_t word_bytes) {
    for (size_t i = 0; i < words_count; i++)
        if (strlen(words[i]) == word_bytes && memcmp(words[i], word, word_bytes) == 0) return true;
    return false;
}

/* The decimal number a component spells; false for anything else. Too large a number saturates. */
static bool read_number(const char *digits, size_t digits_count, uint64_t *number) {
    uint64_t value = 0;
    if (digits_count == 0) return false;
    for (size_t i = 0; i < digits_count; i++) {
        if (digits[i] < '0' || digits[i] > '9') return false;
        const uint64_t digit = (uint64_t)(digits[i] - '0');
        value = value > (UINT64_MAX - digit) / 10 ? UINT64_MAX : value * 10 + digit;
    }
    *number = value;
    return true;
}

bool stx_match_layers(uint64_t start, uint64_t stop, struct stx_text name) {
    static const char *const words[] = {"layers", "layer", "blocks", "block", "h"};
    const char *at = name.bytes;
    const char *const end = name.bytes + name.size_bytes;
    bool after_word = false;
    for (;;) {
        const char *dot = at < end ? memchr(at, '.', (size_t)(end - at)) : NULL;
        const size_t component_bytes = (size_t)((dot != NULL ? dot : end) - at);
        uint64_t number = 0;
        if (after_word && read_number(at, component_bytes, &number) && start <= number &&
            number < stop)
            return true;
        after_word = is_word(words, sizeof words / sizeof words[0], at, component_bytes);
        if (dot == NULL) return false;
        at = dot + 1;
    }
}

bool stx_match_expert(struct stx_text name, uint64_t *number, bool *is_weight) {
    static const char *const words[] = {"experts"};
    static const char *const weights[] = {"weight", "weight_packed", "qweight"};
    const char *at = name.bytes;
    const char *const end = name.bytes + name.size_bytes;
    bool after_word = false, is_found = false;
    for (;;) {
        const char *dot = at < end ? memchr(at, '.', (size_t)(end - at)) : NULL;
        const size_t component_bytes = (size_t)((dot != NULL ? dot : end) - at);
        is_found = is_found || (after_word && read_number(at, component_bytes, number));
        after_word = is_word(words, 1, at, component_bytes);
        if (dot == NULL) {
            *is_weight = is_word(weights, sizeof weights / sizeof weights[0], at, component_bytes);
            return is_found;
        }
        at = dot + 1;
    }
}
