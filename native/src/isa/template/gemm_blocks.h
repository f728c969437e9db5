/* TEMPLATE. gemm_blocks of the x86 sets, Q8_0: a panel in blocks of 32 columns, each with scales of its own. A tile
 * keeps a block's sums in registers and adds them, scaled, to floats. Included after the primitives of vectors.h and
 * after what the sets' panels have in common: BLOCK_TOKENS, the most tokens of a tile, 6 or fewer; PANEL_ROWS,
 * PANEL_HEAD, PANEL_COL_BYTES; tile_sums of 2 * CQ_LANES rows, first_sums and add_columns. */
#ifndef CQ_GEMM_BLOCKS_H
#define CQ_GEMM_BLOCKS_H
#include "isa/template/vectors.h"

enum { BLOCK_COLS = 32, MAX_BLOCK_TOKENS = 6 };
_Static_assert((int)BLOCK_TOKENS <= (int)MAX_BLOCK_TOKENS, "a function for each");

CQ_INLINE void block_tile(const int32_t N, const cq_block_panel *p, const cq_block_tokens *tokens, int32_t first,
                          float *dots) {
    vec dot[MAX_BLOCK_TOKENS][2];
#pragma GCC unroll 6
    for (int32_t t = 0; t < N; t++) dot[t][0] = dot[t][1] = (vec){0};
    const uint8_t *panel = p->weights;
    for (int32_t b = 0; b < p->n_blocks; b++, panel += PANEL_HEAD + BLOCK_COLS * PANEL_COL_BYTES) {
        tile_sums sum[MAX_BLOCK_TOKENS];
        const int8_t *x[MAX_BLOCK_TOKENS];
#pragma GCC unroll 6
        for (int32_t t = 0; t < N; t++) {
            x[t] = tokens->q[first + t] + b * BLOCK_COLS;
            sum[t] = first_sums(panel, tokens->sums[first + t][b]);
        }
        add_columns(N, panel + PANEL_HEAD, BLOCK_COLS, x, sum);
        const float *scales = p->scales + (int64_t)b * PANEL_ROWS;
#pragma GCC unroll 6
        for (int32_t t = 0; t < N; t++)
            for (int32_t h = 0; h < 2; h++)
                dot[t][h] += __builtin_convertvector((int_vec)sum[t].half[h], vec) *
                             (load_vec(scales + CQ_LANES * h) * tokens->scales[first + t][b]);
    }
#pragma GCC unroll 6
    for (int32_t t = 0; t < N; t++)
        for (int32_t h = 0; h < 2; h++) store_vec(dots + (first + t) * PANEL_ROWS + CQ_LANES * h, dot[t][h]);
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
    typedef void tile_of_blocks(const cq_block_panel *, const cq_block_tokens *, int32_t, float *);
    static tile_of_blocks *const block_tiles[MAX_BLOCK_TOKENS] = {block_tile_1, block_tile_2, block_tile_3,
                                                                  block_tile_4, block_tile_5, block_tile_6};
    const int32_t n_tiles = cq_ceil_div(n_tokens, BLOCK_TOKENS);
    for (int32_t i = 0, t = 0; i < n_tiles; i++) {
        const int32_t count = cq_ceil_div(n_tokens - t, n_tiles - i);
        block_tiles[count - 1](p, tokens, t, dots);
        t += count;
    }
}
#endif
