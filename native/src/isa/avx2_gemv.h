/* GEMV in AVX2, with or without a dot product of bytes (CQ_DPBUSD). Four rows at once, where they share their
 * codebooks: activations, codebook and the packing of tables serve all four, and their independent sums hide latency.
 */
#ifndef CQ_AVX2_GEMV_H
#define CQ_AVX2_GEMV_H
#include "isa/avx2_lookup.h"
#include "isa/template/decode.h"

enum { GEMV_ROWS = 4, PREFETCH_BYTES = 2048, MAX_BLOCKS = CQ_MAX_COLS / CQ_BLOCK };

/* With a dot product of unsigned and signed bytes weights are W + 128, which adds 128 times the sum of the activations;
 * without one, W. */
#ifdef CQ_DPBUSD
enum { GEMV_OFFSET = 128 };
#else
enum { GEMV_OFFSET = 0 };
#endif

/* sum + the products of 32 weights and activations, four to a lane. With a group scale no W is -128 (-128 * 127 rounds
 * to -127): then W may take the sign of x, whose magnitude serves all rows. */
CQ_INLINE __m256i add_products(__m256i sum, __m256i weights, __m256i x, const int32_t scaled) {
#ifdef CQ_DPBUSD
    (void)scaled;
    return CQ_DPBUSD(sum, weights, x);
#else
    if (!scaled) return _mm256_add_epi32(sum, multiply_i8(weights, x));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weights, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

/* Consecutive rows that share their codebooks. */
typedef struct {
    cq_row first;
    const uint8_t
        *stored[2 + CQ_MAX_CODEBOOK_ROWS]; /* indices of the two rows above the first in its set, then of the rows */
    int32_t scales[CQ_MAX_CODEBOOK_ROWS * MAX_BLOCKS]; /* [row][block], twice as int16 */
} row_group;

static inline void spread_eight(__m128i eight, int32_t *scales) {
    const __m256i wide = _mm256_cvtepi8_epi32(eight);
    _mm256_storeu_si256((__m256i *)scales, _mm256_blend_epi16(wide, _mm256_slli_epi32(wide, 16), 0xaa));
}

/* The group scales of n_rows rows in a row, for each block. */
static inline void spread_scales(const cq_row *first, int32_t n_rows, int32_t *scales) {
    const int32_t n_blocks = first->n_blocks, scale_blocks = first->scale_blocks, n = n_rows * n_blocks;
    const int8_t *group_scales = first->group_scales;
    if (group_scales && scale_blocks == 1 && n >= 8) {
        for (int32_t i = 0; i < n - 8; i += 8)
            spread_eight(_mm_loadl_epi64((const __m128i *)(group_scales + i)), scales + i);
        spread_eight(_mm_loadl_epi64((const __m128i *)(group_scales + n - 8)), scales + n - 8);
        return;
    }
    for (int32_t r = 0; r < n_rows; r++)
        for (int32_t b = 0; b < n_blocks; b += scale_blocks) {
            const int32_t scale = group_scales ? *group_scales++ : NO_SCALE;
            for (int32_t i = b; i < cq_min(n_blocks, b + scale_blocks); i++)
                *scales++ = (int32_t)((uint32_t)scale << 16 | (scale & 0xffff));
        }
}

CQ_INLINE void group_at(const cq_matrix *w, int64_t row, int32_t n_rows, row_group *g) {
    const int64_t row_bytes = (int64_t)w->n_cols / 8 * cq_stored_bits(w->type);
    g->first = cq_row_at(w, row);
    g->stored[0] = g->first.above2, g->stored[1] = g->first.above;
    for (int32_t r = 0; r < n_rows; r++) g->stored[2 + r] = g->first.indices + r * row_bytes;
    spread_scales(&g->first, n_rows, g->scales);
    g->first.scale_blocks = g->first.n_blocks; /* spans are those of the codebook alone */
}

/* sum[N]: of N rows of the group, from its row r on. scaled: whether there are group scales; ahead: how far to
 * prefetch, in bytes.
 */
CQ_INLINE void gemv_rows(const int32_t N, const int32_t type, const int32_t scaled, const row_group *g, int32_t r,
                         const int8_t *x, int64_t ahead, __m256i *sum) {
    const int32_t n_blocks = g->first.n_blocks;
    const int32_t *scales = g->scales + r * n_blocks;
    const uint8_t *const *stored = g->stored + r;
#pragma GCC unroll 4
    for (int32_t i = 0; i < N; i++) sum[i] = _mm256_setzero_si256();
    for (cq_span span = cq_first_span(&g->first);; cq_next_span(&g->first, type, &span)) {
        const entries codebook = load_codebook(span.centroids, type);
        for (int32_t b = span.begin; b < span.end; b++) {
            const __m256i *activations = (const __m256i *)(x + (int64_t)b * CQ_BLOCK);
            const __m256i first = _mm256_loadu_si256(activations), second = _mm256_loadu_si256(activations + 1);
            const int64_t at = (int64_t)b * 8 * cq_stored_bits(type);
            __m256i scale[GEMV_ROWS];
            entries table[GEMV_ROWS];
#pragma GCC unroll 4
            for (int32_t i = 0; i < N; i++) scale[i] = _mm256_set1_epi32(scales[i * n_blocks + b]);
            make_tables(N, type, codebook, scale, (char)GEMV_OFFSET, table);
#pragma GCC unroll 4
            for (int32_t i = 0; i < N; i++) {
                _mm_prefetch((const char *)stored[2 + i] + at + ahead, _MM_HINT_T0);
                const weights64 weights =
                    decode_block(stored[2 + i] + at, stored[1 + i] + at, stored[i] + at, type, table[i]);
                sum[i] =
                    add_products(add_products(sum[i], weights.first, first, scaled), weights.second, second, scaled);
            }
        }
        if (span.end == n_blocks) return;
    }
}

/* The sums of the lanes of four registers. */
CQ_INLINE __m128i sum_four(const __m256i *sum) {
    const __m256i pairs = _mm256_hadd_epi32(sum[0], sum[1]), others = _mm256_hadd_epi32(sum[2], sum[3]);
    const __m256i fours = _mm256_hadd_epi32(pairs, others);
    return _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
}

CQ_INLINE void gemv_scaled(const int32_t type, const int32_t scaled, const cq_matrix *w, int64_t row, int32_t n_rows,
                           const int8_t *x, int32_t offset, int32_t *acc) {
    const int32_t group_bytes = GEMV_ROWS * (w->n_cols / 8 * cq_stored_bits(type));
    const int64_t ahead = (int64_t)group_bytes * cq_ceil_div(PREFETCH_BYTES, group_bytes);
    row_group g;
    for (int32_t done = 0, n; done < n_rows; done += n) {
        __m256i sum[GEMV_ROWS];
        int32_t r = 0;
        n = cq_min(cq_min(n_rows - done, CQ_MAX_CODEBOOK_ROWS), cq_sharing_rows(w, row + done));
        group_at(w, row + done, n, &g);
        for (; r + GEMV_ROWS <= n; r += GEMV_ROWS) {
            gemv_rows(GEMV_ROWS, type, scaled, &g, r, x, ahead, sum);
            _mm_storeu_si128((__m128i *)(acc + done + r), _mm_sub_epi32(sum_four(sum), _mm_set1_epi32(offset)));
        }
        for (; r < n; r++) {
            gemv_rows(1, type, scaled, &g, r, x, ahead, sum);
            acc[done + r] = sum_i32(sum[0]) - offset;
        }
    }
}

CQ_INLINE void gemv_all(const int32_t type, const cq_matrix *w, int64_t row, int32_t n_rows, const int8_t *x,
                        int32_t offset, int32_t *acc) {
    if (w->scale_cols)
        gemv_scaled(type, 1, w, row, n_rows, x, offset, acc);
    else
        gemv_scaled(type, 0, w, row, n_rows, x, offset, acc);
}

static void gemv(const cq_matrix *w, int64_t row, int32_t n_rows, const int8_t *x, int32_t x_sum, int32_t *acc) {
    CQ_WITH_TYPE(w, gemv_all, w, row, n_rows, x, GEMV_OFFSET * x_sum, acc)
}
#endif
