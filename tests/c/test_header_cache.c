/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: a table is made once for a file that is opened again with the same header, never for
 * another header, and the cache is bounded, shared by threads and left whole by a fork.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "header_cache.h"
#include "json.h"

static struct stx_err err;

/* The beginning of a file of one tensor called `name`, and its size in `key`. */
static char *make_text(const char *name, uint64_t inode, struct stx_header_key *key,
                       uint64_t *json_bytes) {
    char *text = calloc(1, 512 + STX_JSON_PADDING_BYTES);
    CHECK(text != NULL);
    const int count =
        snprintf(text + STX_HEADER_PREFIX_BYTES, 500,
                 "{\"%s\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", name);
    CHECK(count > 0);
    *json_bytes = (uint64_t)count;
    *key = (struct stx_header_key){
        .device = 1, .inode = inode, .file_size_bytes = STX_HEADER_PREFIX_BYTES + *json_bytes + 4};
    return text;
}

/* Open the file once; the table has the name, and was `reused` or not. */
static struct stx_shared_header *get(const char *name, uint64_t inode, bool reused_wanted) {
    struct stx_shared_header *shared;
    struct stx_header_key key;
    uint64_t json_bytes;
    bool reused;
    char *text = make_text(name, inode, &key, &json_bytes);
    CHECK(stx_header_cache_get(&shared, &reused, &key, &text, json_bytes, &err) == STX_OK);
    free(text);
    const struct stx_header *table = stx_shared_header_table(shared);
    CHECK(table->tensors_count == 1 && stx_header_find(table, name, strlen(name)) != NULL);
    CHECK(reused == reused_wanted);
    CHECK(!reused || stx_shared_header_number(shared) != 0);
    return shared;
}

static void open_and_close(const char *name, uint64_t inode, bool reused_wanted) {
    stx_shared_header_release(get(name, inode, reused_wanted));
}

static void test_from_the_second_opening_on(void) {
    open_and_close("a", 1, false);
    struct stx_shared_header *second = get("a", 1, false);
    struct stx_shared_header *third = get("a", 1, true);
    CHECK(second == third && stx_shared_header_number(second) != 0);
    stx_shared_header_release(second);
    stx_shared_header_release(third);
    open_and_close("a", 1, true);
    open_and_close("a", 2, false); /* another file with the same header */
    stx_shared_header_release(NULL);
}

static void test_another_header(void) {
    open_and_close("b", 3, false);
    struct stx_shared_header *old = get("b", 3, false);
    struct stx_shared_header *changed = get("c", 3, false); /* same file, same size */
    CHECK(old != changed && stx_shared_header_number(old) != stx_shared_header_number(changed));
    CHECK(stx_header_find(stx_shared_header_table(old), "b", 1) != NULL);
    open_and_close("c", 3, true);
    open_and_close("b", 3, false);
    stx_shared_header_release(old);
    stx_shared_header_release(changed);
}

static void test_what_is_malformed(void) {
    struct stx_shared_header *shared;
    struct stx_header_key key;
    uint64_t json_bytes;
    bool reused;
    for (int i = 0; i < 3; i++) {
        char *text = make_text("d", 4, &key, &json_bytes);
        key.file_size_bytes++;
        CHECK(stx_header_cache_get(&shared, &reused, &key, &text, json_bytes, &err) ==
              STX_ERR_FORMAT);
        CHECK(text != NULL && !reused);
        free(text);
    }
}

static void test_bounded(void) {
    for (int round = 0; round < 2; round++)
        for (uint64_t inode = 1000; inode < 1200; inode++) open_and_close("e", inode, false);
    for (uint64_t inode = 1000; inode < 1200; inode++) open_and_close("e", inode, true);
    for (int round = 0; round < 2; round++) /* these push the older ones out */
        for (uint64_t inode = 2000; inode < 2250; inode++) open_and_close("e", inode, false);
    open_and_close("e", 1000, false);
    open_and_close("e", 2249, true);
}

static void *open_many(void *unused) {
    (void)unused;
    for (int i = 0; i < 300; i++) {
        char name[2] = {(char)('f' + i % 3), 0};
        struct stx_shared_header *shared;
        struct stx_header_key key;
        uint64_t json_bytes;
        bool reused;
        char *text = make_text(name, 5 + (uint64_t)(i % 2), &key, &json_bytes);
        CHECK(stx_header_cache_get(&shared, &reused, &key, &text, json_bytes, &err) == STX_OK);
        free(text);
        CHECK(stx_header_find(stx_shared_header_table(shared), name, 1) != NULL);
        stx_shared_header_release(shared);
    }
    return NULL;
}

static void test_threads(void) {
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, open_many, NULL) == 0);
    for (int i = 0; i < 4; i++) CHECK(pthread_join(threads[i], NULL) == 0);
}

static void test_fork(void) {
    open_and_close("i", 7, false);
    open_and_close("i", 7, false);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        open_and_close("i", 7, true);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    open_and_close("i", 7, true);
}

int main(void) {
    test_from_the_second_opening_on();
    test_another_header();
    test_what_is_malformed();
    test_bounded();
    test_threads();
    test_fork();
    return 0;
}
