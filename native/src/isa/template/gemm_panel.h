/* TEMPLATE. gemm_panel and gemm_panel_scaled of the x86 sets. Included after PANEL_ROWS, TILE_TOKENS (the most tokens
 * of a tile), TILE_COLS and tiles[TILE_TOKENS], of 1, 2, ... tokens (panel_tiles.h). */
#ifndef CQ_GEMM_PANEL_H
#define CQ_GEMM_PANEL_H
#include "isa/panel_tiles.h"

/* TILE_COLS columns of the panel serve all tokens before the next ones; tokens are dealt evenly, as 13 of them in tiles
 * of 7 and 6 take less than in 12 and 1. */
static void gemm_panel_scaled(const uint8_t *panel, int32_t n_cols, const int8_t *const *x, const int32_t *x_sum,
                              int32_t n_tokens, int32_t *acc, const cq_scaling *to) {
    const int32_t n_tiles = cq_ceil_div(n_tokens, TILE_TOKENS);
    for (int32_t col = 0; col < n_cols; col += TILE_COLS) {
        const int32_t n = cq_min(TILE_COLS, n_cols - col);
        const tile_columns c = {panel, col, n, col + n == n_cols ? to : NULL};
        for (int32_t i = 0, t = 0; i < n_tiles; i++) {
            const int32_t count = cq_ceil_div(n_tokens - t, n_tiles - i);
            tiles[count - 1](&c, x + t, x_sum + t, t, acc + (int64_t)t * PANEL_ROWS);
            t += count;
        }
    }
}

static void gemm_panel(const uint8_t *panel, int32_t n_cols, const int8_t *const *x, const int32_t *x_sum,
                       int32_t n_tokens, int32_t *acc) {
    gemm_panel_scaled(panel, n_cols, x, x_sum, n_tokens, acc, NULL);
}
#endif
