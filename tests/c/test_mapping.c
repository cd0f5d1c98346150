/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: a mapping shows the file, keeps writes to itself, is aligned when it is large, and
 * is unmapped by its last user, whatever thread that is.
 */
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "mapping.h"

#define USERS 64

static struct stx_err err;

static struct stx_mapping *open_mapping(const char *path, uint64_t *size_bytes) {
    struct stx_file file;
    struct stx_mapping *mapping = NULL;
    CHECK(stx_file_open(&file, path, &err) == STX_OK);
    CHECK(stx_mapping_open(&mapping, &file, &err) == STX_OK);
    *size_bytes = file.identity.size_bytes;
    stx_file_close(&file);
    return mapping;
}

static int is_mapped(const void *address) {
    unsigned char resident;
    return mincore((void *)(uintptr_t)address, 1, &resident) == 0;
}

static void *release(void *mapping) {
    stx_mapping_release(mapping);
    return NULL;
}

static void test_file(const char *path, size_t file_bytes) {
    uint64_t size_bytes = 0;
    char back[4];
    struct stx_mapping *mapping = open_mapping(path, &size_bytes);
    struct stx_mapping *other = open_mapping(path, &size_bytes);
    char *bytes = stx_mapping_bytes(mapping);
    CHECK(size_bytes == file_bytes);
    CHECK(file_bytes < ((size_t)2 << 20) || (uintptr_t)bytes % ((uintptr_t)2 << 20) == 0);
    CHECK(memcmp(bytes, "data", 4) == 0 && bytes[file_bytes - 1] == 'z');
    memcpy(bytes, "mine", 4);
    CHECK(memcmp(stx_mapping_bytes(other), "data", 4) == 0);
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL && fread(back, 1, 4, file) == 4 && memcmp(back, "data", 4) == 0);
    fclose(file);
    stx_mapping_expect_random(mapping);
    stx_mapping_will_need(mapping, 0, file_bytes);
    CHECK(memcmp(bytes, "mine", 4) == 0);

    pthread_t threads[USERS];
    for (int i = 0; i < USERS; i++) stx_mapping_retain(mapping);
    stx_mapping_release(mapping);
    for (int i = 1; i < USERS; i++) CHECK(pthread_create(&threads[i], NULL, release, mapping) == 0);
    for (int i = 1; i < USERS; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(is_mapped(bytes));
    stx_mapping_release(mapping);
    CHECK(!is_mapped(bytes));
    stx_mapping_release(other);
    stx_mapping_release(NULL);
}

int main(void) {
    char path[] = "/tmp/stx-test-mapping-XXXXXX";
    const int descriptor = mkstemp(path);
    struct stx_file none;
    CHECK(descriptor >= 0);
    CHECK(write(descriptor, "data", 4) == 4);
    CHECK(pwrite(descriptor, "z", 1, 99) == 1);
    test_file(path, 100);
    CHECK(pwrite(descriptor, "z", 1, 5000000) == 1);
    test_file(path, 5000001);
    close(descriptor);
    unlink(path);
    CHECK(stx_file_open(&none, path, &err) == STX_ERR_IO && err.sys_errno != 0);
    CHECK(stx_file_open(&none, "/tmp", &err) == STX_ERR_UNSUPPORTED);
    return 0;
}
