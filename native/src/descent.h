/* What descent.c and its inner loops, compiled for each instruction set (column_block.h), share. */
#ifndef CQ_DESCENT_H
#define CQ_DESCENT_H
#include "kernels.h"

/* A block of columns of CQ_ROWS rows. matrix: its square of the second moments or of the feedback factor. */
typedef struct cq_column_block {
    int32_t n_cols, n_values;
    int32_t n_rows, ring, trellis; /* with a trellis, `ring` rows choose together */
    const float *matrix;
    int64_t stride;
    _Alignas(4 * CQ_ROWS) float weight[CQ_ROWS]; /* what a row's squared error counts beside the others' */
    _Alignas(4 * CQ_ROWS) float values[CQ_MAX_CENTROIDS][CQ_ROWS]; /* what the columns can take */
    _Alignas(4 * CQ_ROWS) float state[CQ_BLOCK][CQ_ROWS], value[CQ_BLOCK][CQ_ROWS];
    _Alignas(4 * CQ_ROWS) float change[CQ_BLOCK][CQ_ROWS]; /* out: what moved the other columns */
    _Alignas(4 * CQ_ROWS) int32_t index[CQ_BLOCK][CQ_ROWS];
} cq_column_block;
#endif
