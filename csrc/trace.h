/* SPDX-License-Identifier: Apache-2.0
 *
 * The flight recorder: what happened when, in a ring of fixed size that keeps the newest.
 *
 * Off until somebody starts it; a place that records costs one relaxed load then. On, a record
 * costs two looks at the clock and four atomic operations, takes no lock, and never waits. Memory
 * is taken by the start and given back by the end, however much was recorded between them.
 * Guarantee: what is read back of a record is whole, or it is told to be lost. Any thread. A forked
 * child records nothing until it starts anew. Knows nothing of who records. No Python.
 */
#ifndef STX_TRACE_H
#define STX_TRACE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "err.h"

/* Records that are kept by default, of 96 bytes each. */
#define STX_TRACE_RECORDS 65536
#define STX_TRACE_NUMBERS 6
/* Texts that are kept (paths, reasons), and the most bytes of one. */
#define STX_TRACE_TEXTS 1024
#define STX_TRACE_TEXT_BYTES 1024

/* What happened; stx_trace_info has the names of its numbers. */
enum stx_trace_kind {
    STX_TRACE_OPEN,        /* a file was opened natively: header, filter */
    STX_TRACE_FILTER,      /* a filter was asked about every entry */
    STX_TRACE_PLAN,        /* reads were planned */
    STX_TRACE_CACHE,       /* the page cache was asked what it holds */
    STX_TRACE_LOAD,        /* many tensors of a file were loaded */
    STX_TRACE_ENGINE,      /* an engine was made, ran, and was closed */
    STX_TRACE_READ,        /* one request, from its submission to its completion */
    STX_TRACE_READ_AHEAD,  /* pages of a mapping were read before anybody touched them */
    STX_TRACE_COPY,        /* copies of one slot to a device were begun */
    STX_TRACE_DEVICE_COPY, /* from there until it was seen that they had happened */
    STX_TRACE_WAIT,        /* a thread waited; the text says for what */
    STX_TRACE_TENSORS,     /* tensors were made over memory that is there */
    STX_TRACE_FALLBACK,    /* a call was handed to stock */
    STX_TRACE_ERROR,       /* something was refused or failed */
    STX_TRACE_KINDS
};

enum stx_trace_shape {
    STX_TRACE_SPAN,   /* within its thread: ends before what it is in */
    STX_TRACE_BESIDE, /* beside its thread, and beside others of its kind */
    STX_TRACE_MOMENT, /* it has no length */
};

/* How a kind is told to people. Static. */
struct stx_trace_info {
    const char *name;
    enum stx_trace_shape shape;
    const char *text;                       /* what `text` is; NULL: it has none */
    const char *words;                      /* what `words` is; NULL: it has none */
    const char *numbers[STX_TRACE_NUMBERS]; /* NULL behind the last */
};
const struct stx_trace_info *stx_trace_info(enum stx_trace_kind kind);

struct stx_trace_record {
    uint64_t begin_ns; /* of the monotonic clock */
    uint64_t end_ns;
    const char *text; /* static, or NULL */
    uint64_t numbers[STX_TRACE_NUMBERS];
    uint32_t label; /* of the file's path; 0: none */
    uint32_t words; /* a label, too: a reason, a message */
    uint32_t kind;
    uint32_t thread; /* the system's number of it */
};

/* The lowest bit: recording. The rest counts those who are about it, in twos. */
extern atomic_uint stx_trace_gate;

static inline bool stx_trace_is_on(void) {
    return (atomic_load_explicit(&stx_trace_gate, memory_order_relaxed) & 1) != 0;
}

uint64_t stx_trace_now_ns(void);

/* When something begins that is to be recorded; 0 while nobody records. */
static inline uint64_t stx_trace_begin(void) { return stx_trace_is_on() ? stx_trace_now_ns() : 0; }

/* Record a `kind` from `begin_ns` until now, with up to STX_TRACE_NUMBERS numbers; nothing if that
 * is 0. `text` is static. Arguments are looked at only where there is something to record. */
#define STX_TRACE(kind, begin_ns, label, text, ...)                                \
    do {                                                                           \
        if ((begin_ns) != 0)                                                       \
            stx_trace_add((kind), (begin_ns), stx_trace_now_ns(), (label), (text), \
                          (const uint64_t[STX_TRACE_NUMBERS]){__VA_ARGS__});       \
    } while (0)

/* The same with an end of its own. */
void stx_trace_add(enum stx_trace_kind kind, uint64_t begin_ns, uint64_t end_ns, uint32_t label,
                   const char *text, const uint64_t numbers[STX_TRACE_NUMBERS]);

/* Moments, now, if somebody records: a call was handed to stock; `err` was met. */
void stx_trace_fallback(const char *reason);
void stx_trace_error(uint32_t label, uint64_t offset_bytes, const struct stx_err *err);

/* The number of a text, for as long as this recording lasts: a longer one is cut. 0 while nobody
 * records, and for what there is no room for. Takes a lock. */
uint32_t stx_trace_label(const char *text);

/* --- whoever records; one thread at a time --- */

/* Begin, with a ring of so many; false without memory. Once more does nothing. */
bool stx_trace_start(uint32_t records_count);

/* End, and free everything, as soon as no thread is about it. Without a start it does nothing. */
void stx_trace_stop(void);

/* How many records there have been since the start: the next one's number. */
uint64_t stx_trace_count(void);

/* The record of a number; false if it is lost: younger ones took its place, or it was not whole. */
bool stx_trace_get(uint64_t number, struct stx_trace_record *record);

/* The text of a label, NULL if it is none of this recording. Borrowed until the stop. */
const char *stx_trace_label_text(uint32_t label);

#endif
