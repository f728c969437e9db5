/* GEMV in AVX-512. Four rows at once, where they share their codebooks: one codebook in registers serves
 * all four, their independent sums hide latency, and with a trellis three of four find the row above already loaded. */
#ifndef CQ_AVX512_GEMV_H
#define CQ_AVX512_GEMV_H
#include "isa/avx512_tables.h"
#include "isa/template/decode.h"

enum { GEMV_ROWS = 4 };

/* Rows at once. stored: the two rows above the first in its set, then the rows. */
typedef struct {
    cursor c[GEMV_ROWS];
    codebook book;
    const uint8_t *stored[2 + GEMV_ROWS];
} row_group;

CQ_INLINE row_group group_at(const int32_t N, const int32_t type, const enum table_source source, const cq_matrix *w,
                             int64_t row) {
    row_group g;
#pragma GCC unroll 4
    for (int32_t r = 0; r < N; r++) {
        g.c[r] = cursor_at(w, row + r, type, source);
        g.stored[2 + r] = g.c[r].row.indices;
    }
    g.stored[0] = g.c[0].row.above2, g.stored[1] = g.c[0].row.above;
    if (scales_codebook(source)) g.book = load_codebook(g.c[0].row.centroids, g.c[0].row.codebook_blocks, type);
    return g;
}

/* sum[r] += blocks b .. b + n - 1 of N rows. */
CQ_INLINE void gemv_step(const int32_t N, const int32_t type, const enum table_source source, row_group *g, int32_t b,
                         const int32_t n, const int8_t *x, __m512i *sum) {
    if (scales_codebook(source)) move_codebook(&g->book, &g->c[0].row, type, b);
#pragma GCC unroll 4
    for (int32_t r = 0; r < N; r++) {
        entries tables[4];
        tables_at(&g->c[r], &g->book, type, source, b, n, tables);
#pragma GCC unroll 4
        for (int32_t i = 0; i < n; i++) {
            const int64_t at = (int64_t)(b + i) * 8 * cq_stored_bits(type);
            const weights64 weights =
                decode_block(g->stored[2 + r] + at, g->stored[1 + r] + at, g->stored[r] + at, type, tables[i]);
            sum[r] = _mm512_dpbusd_epi32(sum[r], weights, _mm512_loadu_si512(x + (b + i) * CQ_BLOCK));
        }
    }
}

/* One block of four rows, whose tables are the four lanes. */
CQ_INLINE void gemv_last(const int32_t type, const enum table_source source, row_group *g, int32_t b, const int8_t *x,
                         __m512i *sum) {
    const int32_t at_scale = source == PAIR_SCALES ? b / 2 : b;
    const int64_t at = (int64_t)b * 8 * cq_stored_bits(type);
    uint32_t scales = 0;
    entries tables[4];
    move_codebook(&g->book, &g->c[0].row, type, b);
#pragma GCC unroll 4
    for (int32_t r = 0; r < 4; r++) scales |= (uint32_t)(uint8_t)g->c[r].row.group_scales[at_scale] << 8 * r;
    const lanes_of_entries four = four_tables(&g->book, (int32_t)scales, type, BLOCK_SCALES);
    split_tables(&four, type, tables);
    const __m512i activations = _mm512_loadu_si512(x + b * CQ_BLOCK);
#pragma GCC unroll 4
    for (int32_t r = 0; r < 4; r++) {
        const weights64 weights =
            decode_block(g->stored[2 + r] + at, g->stored[1 + r] + at, g->stored[r] + at, type, tables[r]);
        sum[r] = _mm512_dpbusd_epi32(sum[r], weights, activations);
    }
}

/* sum[N]: of (W + 128) x. */
CQ_INLINE void gemv_rows(const int32_t N, const int32_t type, const enum table_source source, const cq_matrix *w,
                         int64_t row, const int8_t *x, __m512i *sum) {
    const int32_t n_blocks = w->n_cols / CQ_BLOCK;
    /* The same place whole sets on, as the first rows of a set with a trellis read its last ones; at least a page. */
    const int32_t set_bytes = CQ_MAX_CODEBOOK_ROWS * n_blocks * 8 * cq_stored_bits(type);
    const int64_t ahead = (int64_t)set_bytes * cq_ceil_div(4096, set_bytes);
    row_group g = group_at(N, type, source, w, row);
#pragma GCC unroll 4
    for (int32_t r = 0; r < N; r++) sum[r] = _mm512_setzero_si512();
    int32_t b = 0;
    for (; b + 4 <= n_blocks; b += 4) {
        const int64_t at = ahead + (int64_t)b * 8 * cq_stored_bits(type);
#pragma GCC unroll 4
        for (int32_t r = 0; r < N; r++)
#pragma GCC unroll 2
            for (int32_t line = 0; line < 32 * cq_stored_bits(type); line += 64)
                _mm_prefetch((const char *)g.stored[2 + r] + at + line, _MM_HINT_T0);
        gemv_step(N, type, source, &g, b, 4, x, sum);
    }
    for (; b < n_blocks; b++) {
        if (N == 4 && scales_codebook(source))
            gemv_last(type, source, &g, b, x, sum);
        else
            gemv_step(N, type, source, &g, b, 1, x, sum);
    }
}

/* The sums of the lanes of four registers, less `offset`. */
CQ_INLINE __m128i sum_four(const __m512i *sum, int32_t offset) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(sum[0], sum[1]), _mm512_unpackhi_epi32(sum[0], sum[1]));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(sum[2], sum[3]), _mm512_unpackhi_epi32(sum[2], sum[3]));
    const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
    const __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return _mm_sub_epi32(quarter, _mm_set1_epi32(offset));
}

CQ_INLINE void gemv_all(const int32_t type, const enum table_source source, const cq_matrix *w, int64_t row,
                        int32_t n_rows, const int8_t *x, int32_t x_sum, int32_t *acc) {
    __m512i sum[GEMV_ROWS];
    for (int32_t r = 0; r < n_rows;) {
        if (r + GEMV_ROWS <= n_rows && cq_sharing_rows(w, row + r) >= GEMV_ROWS) {
            gemv_rows(GEMV_ROWS, type, source, w, row + r, x, sum);
            _mm_storeu_si128((__m128i *)(acc + r), sum_four(sum, 128 * x_sum));
            r += GEMV_ROWS;
        } else {
            gemv_rows(1, type, source, w, row + r, x, sum);
            acc[r++] = _mm512_reduce_add_epi32(sum[0]) - 128 * x_sum;
        }
    }
}

static void gemv(const cq_matrix *w, int64_t row, int32_t n_rows, const int8_t *x, int32_t x_sum, int32_t *acc) {
    CQ_SPECIALIZE(w, gemv_all, w, row, n_rows, x, x_sum, acc)
}
#endif
