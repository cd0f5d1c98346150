/* SPDX-License-Identifier: Apache-2.0
 *
 * Two files cut into reads and pieces, and a consumer of the pieces that trusts nothing: it checks
 * every byte when a piece is done, overwrites it, and looks at the end whether that is still so.
 */
#ifndef STX_TEST_LOADING_H
#define STX_TEST_LOADING_H

#include "faulty.h"
#include "load.h"
#include "scratch.h"

#define FILES_COUNT 2
#define READS_MAX 256
#define OVERWRITTEN 0x5A

struct world {
    struct scratch scratch[FILES_COUNT];
    struct stx_load_file files[FILES_COUNT];
    struct stx_read reads[READS_MAX];
    struct stx_load_piece pieces[READS_MAX];
    size_t sizes[READS_MAX]; /* of each piece's memory */
    size_t reads_count, pieces_count;
    uint64_t bytes; /* of all reads */
};

enum { PIECE_UNKNOWN, PIECE_BEGUN, PIECE_DONE };

struct consumer {
    const struct world *world;
    const struct stx_engine *engine; /* NULL where the loop has its own */
    const struct faulty *faulty;     /* or NULL */
    char *memory[READS_MAX];
    int states[READS_MAX];
    size_t next_piece, done_count;
    uint64_t calls, laters, asked;
    uint64_t reaps_at_later; /* not asked again before there was another */
    bool answers_later;
    size_t off_by;           /* bytes by which its memory is not aligned */
    size_t stop_at, fail_at; /* pieces */
    uint64_t cancel_from;    /* requests submitted */
    bool is_over;            /* no hook may be called any more */
};

static inline void world_add(struct world *world, uint32_t file, uint64_t begin, uint64_t end) {
    struct stx_load_piece *piece = &world->pieces[world->pieces_count];
    size_t *size_bytes = &world->sizes[world->pieces_count];
    CHECK(world->reads_count < READS_MAX && begin < end);
    if (piece->reads_count++ == 0) piece->read_first = world->reads_count;
    world->reads[world->reads_count++] = (struct stx_read){begin, end, file, *size_bytes};
    *size_bytes += (end - begin + 4095) / 4096 * 4096;
    world->bytes += end - begin;
}

static inline void world_end_piece(struct world *world) {
    world->pieces_count++;
    CHECK(world->pieces_count < READS_MAX);
}

/* Both files in turn, in reads of up to `read_bytes`, with holes; pieces of one to four reads, and
 * one without any. With an odd `first_byte` nothing is aligned. */
static inline void world_cut(struct world *world, uint64_t read_bytes, uint64_t first_byte) {
    uint64_t state = 99, at[FILES_COUNT] = {first_byte, first_byte};
    world->reads_count = world->pieces_count = 0;
    world->bytes = 0;
    memset(world->pieces, 0, sizeof world->pieces);
    memset(world->sizes, 0, sizeof world->sizes);
    for (uint32_t turn = 0, left = FILES_COUNT; left != 0; turn++) {
        const uint32_t file = turn / 3 % FILES_COUNT;
        const uint64_t end = world->files[file].size_bytes;
        left = 0;
        for (uint32_t i = 0; i < FILES_COUNT; i++) left += at[i] < world->files[i].size_bytes;
        if (at[file] >= end) continue;
        const uint64_t until = at[file] + read_bytes < end ? at[file] + read_bytes : end;
        world_add(world, file, at[file], until);
        at[file] = until + (random_below(&state, 4) == 0 ? read_bytes : 0);
        if (random_below(&state, 3) == 0) world_end_piece(world);
        if (turn == 5) world_end_piece(world);
    }
    world_end_piece(world);
}

static inline void world_make(struct world *world, const char *folder, size_t file_bytes) {
    static const char *const names[FILES_COUNT] = {"first", "second"};
    *world = (struct world){0};
    for (uint32_t i = 0; i < FILES_COUNT; i++) {
        make_scratch(&world->scratch[i], folder, names[i], file_bytes + i * 1000, i + 1);
        world->files[i] = (struct stx_load_file){.fd = world->scratch[i].fd,
                                                 .direct_fd = world->scratch[i].direct_fd,
                                                 .size_bytes = world->scratch[i].size_bytes};
    }
}

static inline void world_free(struct world *world) {
    for (uint32_t i = 0; i < FILES_COUNT; i++) remove_scratch(&world->scratch[i]);
}

static inline bool world_has_direct(const struct world *world) {
    return world->scratch[0].direct_fd >= 0;
}

static inline void world_use_direct(struct world *world, bool direct) {
    for (uint32_t i = 0; i < FILES_COUNT; i++)
        world->files[i].direct_fd = direct ? world->scratch[i].direct_fd : -1;
}

