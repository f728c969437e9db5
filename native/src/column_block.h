/* The inner loops of descent.c, included by float_ops.h: CQ_ROWS rows of a weight matrix side by side, one lane each,
 * a block of columns at a time. Inside the block every column's choice moves the columns beside it at once; what it
 * means for the columns outside is then added for the whole block by rank_update. */
#include "descent.h"

typedef float row_vec __attribute__((vector_size(4 * CQ_ROWS), may_alias));
typedef int32_t row_mask __attribute__((vector_size(4 * CQ_ROWS), may_alias));

CQ_INLINE row_vec load_rows(const float *p) {
    row_vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Each lane's nearest of its values, the first of equals; index: where it stands. */
CQ_INLINE row_vec nearest_values(const cq_column_block *b, row_vec wanted, row_mask *index) {
    const row_vec zero = {0};
    row_vec nearest = load_rows(b->values[0]), best = wanted - nearest;
    best = (row_vec)((row_mask)best & 0x7fffffff);
    row_mask at = {0};
    for (int32_t c = 1; c < b->n_values; c++) {
        const row_vec value = load_rows(b->values[c]);
        const row_vec distance = (row_vec)((row_mask)(wanted - value) & 0x7fffffff);
        const row_mask closer = distance < best;
        best = (row_vec)(((row_mask)distance & closer) | ((row_mask)best & ~closer));
        nearest = (row_vec)(((row_mask)value & closer) | ((row_mask)nearest & ~closer));
        at = (((row_mask)zero + c) & closer) | (at & ~closer);
    }
    *index = at;
    return nearest;
}

CQ_INLINE void move_columns(cq_column_block *b, const float *m, int32_t from, row_vec change) {
    for (int32_t j = from; j < b->n_cols; j++) {
        const row_vec state = load_rows(b->state[j]) + change * m[j];
        memcpy(b->state[j], &state, sizeof state);
    }
}

/* state: what is left of w. Takes the nearest values and moves each column's error to those after it. */
static void feedback_block(cq_column_block *b) {
    for (int32_t i = 0; i < b->n_cols; i++) {
        const float *m = b->matrix + i * b->stride;
        const row_vec wanted = load_rows(b->state[i]);
        const row_vec change = (nearest_values(b, wanted, (row_mask *)b->index[i]) - wanted) / m[i];
        memcpy(b->change[i], &change, sizeof change);
        move_columns(b, m, i + 1, change);
    }
}

/* state: the gradient. Takes the values that minimize the loss, column after column; value: the old, then the new. */
static void descend_block(cq_column_block *b) {
    for (int32_t i = 0; i < b->n_cols; i++) {
        const float *m = b->matrix + i * b->stride;
        const row_vec old = load_rows(b->value[i]);
        const row_vec value = nearest_values(b, old - load_rows(b->state[i]) / m[i], (row_mask *)b->index[i]);
        const row_vec change = value - old;
        memcpy(b->value[i], &value, sizeof value);
        memcpy(b->change[i], &change, sizeof change);
        move_columns(b, m, 0, change);
    }
}

enum { RANK_ROWS = 4, RANK_VECS = 2 };

CQ_INLINE void rank_tile(const float (*change)[CQ_ROWS], int32_t n_cols, const float *matrix, int64_t stride,
                         float *const *rows, int32_t j) {
    vec sum[RANK_ROWS][RANK_VECS];
    for (int32_t r = 0; r < RANK_ROWS; r++)
        for (int32_t v = 0; v < RANK_VECS; v++) sum[r][v] = load_vec(rows[r] + j + v * CQ_LANES);
    for (int32_t i = 0; i < n_cols; i++)
        for (int32_t v = 0; v < RANK_VECS; v++) {
            const vec m = load_vec(matrix + i * stride + j + v * CQ_LANES);
            for (int32_t r = 0; r < RANK_ROWS; r++) sum[r][v] += m * change[i][r];
        }
    for (int32_t r = 0; r < RANK_ROWS; r++)
        for (int32_t v = 0; v < RANK_VECS; v++) store_vec(rows[r] + j + v * CQ_LANES, sum[r][v]);
}

/* rows[r][j] += sum over i of change[i][r] * matrix[i][j], for CQ_ROWS rows and j < n. */
static void rank_update(const float (*change)[CQ_ROWS], int32_t n_cols, const float *matrix, int64_t stride,
                        float *const *rows, int32_t n) {
    const int32_t tiled = n - n % (RANK_VECS * CQ_LANES);
    for (int32_t j = 0; j < tiled; j += RANK_VECS * CQ_LANES)
        for (int32_t r = 0; r < CQ_ROWS; r += RANK_ROWS)
            rank_tile((const float (*)[CQ_ROWS])(change[0] + r), n_cols, matrix, stride, rows + r, j);
    for (int32_t i = 0; i < n_cols && tiled < n; i++)
        for (int32_t r = 0; r < CQ_ROWS; r++)
            axpy(change[i][r], matrix + i * stride + tiled, rows[r] + tiled, n - tiled);
}
