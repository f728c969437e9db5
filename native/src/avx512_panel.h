/* The panel half of avx512.c: transposing decoded rows into a panel, and multiplying it with tokens.
 *
 * A panel is uint8 [n_cols / 4][PANEL_ROWS][4], W + 128: one vpdpbusd multiplies four columns of 16 rows with four
 * columns of a token, broadcast. */
#ifndef CQ_AVX512_PANEL_H
#define CQ_AVX512_PANEL_H

enum { PANEL_ROWS = 32, HALF_ROWS = 16, PANEL_STEP = 4 * PANEL_ROWS, TILE_TOKENS = 12, TILE_COLS = 4096 };

/* out[k * PANEL_STEP] = dword k of each of 16 rows, for k < 16: a transposition of 16 x 16 dwords. */
static inline void transpose_block(const uint8_t *rows, int32_t stride, uint8_t *out) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int32_t i = 0; i < 16; i++) a[i] = _mm512_load_si512(rows + i * stride);
#pragma GCC unroll 8
    for (int32_t i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int32_t i = 0; i < 16; i += 4) { /* a[i + j]: in lane l, dword 4 l + j of rows i .. i + 3 */
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; j++) {
        const __m512i even_lo = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88),
                      odd_lo = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even_hi = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88),
                      odd_hi = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_store_si512(out + j * PANEL_STEP, _mm512_shuffle_i32x4(even_lo, even_hi, 0x88));
        _mm512_store_si512(out + (4 + j) * PANEL_STEP, _mm512_shuffle_i32x4(odd_lo, odd_hi, 0x88));
        _mm512_store_si512(out + (8 + j) * PANEL_STEP, _mm512_shuffle_i32x4(even_lo, even_hi, 0xdd));
        _mm512_store_si512(out + (12 + j) * PANEL_STEP, _mm512_shuffle_i32x4(odd_lo, odd_hi, 0xdd));
    }
}

static void pack_panel(const int8_t *rows, int32_t n_cols, uint8_t *panel) {
    for (int32_t r = 0; r < PANEL_ROWS; r++)
        for (int32_t k = 0; k < n_cols; k += 4) {
            uint32_t four;
            memcpy(&four, rows + r * n_cols + k, 4);
            four ^= 0x80808080;
            memcpy(panel + k * PANEL_ROWS + 4 * r, &four, 4);
        }
}

/* acc[N][PANEL_ROWS] (+)= panel times N tokens: 2 N accumulators, two weight registers, one broadcast. N is a constant
 * and everything is unrolled, else the compiler keeps the accumulators in memory. */
CQ_INLINE void tile(const int32_t N, const uint8_t *panel, const int8_t *const *tokens, int32_t col, int32_t n_cols,
                    int32_t *acc, int32_t first) {
    __m512i sum[TILE_TOKENS][2];
    const int8_t *x[TILE_TOKENS];
#pragma GCC unroll 12
    for (int32_t t = 0; t < N; t++) {
        x[t] = tokens[t] + col;
        sum[t][0] = first ? _mm512_setzero_si512() : _mm512_loadu_si512(acc + t * PANEL_ROWS);
        sum[t][1] = first ? _mm512_setzero_si512() : _mm512_loadu_si512(acc + t * PANEL_ROWS + 16);
    }
    for (int32_t k = 0; k < n_cols; k += 4, panel += PANEL_STEP) {
        const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 64);
#pragma GCC unroll 12
        for (int32_t t = 0; t < N; t++) {
            int32_t four;
            memcpy(&four, x[t] + k, 4);
            const __m512i activation = _mm512_set1_epi32(four);
            sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], w0, activation);
            sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], w1, activation);
        }
    }
#pragma GCC unroll 12
    for (int32_t t = 0; t < N; t++) {
        _mm512_storeu_si512(acc + t * PANEL_ROWS, sum[t][0]);
        _mm512_storeu_si512(acc + t * PANEL_ROWS + 16, sum[t][1]);
    }
}

#define CQ_TILE(N)                                                                                                     \
    static void tile_##N(const uint8_t *panel, const int8_t *const *x, int32_t col, int32_t n_cols, int32_t *acc) {    \
        tile(N, panel, x, col, n_cols, acc, col == 0);                                                                 \
    }
/* clang-format off */
CQ_TILE(1) CQ_TILE(2) CQ_TILE(3) CQ_TILE(4) CQ_TILE(5) CQ_TILE(6)
CQ_TILE(7) CQ_TILE(8) CQ_TILE(9) CQ_TILE(10) CQ_TILE(11) CQ_TILE(12)

static void (*const tiles[])(const uint8_t *, const int8_t *const *, int32_t, int32_t, int32_t *) = {
    tile_1, tile_2, tile_3, tile_4, tile_5, tile_6, tile_7, tile_8, tile_9, tile_10, tile_11, tile_12};
/* clang-format on */

/* TILE_COLS columns of the panel (128 KiB, in the second-level cache) serve all tokens before the next ones; tokens are
 * dealt evenly to tiles, as 13 tokens in tiles of 7 and 6 take less than in 12 and 1. */
static void gemm_panel(const uint8_t *panel, int32_t n_cols, const int8_t *const *x, const int32_t *x_sum,
                       int32_t n_tokens, int32_t *acc) {
    const int32_t n_tiles = cq_ceil_div(n_tokens, TILE_TOKENS);
    for (int32_t col = 0; col < n_cols; col += TILE_COLS) {
        for (int32_t i = 0, t = 0; i < n_tiles; i++) {
            const int32_t n = cq_ceil_div(n_tokens - t, n_tiles - i);
            tiles[n - 1](panel + (int64_t)col * PANEL_ROWS, x + t, col, cq_min(TILE_COLS, n_cols - col),
                         acc + (int64_t)t * PANEL_ROWS);
            t += n;
        }
    }
    for (int32_t t = 0; t < n_tokens; t++) {
        const __m512i offset = _mm512_set1_epi32(128 * x_sum[t]);
        int32_t *out = acc + (int64_t)t * PANEL_ROWS;
        _mm512_storeu_si512(out, _mm512_sub_epi32(_mm512_loadu_si512(out), offset));
        _mm512_storeu_si512(out + 16, _mm512_sub_epi32(_mm512_loadu_si512(out + 16), offset));
    }
}
#endif
