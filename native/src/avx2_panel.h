/* The panel half of avx2_core.h: transposing decoded rows into a panel, and multiplying it with tokens.
 *
 * A panel is bytes [n_cols / 4][PANEL_ROWS][4], W + OFFSET. */
#ifndef CQ_AVX2_PANEL_H
#define CQ_AVX2_PANEL_H

enum { PANEL_ROWS = 16, HALF_ROWS = 8, PANEL_STEP = 4 * PANEL_ROWS, CHUNK_BLOCKS = 4, TILE_COLS = 1024 /* 16 KiB */ };

/* Of a tile; accumulators, weights (and their magnitudes) and an activation fill 16 registers. */
#ifdef CQ_DPBUSD
enum { TILE_TOKENS = 6 };
#else
enum { TILE_TOKENS = 4 };
#endif

#include "panel_tiles.h"

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

static void pack_panel(const int8_t *rows, int64_t stride, int32_t n_rows, int32_t n_cols, uint8_t *panel) {
    uint8_t part[PANEL_ROWS * 32] __attribute__((aligned(32)));
    memset(part, OFFSET, sizeof part);
    for (int32_t k = 0; k < n_cols; k += 32)
        for (int32_t half = 0; half < 2; half++) {
            uint8_t *eight = part + half * HALF_ROWS * 32;
            for (int32_t r = half * HALF_ROWS; r < cq_min(n_rows, (half + 1) * HALF_ROWS); r++)
                _mm256_store_si256((__m256i *)(part + r * 32),
                                   _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(rows + r * stride + k)),
                                                    _mm256_set1_epi8((char)OFFSET)));
            transpose_block(eight, 32, panel + k / 4 * PANEL_STEP + 4 * half * HALF_ROWS);
        }
}

/* Eight floats of one token from its accumulators. */
CQ_INLINE void scale_half(__m256i sum, const cq_scaling *to, int32_t t, int32_t half) {
    const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(to->row_scales + 8 * half), _mm256_set1_ps(to->token_scales[t]));
    const __m256 value = _mm256_cvtepi32_ps(sum);
    float *out = to->out[t] + 8 * half;
    _mm256_storeu_ps(out, to->accumulate ? _mm256_fmadd_ps(value, scale, _mm256_loadu_ps(out))
                                         : _mm256_mul_ps(value, scale));
}

/* A panel times N tokens. N is a constant and everything is unrolled. Sums start from acc, at the first column from
 * what the weights' offset adds to them. */
CQ_INLINE void tile(const int32_t N, const tile_columns *c, const int8_t *const *tokens, const int32_t *x_sum,
                    int32_t first_token, int32_t *acc) {
    __m256i sum[TILE_TOKENS][2];
    const int8_t *x[TILE_TOKENS];
#pragma GCC unroll 6
    for (int32_t t = 0; t < N; t++) {
        const __m256i *from = (const __m256i *)(acc + t * PANEL_ROWS), start = _mm256_set1_epi32(-OFFSET * x_sum[t]);
        x[t] = tokens[t] + c->col;
        sum[t][0] = c->col ? _mm256_loadu_si256(from) : start;
        sum[t][1] = c->col ? _mm256_loadu_si256(from + 1) : start;
    }
    const __m256i *step = (const __m256i *)(c->panel + (int64_t)c->col * PANEL_ROWS);
    for (int32_t k = 0; k < c->n_cols; k += 4, step += 2) {
        const __m256i w0 = _mm256_load_si256(step), w1 = _mm256_load_si256(step + 1);
#ifndef CQ_DPBUSD
        const __m256i m0 = _mm256_abs_epi8(w0), m1 = _mm256_abs_epi8(w1), ones = _mm256_set1_epi16(1);
#endif
#pragma GCC unroll 6
        for (int32_t t = 0; t < N; t++) {
            int32_t four;
            memcpy(&four, x[t] + k, 4);
            const __m256i activation = _mm256_set1_epi32(four);
#ifdef CQ_DPBUSD
            sum[t][0] = CQ_DPBUSD(sum[t][0], w0, activation);
            sum[t][1] = CQ_DPBUSD(sum[t][1], w1, activation);
#else
            const __m256i p0 = _mm256_maddubs_epi16(m0, _mm256_sign_epi8(activation, w0));
            const __m256i p1 = _mm256_maddubs_epi16(m1, _mm256_sign_epi8(activation, w1));
            sum[t][0] = _mm256_add_epi32(sum[t][0], _mm256_madd_epi16(p0, ones));
            sum[t][1] = _mm256_add_epi32(sum[t][1], _mm256_madd_epi16(p1, ones));
#endif
        }
    }
    const int in_registers = c->to && c->to->n_rows == PANEL_ROWS;
#pragma GCC unroll 6
    for (int32_t t = 0; t < N; t++) {
        if (in_registers) {
            scale_half(sum[t][0], c->to, first_token + t, 0);
            scale_half(sum[t][1], c->to, first_token + t, 1);
            continue;
        }
        _mm256_storeu_si256((__m256i *)(acc + t * PANEL_ROWS), sum[t][0]);
        _mm256_storeu_si256((__m256i *)(acc + t * PANEL_ROWS) + 1, sum[t][1]);
        if (!c->to) continue;
        const cq_scaling *to = c->to;
        scale_acc(acc + t * PANEL_ROWS, to->row_scales, to->token_scales[first_token + t], to->out[first_token + t],
                  to->n_rows, to->accumulate);
    }
}

/* clang-format off */
CQ_TILE(1) CQ_TILE(2) CQ_TILE(3) CQ_TILE(4)
#ifdef CQ_DPBUSD
CQ_TILE(5) CQ_TILE(6)
#endif

static tile_function *const tiles[TILE_TOKENS] = {
    tile_1, tile_2, tile_3, tile_4,
#ifdef CQ_DPBUSD
    tile_5, tile_6,
#endif
};
/* clang-format on */
#endif
