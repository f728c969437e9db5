/* The panel half of avx2.c: transposing decoded rows into a panel, int8 [n_cols / 4][PANEL_ROWS][4], and multiplying it
 * with tokens. */
#ifndef CQ_AVX2_PANEL_H
#define CQ_AVX2_PANEL_H

enum {
    PANEL_ROWS = 16,
    HALF_ROWS = 8,
    PANEL_STEP = 4 * PANEL_ROWS,
    CHUNK_BLOCKS = 4,
    TILE_TOKENS = 4,
    TILE_COLS = 1024
};

/* out[k * PANEL_STEP] = dword k of each of 8 rows, for k < 8: a transposition of 8 x 8 dwords. */
static inline void transpose_block(const uint8_t *rows, int32_t stride, uint8_t *out) {
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (int32_t i = 0; i < 8; i++) a[i] = _mm256_load_si256((const __m256i *)(rows + i * stride));
#pragma GCC unroll 4
    for (int32_t i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int32_t i = 0; i < 8; i += 4) { /* a[i + j]: in lane l, dword 4 l + j of rows i .. i + 3 */
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; j++) {
        _mm256_store_si256((__m256i *)(out + j * PANEL_STEP), _mm256_permute2x128_si256(a[j], a[4 + j], 0x20));
        _mm256_store_si256((__m256i *)(out + (4 + j) * PANEL_STEP), _mm256_permute2x128_si256(a[j], a[4 + j], 0x31));
    }
}

static void pack_panel(const int8_t *rows, int32_t n_cols, uint8_t *panel) {
    for (int32_t r = 0; r < PANEL_ROWS; r++)
        for (int32_t k = 0; k < n_cols; k += 4) memcpy(panel + k * PANEL_ROWS + 4 * r, rows + r * n_cols + k, 4);
}

/* acc[N][PANEL_ROWS] (+)= panel times N tokens: 2 N accumulators and two weights with their magnitudes fill 16
 * registers. */
CQ_INLINE void tile(const int32_t N, const uint8_t *panel, const int8_t *const *x, int32_t col, int32_t n_cols,
                    int32_t *acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[TILE_TOKENS][2];
#pragma GCC unroll 4
    for (int32_t t = 0; t < N; t++) {
        __m256i *from = (__m256i *)(acc + t * PANEL_ROWS);
        sum[t][0] = col ? _mm256_loadu_si256(from) : _mm256_setzero_si256();
        sum[t][1] = col ? _mm256_loadu_si256(from + 1) : _mm256_setzero_si256();
    }
    for (int32_t k = col; k < col + n_cols; k += 4) {
        const __m256i *step = (const __m256i *)(panel + (int64_t)k * PANEL_ROWS);
        const __m256i w0 = _mm256_load_si256(step), w1 = _mm256_load_si256(step + 1);
        const __m256i m0 = _mm256_abs_epi8(w0), m1 = _mm256_abs_epi8(w1);
#pragma GCC unroll 4
        for (int32_t t = 0; t < N; t++) {
            int32_t four;
            memcpy(&four, x[t] + k, 4);
            const __m256i activation = _mm256_set1_epi32(four);
            const __m256i p0 = _mm256_maddubs_epi16(m0, _mm256_sign_epi8(activation, w0));
            const __m256i p1 = _mm256_maddubs_epi16(m1, _mm256_sign_epi8(activation, w1));
            sum[t][0] = _mm256_add_epi32(sum[t][0], _mm256_madd_epi16(p0, ones));
            sum[t][1] = _mm256_add_epi32(sum[t][1], _mm256_madd_epi16(p1, ones));
        }
    }
#pragma GCC unroll 4
    for (int32_t t = 0; t < N; t++) {
        __m256i *to = (__m256i *)(acc + t * PANEL_ROWS);
        _mm256_storeu_si256(to, sum[t][0]);
        _mm256_storeu_si256(to + 1, sum[t][1]);
    }
}

/* TILE_COLS columns of the panel (16 KiB) serve all tokens before the next ones. */
static void gemm_panel(const uint8_t *panel, int32_t n_cols, const int8_t *const *x, const int32_t *x_sum,
                       int32_t n_tokens, int32_t *acc) {
    (void)x_sum;
    for (int32_t col = 0; col < n_cols; col += TILE_COLS) {
        const int32_t n = cq_min(TILE_COLS, n_cols - col);
        int32_t t = 0;
        for (; t + 4 <= n_tokens; t += 4) tile(4, panel, x + t, col, n, acc + (int64_t)t * PANEL_ROWS);
        if (n_tokens - t == 3) tile(3, panel, x + t, col, n, acc + (int64_t)t * PANEL_ROWS);
        if (n_tokens - t == 2) tile(2, panel, x + t, col, n, acc + (int64_t)t * PANEL_ROWS);
        if (n_tokens - t == 1) tile(1, panel, x + t, col, n, acc + (int64_t)t * PANEL_ROWS);
    }
}
#endif
