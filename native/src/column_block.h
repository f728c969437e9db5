/* The inner loops of descent.c, included by float_ops.h: CQ_ROWS rows of a weight matrix side by side, one lane each,
 * a block of columns at a time. Inside the block every column's choice moves the columns beside it at once; what it
 * means for the columns outside is then added for the whole block by rank_update. */
#include "descent.h"
#include "trellis.h"

typedef float row_vec __attribute__((vector_size(4 * CQ_ROWS), may_alias));
typedef int32_t row_mask __attribute__((vector_size(4 * CQ_ROWS), may_alias));

CQ_INLINE row_vec load_rows(const float *p) {
    row_vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Each lane's nearest of its values [first, end), the first of equals; index: where it stands. */
CQ_INLINE row_vec nearest_of(const cq_column_block *b, int32_t first, int32_t end, row_vec wanted, row_mask *index) {
    const row_mask zero = {0};
    row_vec nearest = load_rows(b->values[first]), best = wanted - nearest;
    best = (row_vec)((row_mask)best & 0x7fffffff);
    row_mask at = zero + first;
    for (int32_t c = first + 1; c < end; c++) {
        const row_vec value = load_rows(b->values[c]);
        const row_vec distance = (row_vec)((row_mask)(wanted - value) & 0x7fffffff);
        const row_mask closer = distance < best;
        best = (row_vec)(((row_mask)distance & closer) | ((row_mask)best & ~closer));
        nearest = (row_vec)(((row_mask)value & closer) | ((row_mask)nearest & ~closer));
        at = ((zero + c) & closer) | (at & ~closer);
    }
    *index = at;
    return nearest;
}

/* The nearest that the trellis allows: each part's nearest, then the best way through the parts. */
CQ_INLINE row_vec nearest_on_trellis(const cq_column_block *b, row_vec wanted, row_mask *index) {
    const int32_t size = b->n_values / 4;
    const row_vec weight = load_rows(b->weight);
    row_vec nearest[4], error[4], chosen = {0};
    row_mask at[4], part = {0}, found = {0};
    float cost[CQ_ROWS][4];
    for (int32_t p = 0; p < 4; p++) {
        nearest[p] = nearest_of(b, p * size, (p + 1) * size, wanted, &at[p]);
        error[p] = weight * (wanted - nearest[p]) * (wanted - nearest[p]);
    }
    for (int32_t r = 0; r < CQ_ROWS; r++)
        for (int32_t p = 0; p < 4; p++) cost[r][p] = error[p][r];
    for (int32_t r = 0; r < b->n_rows; r += b->ring)
        cq_trellis_path((const float (*)[4])cost + r, b->n_rows - r < b->ring ? b->n_rows - r : b->ring,
                        (int32_t *)&part + r);
    for (int32_t p = 0; p < 4; p++) {
        const row_mask here = part == p;
        chosen = (row_vec)(((row_mask)nearest[p] & here) | ((row_mask)chosen & ~here));
        found = (at[p] & here) | (found & ~here);
    }
    *index = found;
    return chosen;
}

CQ_INLINE row_vec nearest_values(const cq_column_block *b, row_vec wanted, row_mask *index) {
    return b->trellis ? nearest_on_trellis(b, wanted, index) : nearest_of(b, 0, b->n_values, wanted, index);
}

/* state: what the columns should be; index and value: what comes nearest. */
static void nearest_block(cq_column_block *b) {
    for (int32_t i = 0; i < b->n_cols; i++) {
        const row_vec value = nearest_values(b, load_rows(b->state[i]), (row_mask *)b->index[i]);
        memcpy(b->value[i], &value, sizeof value);
    }
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
