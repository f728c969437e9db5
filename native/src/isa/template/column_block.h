/* TEMPLATE. The inner loops of descent.c and refit.c, over the primitives that vectors.h lists: CQ_ROWS rows of a
 * weight matrix side by side, each in one lane of ROW_VECS vectors, a block of columns at a time. Inside the block
 * every column's choice moves the columns beside it at once; what it means for the columns outside is then added for
 * the whole block by rank_update. */
#ifndef CQ_COLUMN_BLOCK_H
#define CQ_COLUMN_BLOCK_H
#include "cluster_kernels.h"
#include "isa/template/trellis.h"
#include "isa/template/vectors.h"

enum { ROW_VECS = CQ_ROWS / CQ_LANES };
enum { INDEX_BITS = 31 }; /* low bits of a distance that hold the index instead: 2^-18 of it */
_Static_assert(CQ_MAX_CENTROIDS <= INDEX_BITS + 1, "indices fit their bits");

/* Each lane's smallest distance to its values [first, first + n), and in the low bits which one's: the first of equals.
 * v: which of the ROW_VECS vectors. */
CQ_INLINE vec nearest_of(const cq_column_block *b, int32_t v, int32_t first, int32_t n, vec wanted) {
    vec best = all_lanes(INFINITY);
    for (int32_t c = 0; c < n; c++) {
        const vec difference = wanted - load_vec(b->values[first + c] + v * CQ_LANES);
        best = min_vec(best, (vec)(((int_vec)difference & (0x7fffffff & ~INDEX_BITS)) | c));
    }
    return best;
}

/* The values of the block's column that the indices stand for. */
CQ_INLINE void take_values(const cq_column_block *b, const int32_t *index, float *value) {
    for (int32_t r = 0; r < CQ_ROWS; r++) value[r] = b->values[index[r]][r];
}

/* The nearest that the trellis allows: each subset's nearest, then the best path through the subsets. */
CQ_INLINE void nearest_on_trellis(const cq_column_block *b, const vec *wanted, int32_t *index) {
    const int32_t size = b->n_values / 4;
    int32_t nearest[4][CQ_ROWS], subset[CQ_ROWS] = {0};
    float cost[CQ_ROWS][4];
    for (int32_t v = 0; v < ROW_VECS; v++) {
        const vec weight = load_vec(b->weight + v * CQ_LANES);
        vec error[4];
        for (int32_t p = 0; p < 4; p++) {
            const vec found = nearest_of(b, v, p * size, size, wanted[v]);
            const int_vec at = ((int_vec)found & INDEX_BITS) + p * size;
            const vec distance = (vec)((int_vec)found & ~INDEX_BITS);
            memcpy(nearest[p] + v * CQ_LANES, &at, sizeof at);
            error[(p & 1) << 1 | p >> 1] = weight * distance * distance; /* in the order of trellis_path */
        }
        transpose_groups(error, 4); /* group g of error[p] has the costs of row 4 g + p */
        for (int32_t p = 0; p < 4; p++)
            for (int32_t lane = 0; lane < CQ_LANES; lane += 4)
                memcpy(cost[v * CQ_LANES + lane + p], (float *)&error[p] + lane, 16);
    }
    for (int32_t r = 0; r < b->n_rows; r += b->codebook_rows)
        trellis_path((const float (*)[4])cost + r, cq_min(b->codebook_rows, b->n_rows - r), subset + r);
    for (int32_t r = 0; r < CQ_ROWS; r++) index[r] = nearest[subset[r]][r];
}

CQ_INLINE void nearest_values(const cq_column_block *b, const vec *wanted, int32_t *index, float *value) {
    if (b->trellis) {
        nearest_on_trellis(b, wanted, index);
    } else {
        for (int32_t v = 0; v < ROW_VECS; v++) {
            const int_vec at = (int_vec)nearest_of(b, v, 0, b->n_values, wanted[v]) & INDEX_BITS;
            memcpy(index + v * CQ_LANES, &at, sizeof at);
        }
    }
    take_values(b, index, value);
}

