/* Q8_0 in avx512_core.h: a panel in blocks of 32 columns, each with scales of its own. A tile keeps a block's sums in
 * registers, and the floats that they are added to: two registers of each for a token, and two of weights. */
#ifndef CQ_AVX512_BLOCKS_H
#define CQ_AVX512_BLOCKS_H

enum { BLOCK_COLS = 32, BLOCK_TOKENS = 6 };

CQ_INLINE void block_tile(const int32_t N, const cq_block_panel *p, const cq_block_tokens *tokens, int32_t first,
                          float *dots) {
    __m512 dot[BLOCK_TOKENS][2];
#pragma GCC unroll 6
    for (int32_t t = 0; t < N; t++) dot[t][0] = dot[t][1] = _mm512_setzero_ps();
    const uint8_t *panel = p->weights;
    for (int32_t b = 0; b < p->n_blocks; b++) {
        tile_sums sum[BLOCK_TOKENS];
#pragma GCC unroll 6
        for (int32_t t = 0; t < N; t++)
            sum[t].half[0] = sum[t].half[1] = _mm512_set1_epi32(-128 * tokens->sums[first + t][b]);
#pragma GCC unroll 8
        for (int32_t k = 0; k < BLOCK_COLS; k += 4, panel += PANEL_STEP) {
            const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 64);
#pragma GCC unroll 6
            for (int32_t t = 0; t < N; t++) {
                int32_t four;
                memcpy(&four, tokens->q[first + t] + b * BLOCK_COLS + k, 4);
                const __m512i activation = _mm512_set1_epi32(four);
                sum[t].half[0] = _mm512_dpbusd_epi32(sum[t].half[0], w0, activation);
                sum[t].half[1] = _mm512_dpbusd_epi32(sum[t].half[1], w1, activation);
            }
        }
        const float *scales = p->scales + (int64_t)b * PANEL_ROWS;
#pragma GCC unroll 6
        for (int32_t t = 0; t < N; t++) {
            const __m512 token_scale = _mm512_set1_ps(tokens->scales[first + t][b]);
            for (int32_t h = 0; h < 2; h++)
                dot[t][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t].half[h]),
                                            _mm512_mul_ps(_mm512_loadu_ps(scales + 16 * h), token_scale), dot[t][h]);
        }
    }
#pragma GCC unroll 6
    for (int32_t t = 0; t < N; t++)
        for (int32_t h = 0; h < 2; h++) _mm512_storeu_ps(dots + (first + t) * PANEL_ROWS + 16 * h, dot[t][h]);
}

#define CQ_BLOCK_TILE(N)                                                                                               \
    static void block_tile_##N(const cq_block_panel *p, const cq_block_tokens *tokens, int32_t first, float *dots) {   \
        block_tile(N, p, tokens, first, dots);                                                                         \
    }

CQ_BLOCK_TILE(1)
CQ_BLOCK_TILE(2)
CQ_BLOCK_TILE(3)
CQ_BLOCK_TILE(4)
CQ_BLOCK_TILE(5)
CQ_BLOCK_TILE(6)

/* Tokens are dealt evenly, as in gemm_panel_scaled. */
static void gemm_blocks(const cq_block_panel *p, const cq_block_tokens *tokens, int32_t n_tokens, float *dots) {
    static void (*const block_tiles[BLOCK_TOKENS])(const cq_block_panel *, const cq_block_tokens *, int32_t,
                                                   float *) = {block_tile_1, block_tile_2, block_tile_3,
                                                               block_tile_4, block_tile_5, block_tile_6};
    const int32_t n_tiles = cq_ceil_div(n_tokens, BLOCK_TOKENS);
    for (int32_t i = 0, t = 0; i < n_tiles; i++) {
        const int32_t count = cq_ceil_div(n_tokens - t, n_tiles - i);
        block_tiles[count - 1](p, tokens, t, dots);
        t += count;
    }
}
#endif
