/* SPDX-License-Identifier: Apache-2.0
 *
 * Opens one file: prefix and most headers come with one read of 64 KiB, a longer header with a
 * second one, into memory of our own (never out of the mapping, where a fault could be a signal).
 * The length is checked before memory is asked for.
 */
#include "source.h"

#include <stdlib.h>
#include <string.h>

#include "checked.h"
#include "json.h"
#include "memory.h"

#define FIRST_READ_BYTES UINT64_C(65536)

/* Read prefix and header text. After STX_OK `*text` is owned by the caller and holds the whole
 * beginning of the file, so that the JSON begins at STX_HEADER_PREFIX_BYTES. */
static enum stx_status read_text(struct stx_source *source, const struct stx_file *file,
                                 char **text, uint64_t *json_bytes, struct stx_err *err) {
    const uint64_t first_bytes = stx_min_u64(FIRST_READ_BYTES, file->identity.size_bytes);
    char *buffer = malloc((size_t)(first_bytes + STX_JSON_PADDING_BYTES));
    if (buffer == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for a header");
    enum stx_status status = stx_file_read(file, buffer, first_bytes, 0, err);
    if (status == STX_OK)
        status = stx_header_length((const unsigned char *)buffer, file->identity.size_bytes,
                                   json_bytes, err);
    if (status != STX_OK) goto out;
    source->header_reads_count = 1;
    source->header_read_bytes = first_bytes;
    const uint64_t whole_bytes = STX_HEADER_PREFIX_BYTES + *json_bytes;
    if (whole_bytes > first_bytes) {
        char *larger = stx_memory_alloc((size_t)(whole_bytes + STX_JSON_PADDING_BYTES));
        if (larger == NULL) {
            status = stx_err_set(err, STX_ERR_MEMORY, "no memory for a header");
            goto out;
        }
        memcpy(larger, buffer, (size_t)first_bytes);
        free(buffer);
        buffer = larger;
        status =
            stx_file_read(file, buffer + first_bytes, whole_bytes - first_bytes, first_bytes, err);
        source->header_reads_count = 2;
        source->header_read_bytes = whole_bytes;
    }
    /* The padding is read by the parser's wide loads; make its value not matter. */
    if (status == STX_OK) memset(buffer + whole_bytes, 0, STX_JSON_PADDING_BYTES);
out:
    if (status != STX_OK) {
        free(buffer);
        return status;
    }
    *text = buffer;
    return STX_OK;
}

static enum stx_status open_parts(struct stx_source *source, enum stx_source_how how,
                                  struct stx_err *err) {
    const struct stx_file *file = &source->file;
    struct stx_err ignored;
    char *text = NULL;
    uint64_t json_bytes = 0;
    stx_file_expect_random(file); /* the header, and nothing ahead of it */
    STX_TRY(read_text(source, file, &text, &json_bytes, err));
    const struct stx_header_key key = {.device = file->identity.device,
                                       .inode = file->identity.inode,
                                       .file_size_bytes = file->identity.size_bytes};
    const enum stx_status status =
        stx_header_cache_get(&source->shared, &source->header_reused, &key, &text, json_bytes, err);
    free(text);
    if (status != STX_OK) return status;
    source->header = *stx_shared_header_table(source->shared);
    if (how == STX_SOURCE_FILE) return STX_OK;
    if (how == STX_SOURCE_ASKED &&
        stx_file_cached_bytes(file, &source->cached_bytes, &ignored) != STX_OK)
        source->cached_bytes = 0;
    stx_file_expect_sequential(file); /* holds for the mapping too: it shares the open file */
    return stx_mapping_open(&source->mapping, file, err);
}

enum stx_status stx_source_open(struct stx_source *source, const char *path,
                                enum stx_source_how how, struct stx_err *err) {
    *source = (struct stx_source){.file = {.fd = -1}};
    STX_TRY(stx_file_open(&source->file, path, err));
    const enum stx_status status = open_parts(source, how, err);
    if (status != STX_OK)
        stx_source_close(source);
    else if (how != STX_SOURCE_FILE)
        stx_file_close(&source->file);
    return status;
}

void stx_source_close(struct stx_source *source) {
    stx_shared_header_release(source->shared);
    source->header = (struct stx_header){.tensors = NULL};
    source->shared = NULL;
    stx_mapping_release(source->mapping);
    stx_file_close(&source->file);
    source->mapping = NULL;
}