/* state: what the columns should be; index and value: what comes nearest. */
static void nearest_block(cq_column_block *b) {
    for (int32_t i = 0; i < b->n_cols; i++) {
        vec wanted[ROW_VECS];
        memcpy(wanted, b->state[i], sizeof wanted);
        nearest_values(b, wanted, b->index[i], b->value[i]);
    }
}

/* Takes the values that minimize the loss, column after column: the old one less state / m[i][i]. value: the old, then
 * the new. state: what the columns' changes add up to, by the block's square m of H or, forward, of its Cholesky
 * factor. */
static void descend_block(cq_column_block *b) {
    for (int32_t i = 0; i < b->n_cols; i++) {
        const float *m = b->matrix + i * b->stride;
        vec old[ROW_VECS], wanted[ROW_VECS], change[ROW_VECS];
        for (int32_t v = 0; v < ROW_VECS; v++) {
            old[v] = load_vec(b->value[i] + v * CQ_LANES);
            wanted[v] = old[v] - load_vec(b->state[i] + v * CQ_LANES) / m[i];
        }
        nearest_values(b, wanted, b->index[i], b->value[i]);
        for (int32_t v = 0; v < ROW_VECS; v++) change[v] = load_vec(b->value[i] + v * CQ_LANES) - old[v];
        memcpy(b->change[i], change, sizeof change);
        for (int32_t j = b->forward ? i + 1 : 0; j < b->n_cols; j++)
            for (int32_t v = 0; v < ROW_VECS; v++) {
                float *state = b->state[j] + v * CQ_LANES;
                store_vec(state, load_vec(state) + change[v] * m[j]);
            }
    }
}

enum { RANK_ROWS = CQ_LANES == 16 ? 8 : 4, RANK_VECS = 2 }; /* the sums of a tile stay in registers */

/* A row of a wide matrix is pages away from the next one, so no hardware fetches the next tile ahead. */
CQ_INLINE void rank_tile(const float (*change)[CQ_ROWS], int32_t n_cols, const float *matrix, int64_t stride,
                         float *const *rows, int32_t j, const int32_t first) {
    vec sum[RANK_ROWS][RANK_VECS];
    for (int32_t r = 0; r < RANK_ROWS; r++)
        for (int32_t v = 0; v < RANK_VECS; v++) sum[r][v] = load_vec(rows[r] + j + v * CQ_LANES);
    for (int32_t i = 0; i < n_cols; i++)
        for (int32_t v = 0; v < RANK_VECS; v++) {
            const float *at = matrix + i * stride + j + v * CQ_LANES;
            if (first) __builtin_prefetch(at + 4 * RANK_VECS * CQ_LANES, 0, 2);
            const vec m = load_vec(at);
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
            rank_tile((const float (*)[CQ_ROWS])(change[0] + r), n_cols, matrix, stride, rows + r, j, r == 0);
    for (int32_t i = 0; i < n_cols && tiled < n; i++)
        for (int32_t r = 0; r < CQ_ROWS; r++)
            axpy(change[i][r], matrix + i * stride + tiled, rows[r] + tiled, n - tiled);
}

/* sums[c][j]: sum over the columns i of centroid c of step[i] * rows[i][j], in registers. */
static void sum_by_centroid(const cq_centroid_columns *of, float (*sums)[CQ_BLOCK]) {
    enum { VECS = CQ_BLOCK / CQ_LANES };
    for (int32_t c = 0; c < of->n_centroids; c++) {
        const int32_t *column = of->columns + of->first[c], *end = of->columns + of->first[c + 1];
        vec total[VECS] = {0};
        for (; column < end && *column < of->end; column++) {
            const float step = *column < of->begin ? of->step[*column] : 0.5f * of->step[*column];
            for (int32_t v = 0; v < VECS; v++) total[v] += load_vec(of->rows[*column] + v * CQ_LANES) * step;
        }
        for (int32_t v = 0; v < VECS; v++) store_vec(sums[c] + v * CQ_LANES, total[v]);
    }
}
#endif
