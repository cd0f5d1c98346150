/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: globs, prefixes, layer ranges and experts mean what the documentation says.
 */
#include <string.h>

#include "check.h"
#include "match.h"

static struct stx_text text(const char *bytes) {
    return (struct stx_text){.bytes = bytes, .size_bytes = strlen(bytes)};
}

static bool glob(const char *pattern, const char *name) {
    return stx_match_glob(text(pattern), text(name));
}

static bool prefix(const char *wanted, const char *name) {
    return stx_match_prefix(text(wanted), text(name));
}

static bool layers(uint64_t start, uint64_t stop, const char *name) {
    return stx_match_layers(start, stop, text(name));
}

static bool expert(const char *name, uint64_t wanted, bool weight_wanted) {
    uint64_t number = 0;
    bool is_weight = false;
    return stx_match_expert(text(name), &number, &is_weight) && number == wanted &&
           is_weight == weight_wanted;
}

static void test_experts(void) {
    uint64_t number;
    bool is_weight;
    CHECK(expert("a.experts.7.w1.weight", 7, true) && expert("experts.07.qweight", 7, true));
    CHECK(expert("experts.7", 7, false) && expert("experts.7.weight_scale", 7, false));
    CHECK(expert("experts.x.experts.3.experts.4.weight_packed", 3, true));
    CHECK(expert("experts.99999999999999999999999.b", UINT64_MAX, false));
    CHECK(!stx_match_expert(text(""), &number, &is_weight) && !is_weight);
    CHECK(!stx_match_expert(text("myexperts.1.weight"), &number, &is_weight) && is_weight);
    CHECK(!stx_match_expert(text("experts..1"), &number, &is_weight));
}

static void test_globs(void) {
    CHECK(glob("", "") && !glob("", "a") && !glob("a", ""));
    CHECK(glob("*", "") && glob("*", "anything.at.all") && glob("**", "x"));
    CHECK(glob("a*c", "abc") && glob("a*c", "ac") && !glob("a*c", "ab"));
    CHECK(glob("*.weight", "a.b.weight") && !glob("*.weight", "a.b.weight.1"));
    CHECK(glob("a*b*c", "a1b2b3c") && !glob("a*b*c", "a1c2b"));
    CHECK(glob("?", "x") && !glob("?", "xy") && glob("?", "\xC3\xA9") && !glob("??", "\xC3\xA9"));
    CHECK(glob("[abc]", "b") && !glob("[abc]", "d") && glob("[a-c]x", "bx"));
    CHECK(glob("[!a-c]", "d") && !glob("[!a-c]", "b"));
    CHECK(glob("[]]", "]") && glob("[!]]", "x") && !glob("[!]]", "]"));
    CHECK(glob("[", "[") && glob("a[b", "a[b") && !glob("[", "x"));
    CHECK(glob("[a-]", "-") && glob("[-a]", "-") && glob("[a-]", "a"));
    CHECK(glob("[a--!]", "x") && !glob("[b-a!z]", "z")); /* as fnmatch reads them */
    CHECK(!glob("[z-a]", "m") && glob("[!z-a]", "m"));
    CHECK(glob("[\xC3\xA0-\xC3\xBF]", "\xC3\xA9"));
    CHECK(glob("w[0]*", "w[0]*")); /* a name equal to the pattern comes first */
    CHECK(!glob("A", "a"));
    CHECK(glob("*a*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"));
}

static void test_prefixes(void) {
    CHECK(prefix("model.layers.1", "model.layers.1.weight"));
    CHECK(!prefix("model.layers.1", "model.layers.10.weight"));
    CHECK(prefix("model.layers.1", "model.layers.1"));
    CHECK(prefix("model.", "model.x") && !prefix("model.", "modelx"));
    CHECK(!prefix("model.layers", "model.layer") && !prefix("b", "a.b"));
}

static void test_layers(void) {
    CHECK(layers(0, 2, "model.layers.0.w") && layers(0, 2, "model.layers.1"));
    CHECK(!layers(0, 2, "model.layers.2.w") && !layers(0, 2, "model.layers.10.w"));
    CHECK(layers(3, 4, "h.3.ln") && layers(2, 3, "x.blocks.2") && layers(1, 2, "block.1"));
    CHECK(layers(5, 6, "layer.05.w"));
    CHECK(!layers(0, 9, "layers.w") && !layers(0, 9, "layers") && !layers(0, 9, "xlayers.1"));
    CHECK(!layers(0, 9, "layers.-1") && !layers(0, 9, "layers.1x") && !layers(0, 9, ""));
    CHECK(layers(4, 5, "encoder.layers.9.blocks.4.w"));
    CHECK(!layers(0, 9, "layers.99999999999999999999999999"));
    CHECK(!layers(2, 2, "layers.2"));
}

int main(void) {
    test_globs();
    test_experts();
    test_prefixes();
    test_layers();
    return 0;
}
