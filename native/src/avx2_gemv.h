/* The GEMV half of avx2_core.h. Four rows at once, where they share their codebooks: activations and one codebook in
 * registers serve all four, and their independent sums hide latency. */
#ifndef CQ_AVX2_GEMV_H
#define CQ_AVX2_GEMV_H

enum { GEMV_ROWS = 4, PREFETCH_BYTES = 2048 };

/* sum[N]: of N rows that share their codebooks. scale_every 1 or 2: the blocks that share a scale, so that spans are
 * those of the codebook alone; 0: any grouping, of one row. */
CQ_INLINE void gemv_rows(const int32_t N, const int32_t type, const int32_t scale_every, const cq_matrix *w,
                         int64_t first_row, const int8_t *x, __m256i *sum) {
    const int32_t row_bytes = w->n_cols / 8 * cq_stored_bits(type);
    const int64_t ahead = (int64_t)N * row_bytes * cq_ceil_div(PREFETCH_BYTES, N * row_bytes);
    cq_row rows[GEMV_ROWS];
#pragma GCC unroll 4
    for (int32_t r = 0; r < N; r++) {
        rows[r] = cq_row_at(w, first_row + r);
        if (scale_every) rows[r].scale_blocks = rows[r].n_blocks;
        sum[r] = _mm256_setzero_si256();
    }
    for (cq_span span = cq_first_span(rows);; cq_next_span(rows, type, &span)) {
        const entries codebook = load_codebook(span.centroids, type);
        const entries shared = table_of(codebook, type, span.group_scale);
        for (int32_t b = span.begin; b < span.end; b++) {
            const __m256i *activations = (const __m256i *)(x + (int64_t)b * CQ_BLOCK);
            const __m256i first = _mm256_loadu_si256(activations), second = _mm256_loadu_si256(activations + 1);
#pragma GCC unroll 4
            for (int32_t r = 0; r < N; r++) {
                _mm_prefetch((const char *)rows[r].indices + (int64_t)b * 8 * cq_stored_bits(type) + ahead,
                             _MM_HINT_T0);
                const entries table =
                    scale_every ? table_of(codebook, type, rows[r].group_scales + b / scale_every) : shared;
                const weights64 weights = decode_row_block(&rows[r], type, b, table);
                sum[r] = add_products(add_products(sum[r], weights.first, first), weights.second, second);
            }
        }
        if (span.end == rows->n_blocks) return;
    }
}

CQ_INLINE void gemv_grouped(const int32_t type, const int32_t scale_every, const cq_matrix *w, int64_t row,
                            int32_t n_rows, const int8_t *x, int32_t offset, int32_t *acc) {
    __m256i sum[GEMV_ROWS];
    for (int32_t r = 0; r < n_rows;) {
        if (scale_every && r + GEMV_ROWS <= n_rows && cq_share_codebooks(w, row + r, GEMV_ROWS)) {
            gemv_rows(GEMV_ROWS, type, scale_every, w, row + r, x, sum);
            const __m256i pairs = _mm256_hadd_epi32(sum[0], sum[1]), others = _mm256_hadd_epi32(sum[2], sum[3]);
            const __m256i fours = _mm256_hadd_epi32(pairs, others);
            const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
            _mm_storeu_si128((__m128i *)(acc + r), _mm_sub_epi32(all, _mm_set1_epi32(offset)));
            r += GEMV_ROWS;
        } else {
            gemv_rows(1, type, scale_every, w, row + r, x, sum);
            acc[r++] = sum_i32(sum[0]) - offset;
        }
    }
}

CQ_INLINE void gemv_all(const int32_t type, const cq_matrix *w, int64_t row, int32_t n_rows, const int8_t *x,
                        int32_t offset, int32_t *acc) {
    if (w->scale_cols == CQ_BLOCK)
        gemv_grouped(type, 1, w, row, n_rows, x, offset, acc);
    else if (w->scale_cols == 2 * CQ_BLOCK)
        gemv_grouped(type, 2, w, row, n_rows, x, offset, acc);
    else
        gemv_grouped(type, 0, w, row, n_rows, x, offset, acc);
}

static void gemv(const cq_matrix *w, int64_t row, int32_t n_rows, const int8_t *x, int32_t x_sum, int32_t *acc) {
    const int32_t offset = OFFSET * x_sum;
    CQ_WITH_TYPE(w, gemv_all, w, row, n_rows, x, offset, acc)
}
#endif
