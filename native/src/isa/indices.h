/* Walks one row of a clustered matrix: where its bytes lie, and which table applies to which blocks. A set is the rows
 * that share their codebooks. */
#ifndef CQ_INDICES_H
#define CQ_INDICES_H
#include "kernels.h"
#include <string.h>

typedef struct {
    const uint8_t *indices;
    const uint8_t *above, *above2; /* indices of the rows one and two above in its set; of the row itself without T */
    const int8_t *centroids, *group_scales; /* group_scales: NULL where the matrix has none */
    int32_t n_blocks, codebook_blocks, scale_blocks;
} cq_row;

/* Consecutive blocks [begin, end) that share a codebook and a group scale, hence one table. */
typedef struct {
    const int8_t *centroids, *group_scale;
    int32_t begin, end, codebook_end, scale_end;
} cq_span;

/* Calls function(type, ...) with the type as a compile-time constant. */
#define CQ_TYPE_CASE(type, function, ...)                                                                              \
    case type:                                                                                                         \
        function(type, __VA_ARGS__);                                                                                   \
        break;
#define CQ_WITH_TYPE(w, ...)                                                                                           \
    switch ((w)->type) {                                                                                               \
        CQ_TYPE_CASE(CQ_CQ2, __VA_ARGS__)                                                                              \
        CQ_TYPE_CASE(CQ_CQ3, __VA_ARGS__)                                                                              \
        CQ_TYPE_CASE(CQ_CQ4, __VA_ARGS__)                                                                              \
        CQ_TYPE_CASE(CQ_CQ5, __VA_ARGS__)                                                                              \
        CQ_TYPE_CASE(CQ_CQ2T, __VA_ARGS__)                                                                             \
        CQ_TYPE_CASE(CQ_CQ3T, __VA_ARGS__)                                                                             \
        CQ_TYPE_CASE(CQ_CQ4T, __VA_ARGS__)                                                                             \
    }

/* Whether no expert's last rows are fewer than share codebooks: then nothing needs a division. */
static inline int cq_full_sets(const cq_matrix *w) { return (w->n_rows & (w->codebook_rows - 1)) == 0; }

/* Which row of codebooks a row (counted over all experts) looks up. */
static inline int64_t cq_codebook_row(const cq_matrix *w, int64_t row) {
    const int32_t shift = __builtin_ctz((unsigned)w->codebook_rows);
    if (w->n_experts == 1 || cq_full_sets(w)) return row >> shift;
    const int64_t expert = row / w->n_rows;
    return expert * cq_ceil_div(w->n_rows, w->codebook_rows) + ((row - expert * w->n_rows) >> shift);
}

/* How many rows from this one on share its codebooks, those of its set: at least one. */
static inline int32_t cq_sharing_rows(const cq_matrix *w, int64_t row) {
    const int64_t in_expert = w->n_experts == 1 || cq_full_sets(w) ? row : row % w->n_rows;
    const int32_t in_set = w->codebook_rows - (int32_t)(in_expert & (w->codebook_rows - 1));
    return cq_full_sets(w) ? in_set : cq_min(in_set, (int32_t)(w->n_rows - in_expert));
}

/* The row `up` rows above (1 or 2), in the set of rows that share their codebooks: the first follows the last. */
static inline int64_t cq_row_above(const cq_matrix *w, int64_t row, int32_t up) {
    const int64_t last = w->codebook_rows - 1;
    if (cq_full_sets(w)) return (row & ~last) | ((row - up) & last);
    const int32_t in_expert = (int32_t)(row % w->n_rows), position = in_expert & (w->codebook_rows - 1);
    const int32_t size = cq_min(w->codebook_rows, w->n_rows - (in_expert - position));
    return row - position + (position + 2 * size - up) % size;
}

CQ_INLINE cq_row cq_row_at(const cq_matrix *w, int64_t row) {
    const int32_t index_bits = cq_index_bits(w->type), scale_cols = w->scale_cols ? w->scale_cols : w->n_cols;
    const int64_t n_codebooks = w->codebook_cols >= w->n_cols ? 1 : cq_ceil_div(w->n_cols, w->codebook_cols);
    const int64_t n_groups = scale_cols == CQ_BLOCK ? w->n_cols / CQ_BLOCK : cq_ceil_div(w->n_cols, scale_cols);
    const int64_t row_bytes = (int64_t)w->n_cols / 8 * cq_stored_bits(w->type);
    const int trellis = cq_has_trellis(w->type);
    return (cq_row){
        .indices = w->data + row * row_bytes,
        .above = w->data + (trellis ? cq_row_above(w, row, 1) : row) * row_bytes,
        .above2 = w->data + (trellis ? cq_row_above(w, row, 2) : row) * row_bytes,
        .centroids = w->centroids + (cq_codebook_row(w, row) * n_codebooks << index_bits),
        .group_scales = w->scale_cols ? w->group_scales + row * n_groups : NULL,
        .n_blocks = w->n_cols / CQ_BLOCK,
        .codebook_blocks = w->codebook_cols / CQ_BLOCK,
        .scale_blocks = scale_cols / CQ_BLOCK,
    };
}

static inline cq_span cq_first_span(const cq_row *row) {
    const int32_t end = cq_min(row->n_blocks, cq_min(row->codebook_blocks, row->scale_blocks));
    return (cq_span){row->centroids, row->group_scales, 0, end, row->codebook_blocks, row->scale_blocks};
}

/* The caller stops at n_blocks: past it, pointers would leave the tensors. */
static inline void cq_next_span(const cq_row *row, int32_t type, cq_span *span) {
    span->begin = span->end;
    if (span->begin == span->codebook_end) {
        span->codebook_end += row->codebook_blocks;
        span->centroids += 1 << cq_index_bits(type);
    }
    if (span->begin == span->scale_end) {
        span->scale_end += row->scale_blocks;
        if (span->group_scale) span->group_scale++;
    }
    span->end = cq_min(row->n_blocks, cq_min(span->codebook_end, span->scale_end));
}

/* Eight bytes of a block as 64 bits, bit j of column j. */
static inline uint64_t cq_plane(const uint8_t *bytes) {
    uint64_t plane;
    memcpy(&plane, bytes, 8);
    return plane;
}
#endif
