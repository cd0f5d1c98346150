/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: a file is read whole or not at all, what is no regular file is refused unopened, and
 * a source leaves no descriptor open, whether it opens or not.
 */
#include <dirent.h>
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "file.h"
#include "source.h"

static struct stx_err err;

static int count_descriptors(void) {
    int count = 0;
    DIR *folder = opendir("/proc/self/fd");
    CHECK(folder != NULL);
    while (readdir(folder) != NULL) count++;
    closedir(folder);
    return count;
}

static void write_file(const char *path, const void *bytes, size_t size_bytes) {
    FILE *file = fopen(path, "wb");
    CHECK(file != NULL && fwrite(bytes, 1, size_bytes, file) == size_bytes);
    CHECK(fclose(file) == 0);
}

static void test_reading(const char *path) {
    struct stx_file file;
    char got[8] = "";
    write_file(path, "0123456789", 10);
    CHECK(stx_file_open(&file, path, &err) == STX_OK && file.identity.size_bytes == 10);
    CHECK(stx_file_read(&file, got, 4, 3, &err) == STX_OK && memcmp(got, "3456", 4) == 0);
    CHECK(stx_file_read(&file, got, 0, 99, &err) == STX_OK);
    CHECK(stx_file_read(&file, got, 4, 7, &err) == STX_ERR_IO && err.sys_errno == 0);
    CHECK(strcmp(err.message, "file truncated at byte 10") == 0);
    CHECK(truncate(path, 2) == 0);
    CHECK(stx_file_read(&file, got, 4, 1, &err) == STX_ERR_IO);
    uint64_t cached_bytes = 0;
    const enum stx_status told = stx_file_cached_bytes(&file, &cached_bytes, &err);
    CHECK(told == STX_OK || told == STX_ERR_UNSUPPORTED);
    stx_file_expect_sequential(&file);
    stx_file_close(&file);
    CHECK(file.fd == -1);
    stx_file_close(&file);
    CHECK(stx_file_read(&file, got, 1, 0, &err) == STX_ERR_IO && err.sys_errno == EBADF);
}

static void check_no_file(const char *path, enum stx_status expected, int sys_errno) {
    struct stx_file file;
    struct stx_source source;
    CHECK(stx_file_open(&file, path, &err) == expected && file.fd == -1);
    CHECK(expected != STX_ERR_IO || err.sys_errno == sys_errno);
    CHECK(stx_source_open(&source, path, STX_SOURCE_ASKED, &err) == expected);
    CHECK(source.mapping == NULL && source.header.tensors == NULL);
    stx_source_close(&source);
}

static void test_no_files(const char *path) {
    char below[128];
    (void)snprintf(below, sizeof below, "%s/below", path);
    write_file(path, "x", 1);
    check_no_file(below, STX_ERR_IO, ENOTDIR);
    CHECK(unlink(path) == 0);
    check_no_file(path, STX_ERR_IO, ENOENT);
    check_no_file("", STX_ERR_IO, ENOENT);
    check_no_file("/", STX_ERR_UNSUPPORTED, 0);
    check_no_file("/dev/zero", STX_ERR_UNSUPPORTED, 0);
    CHECK(mkfifo(path, 0600) == 0); /* nobody writes: waiting would hang here */
    check_no_file(path, STX_ERR_UNSUPPORTED, 0);
    CHECK(unlink(path) == 0 && symlink(path, path) == 0);
    check_no_file(path, STX_ERR_IO, ELOOP);
    CHECK(unlink(path) == 0);
}

/* A valid file whose header is padded to `json_bytes`. */
static size_t make_file(char *bytes, size_t json_bytes) {
    static const char entry[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]}}";
    for (int i = 0; i < 8; i++) bytes[i] = (char)(json_bytes >> (8 * i));
    memset(bytes + 8, ' ', json_bytes);
    memcpy(bytes + 8, entry, sizeof entry - 1);
    memcpy(bytes + 8 + json_bytes, "abc", 3);
    return 8 + json_bytes + 3;
}

static void test_sources(const char *path) {
    /* Around the length of the first read, where a second one is needed. */
    const size_t lengths[] = {60, 65000, 65525, 65526, 65527, 65528, 65529, 65536, 200000};
    char *bytes = malloc(300000);
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        struct stx_source source;
        const size_t size_bytes = make_file(bytes, lengths[i]);
        write_file(path, bytes, size_bytes);
        CHECK(stx_source_open(&source, path, i % 2 == 0 ? STX_SOURCE_ASKED : STX_SOURCE_MAPPED,
                              &err) == STX_OK);
        CHECK(source.file.fd == -1);
        const struct stx_tensor *tensor = stx_header_find(&source.header, "a", 1);
        const char *data = stx_mapping_bytes(source.mapping) + source.header.data_begin_bytes;
        CHECK(tensor != NULL && memcmp(data + tensor->begin, "abc", 3) == 0);
        CHECK(source.header_reads_count == (8 + lengths[i] > 65536 ? 2u : 1u));
        CHECK(source.file.identity.size_bytes == size_bytes);
        stx_source_close(&source);
        CHECK(source.mapping == NULL && source.header.tensors == NULL);
        stx_source_close(&source);
        char read_back[3];
        CHECK(stx_source_open(&source, path, STX_SOURCE_FILE, &err) == STX_OK);
        CHECK(source.mapping == NULL && source.file.fd >= 0);
        CHECK(stx_file_read(&source.file, read_back, 3, source.header.data_begin_bytes, &err) ==
              STX_OK);
        CHECK(memcmp(read_back, "abc", 3) == 0);
        stx_source_close(&source);
        CHECK(source.file.fd == -1);
        write_file(path, bytes, size_bytes - 1);
        CHECK(stx_source_open(&source, path, STX_SOURCE_MAPPED, &err) == STX_ERR_FORMAT);
        CHECK(err.position_bytes == 8 + lengths[i]);
    }
    write_file(path, "short", 5);
    struct stx_source source;
    CHECK(stx_source_open(&source, path, STX_SOURCE_MAPPED, &err) == STX_ERR_FORMAT &&
          err.position_bytes == 5);
    free(bytes);
}

int main(void) {
    char path[] = "/tmp/stx-test-file-XXXXXX";
    const int descriptor = mkstemp(path);
    CHECK(descriptor >= 0 && close(descriptor) == 0);
    const int before = count_descriptors();
    test_reading(path);
    test_no_files(path);
    test_sources(path);
    CHECK(count_descriptors() == before);
    CHECK(unlink(path) == 0);
    return 0;
}