static inline enum stx_load_next consumer_begin(void *context, size_t piece, bool may_wait,
                                                char **memory) {
    struct consumer *consumer = context;
    CHECK(!consumer->is_over && piece == consumer->next_piece);
    CHECK(!may_wait || consumer->engine == NULL || consumer->engine->outstanding == 0);
    if (consumer->faulty != NULL && !may_wait)
        CHECK(consumer->faulty->reaps >= consumer->reaps_at_later);
    consumer->calls++;
    if (piece == consumer->stop_at || piece == consumer->fail_at) {
        consumer->is_over = true;
        return piece == consumer->stop_at ? STX_LOAD_STOP : STX_LOAD_FAILED;
    }
    /* Often twice in a row, so that nothing is in flight at last. */
    if (consumer->answers_later && consumer->calls % (may_wait ? 7 : 3) != 0) {
        consumer->laters++;
        if (consumer->faulty != NULL && !may_wait)
            consumer->reaps_at_later = consumer->faulty->reaps + 1;
        return STX_LOAD_LATER;
    }
    consumer->memory[piece] = allocate_aligned(consumer->world->sizes[piece] + consumer->off_by);
    consumer->states[piece] = PIECE_BEGUN;
    consumer->next_piece++;
    *memory = consumer->memory[piece] + consumer->off_by;
    return STX_LOAD_READY;
}

static inline void consumer_done(void *context, size_t index) {
    struct consumer *consumer = context;
    const struct world *world = consumer->world;
    const struct stx_load_piece *piece = &world->pieces[index];
    char *memory = consumer->memory[index] + consumer->off_by;
    CHECK(!consumer->is_over && consumer->states[index] == PIECE_BEGUN);
    CHECK(consumer->faulty == NULL ||
          !faulty_writes_into(consumer->faulty, memory, world->sizes[index]));
    for (size_t i = piece->read_first; i < piece->read_first + piece->reads_count; i++) {
        const struct stx_read *read = &world->reads[i];
        CHECK(memcmp(memory + read->memory_bytes,
                     world->scratch[read->file_index].bytes + read->begin_bytes,
                     read->end_bytes - read->begin_bytes) == 0);
    }
    memset(memory, OVERWRITTEN, world->sizes[index]);
    consumer->states[index] = PIECE_DONE;
    consumer->done_count++;
}

static inline bool consumer_keep_going(void *context) {
    struct consumer *consumer = context;
    CHECK(!consumer->is_over);
    consumer->asked++;
    consumer->is_over =
        consumer->faulty != NULL && consumer->faulty->submitted >= consumer->cancel_from;
    return !consumer->is_over;
}

static inline struct consumer consumer_make(const struct world *world) {
    return (struct consumer){
        .world = world, .stop_at = SIZE_MAX, .fail_at = SIZE_MAX, .cancel_from = UINT64_MAX};
}

static inline struct stx_load_job world_job(const struct world *world, struct consumer *consumer) {
    return (struct stx_load_job){
        .files = world->files,
        .reads = world->reads,
        .pieces = world->pieces,
        .files_count = FILES_COUNT,
        .reads_count = world->reads_count,
        .pieces_count = world->pieces_count,
        .hooks = {consumer, consumer_begin, consumer_done, consumer_keep_going}};
}

/* What was done is as its owner left it; everything is done if `is_whole`. */
static inline void consumer_check_and_free(struct consumer *consumer, bool is_whole) {
    const struct world *world = consumer->world;
    CHECK(!is_whole || consumer->done_count == world->pieces_count);
    for (size_t i = 0; i < world->pieces_count; i++) {
        for (size_t j = 0; consumer->states[i] == PIECE_DONE && j < world->sizes[i]; j++)
            CHECK(consumer->memory[i][consumer->off_by + j] == OVERWRITTEN);
        free(consumer->memory[i]);
    }
}

/* One load on `inner` behind `faulty`, which was set up by faulty_open. Closes both. */
static inline enum stx_status run_faulty(struct stx_engine *engine, struct faulty *faulty,
                                         struct consumer *consumer, uint64_t inflight_bytes,
                                         struct stx_load_result *result, struct stx_err *err) {
    struct stx_load_job job = world_job(consumer->world, consumer);
    job.limits.inflight_bytes = inflight_bytes;
    consumer->engine = engine;
    consumer->faulty = faulty;
    *err = (struct stx_err){STX_OK, 0, 0, ""};
    const enum stx_status status = stx_load_run_on(engine, &job, result, err);
    CHECK(engine->outstanding == 0 || faulty->reap_fails_at != UINT64_MAX);
    CHECK(result->requests == faulty->submitted && strcmp(result->engine, "faulty") == 0);
    stx_engine_close(engine);
    return status;
}

#endif
