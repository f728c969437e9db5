/* Rows at work under the inputs' Hessian: what descent.c and refit.c share. */
#ifndef CQ_BATCH_H
#define CQ_BATCH_H
#include "cluster/fit.h"
#include "cluster_kernels.h"

/* One row at work. */
typedef struct {
    cq_fit fit, best;
    const float *w;
    float weight;     /* what its loss counts beside the others' of its set */
    float *value;     /* [n_cols]: effective weights times the scale */
    float *state;     /* [n_cols]: the gradient, H (value - w); in error feedback what the columns before have left */
    float *step;      /* [n_cols]: what one step of a column's centroid changes in its weight */
    int32_t *columns; /* [n_cols]: sorted by centroid */
    double *normal;   /* [n_centroids][n_centroids]: of one codebook; of its set's first row, as the next two */
    double *slope;    /* [n_centroids]: of the loss */
    double *target;   /* [n_codebooks * n_centroids]: centroids before rounding */
    float (*hessian_rows)[CQ_BLOCK]; /* [n_cols]: a block of columns of H; of the first row at work */
    int active;                      /* whether the last round improved its set */
} cq_descent_row;

/* CQ_ROWS rows at work. matrix: H, or its Cholesky factor V, in squares along the diagonal, of job->hessian_width
 * columns each. */
typedef struct {
    const cq_clustering *job;
    const cq_cluster_kernels *kernels;
    const float *matrix; /* [n_cols][hessian_width] */
    cq_descent_row *rows;
    int32_t n;
} cq_batch;

/* The columns [begin, end) that influence column i: its square of the matrix. */
static inline int32_t cq_square_begin(const cq_batch *b, int32_t i) {
    return i / b->job->hessian_width * b->job->hessian_width;
}
static inline int32_t cq_square_end(const cq_batch *b, int32_t i) {
    return cq_min(cq_square_begin(b, i) + b->job->hessian_width, b->job->n_cols);
}
/* Where the matrix has row i and column j of the same square. */
static inline const float *cq_matrix_at(const cq_batch *b, int32_t i, int32_t j) {
    return b->matrix + (size_t)i * b->job->hessian_width + (j - cq_square_begin(b, i));
}

/* Where the set that starts with `first` ends. */
static inline cq_descent_row *cq_end_of_set(const cq_batch *b, cq_descent_row *first) {
    cq_descent_row *end = first + b->job->codebook_rows;
    return end < b->rows + b->n ? end : b->rows + b->n;
}
#endif
