/* Walks one row of a clustered matrix: where its bytes lie, and which table applies to which blocks. */
#ifndef CQ_INDICES_H
#define CQ_INDICES_H
#include "kernels.h"

typedef struct {
    const uint8_t *indices;
    const int8_t *centroids, *group_scales; /* group_scales: NULL where the matrix has none */
    int32_t n_blocks, codebook_blocks, scale_blocks;
} cq_row;

/* Consecutive blocks [begin, end) that share a codebook and a group scale, hence one table. */
typedef struct {
    const int8_t *centroids, *group_scale;
    int32_t begin, end, codebook_end, scale_end;
} cq_span;

/* Calls function(bits, ...) with the bits as a compile-time constant. */
#define CQ_WITH_BITS(w, function, ...)                                                                                 \
    switch (cq_bits(w)) {                                                                                              \
    case 2:                                                                                                            \
        function(2, __VA_ARGS__);                                                                                      \
        break;                                                                                                         \
    case 3:                                                                                                            \
        function(3, __VA_ARGS__);                                                                                      \
        break;                                                                                                         \
    case 4:                                                                                                            \
        function(4, __VA_ARGS__);                                                                                      \
        break;                                                                                                         \
    case 5:                                                                                                            \
        function(5, __VA_ARGS__);                                                                                      \
        break;                                                                                                         \
    }

static inline int32_t cq_min(int32_t a, int32_t b) { return a < b ? a : b; }

/* Which row of codebooks a row (counted over all experts) looks up. */
static inline int64_t cq_codebook_row(const cq_matrix *w, int64_t row) {
    const int32_t shift = __builtin_ctz((unsigned)w->codebook_rows);
    if (w->n_experts == 1 || w->n_rows % w->codebook_rows == 0) return row >> shift;
    const int64_t expert = row / w->n_rows;
    return expert * cq_ceil_div(w->n_rows, w->codebook_rows) + ((row - expert * w->n_rows) >> shift);
}

static inline cq_row cq_row_at(const cq_matrix *w, int64_t row) {
    const int32_t bits = cq_bits(w), scale_cols = w->scale_cols ? w->scale_cols : w->n_cols;
    const int64_t n_codebooks = cq_ceil_div(w->n_cols, w->codebook_cols), n_groups = cq_ceil_div(w->n_cols, scale_cols);
    return (cq_row){
        .indices = w->data + row * (w->n_cols / 8 * bits),
        .centroids = w->centroids + (cq_codebook_row(w, row) * n_codebooks << bits),
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
static inline void cq_next_span(const cq_row *row, int32_t bits, cq_span *span) {
    span->begin = span->end;
    if (span->begin == span->codebook_end) span->codebook_end += row->codebook_blocks, span->centroids += 1 << bits;
    if (span->begin == span->scale_end) {
        span->scale_end += row->scale_blocks;
        if (span->group_scale) span->group_scale++;
    }
    span->end = cq_min(row->n_blocks, cq_min(span->codebook_end, span->scale_end));
}
#endif
