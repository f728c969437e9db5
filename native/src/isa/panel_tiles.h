/* Tiles of a panel's product with tokens, in the x86 sets: what a function of one looks like (template/gemm_panel.h
 * deals the tokens to them). */
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

/* The function of N tokens, as the compiler must know their number: of a set's own tile(N, ...). */
#define CQ_TILE(N)                                                                                                     \
    static void tile_##N(const tile_columns *c, const int8_t *const *x, const int32_t *x_sum, int32_t first_token,     \
                         int32_t *acc) {                                                                               \
        tile(N, c, x, x_sum, first_token, acc);                                                                        \
    }
#endif
