/* What the panel halves of the x86 sets share: how tokens are dealt to tiles. Each defines PANEL_ROWS, TILE_TOKENS (the
 * most of a tile) and TILE_COLS, includes this, and defines tiles[TILE_TOKENS], of 1, 2, ... tokens. */
#ifndef CQ_PANEL_TILES_H
#define CQ_PANEL_TILES_H
#include "kernels.h"

/* Columns [col, col + n_cols) of a panel; `to`: where products go when they are complete, NULL: sums stay in acc. */
typedef struct {
    const uint8_t *panel;
    int32_t col, n_cols;
    const cq_scaling *to;
} tile_columns;

/* Some tokens times columns of a panel: sums start from acc [tokens][PANEL_ROWS], at column 0 from what the panel's
 * form of a weight adds to them. */
typedef void tile_function(const tile_columns *c, const int8_t *const *x, const int32_t *x_sum, int32_t first_token,
                           int32_t *acc);

static tile_function *const tiles[TILE_TOKENS];

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

#define CQ_TILE(N)                                                                                                     \
    static void tile_##N(const tile_columns *c, const int8_t *const *x, const int32_t *x_sum, int32_t first_token,     \
                         int32_t *acc) {                                                                               \
        tile(N, c, x, x_sum, first_token, acc);                                                                        \
    }
#endif
