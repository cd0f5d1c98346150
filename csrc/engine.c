/* SPDX-License-Identifier: Apache-2.0
 *
 * Picks an engine and counts what is outstanding. Guarantee: an implementation never sees more
 * requests than its depth, nor a call after its close. Does no I/O itself.
 */
#include "engine.h"

#include <assert.h>
#include <stddef.h>

/* Best first. */
static const struct {
    enum stx_engine_kind kind;
    const struct stx_engine_ops *ops;
} siblings[] = {
    {STX_ENGINE_URING, &stx_engine_uring},
    {STX_ENGINE_THREADS, &stx_engine_threads},
};

enum stx_status stx_engine_open(struct stx_engine *engine, const struct stx_engine_options *options,
                                struct stx_err *err) {
    assert(options->depth <= STX_ENGINE_DEPTH_MAX);
    enum stx_status status = STX_ERR_UNSUPPORTED;
    for (size_t i = 0; i < sizeof siblings / sizeof siblings[0]; i++) {
        if (options->kind != STX_ENGINE_AUTO && options->kind != siblings[i].kind) continue;
        *engine = (struct stx_engine){
            .ops = siblings[i].ops,
            .depth = options->depth == 0 ? STX_ENGINE_DEPTH_MAX : options->depth,
        };
        status = siblings[i].ops->open(engine, options, err);
        if (status != STX_ERR_UNSUPPORTED) break;
    }
    if (status != STX_OK) *engine = (struct stx_engine){0};
    return status;
}

enum stx_status stx_engine_submit(struct stx_engine *engine, const struct stx_io *io,
                                  struct stx_err *err) {
    assert(engine->outstanding < engine->depth && engine->depth <= STX_ENGINE_DEPTH_MAX);
    assert(io->size_bytes != 0 && io->size_bytes <= STX_IO_BYTES_MAX);
    STX_TRY(engine->ops->submit(engine, io, err));
    engine->outstanding++;
    return STX_OK;
}

enum stx_status stx_engine_reap(struct stx_engine *engine, struct stx_io_done done[],
                                uint32_t capacity, uint32_t timeout_ms, uint32_t *count,
                                struct stx_err *err) {
    assert(engine->outstanding != 0 && capacity != 0);
    *count = 0;
    STX_TRY(engine->ops->reap(engine, done, capacity, timeout_ms, count, err));
    assert(*count <= engine->outstanding && *count <= capacity);
    engine->outstanding -= *count;
    return STX_OK;
}

void stx_engine_close(struct stx_engine *engine) {
    if (engine->ops != NULL) engine->ops->close(engine);
    *engine = (struct stx_engine){0};
}
