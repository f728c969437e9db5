/* What one instruction set provides to convert models: a table of the clustering kernels, and the structures they work
 * on. dispatch.c chooses it together with the table to run models (kernels.h). */
#ifndef CQ_CLUSTER_KERNELS_H
#define CQ_CLUSTER_KERNELS_H
#include "kernels.h"

enum { CQ_ROWS = 16 };  /* rows of weights that clustering takes side by side (cluster/descent.c) */
enum { CQ_STRIDE = 8 }; /* ends of clusters that the dynamic program takes side by side */

/* Arrays of n + 1 elements, and CQ_STRIDE more that may be read but do not count; split: [CQ_MAX_CENTROIDS] of the
 * cuts. */
typedef struct cq_kmeans {
    uint32_t *key, *key_tmp; /* values as sortable integers: cq_sortable */
    float *q, *q_tmp;        /* their weights, >= 0 */
    double *s0, *s1;         /* sums of weights and of weighted values up to each end */
    double *best, *next;     /* per end: the greatest sum of gains with one cluster fewer, and with this one */
    double tiny;             /* added to a cluster's weight, which may be 0 */
    uint16_t *split;         /* per number of clusters and end: where the last cluster starts */
} cq_kmeans;

/* The ends lo..hi of one layer, whose last cluster starts at `first` or later; fewer: split of the layer before, a
 * lower bound too. */
typedef struct cq_kmeans_layer {
    int32_t first, lo, hi;
    const uint16_t *fewer;
    uint16_t *split;
} cq_kmeans_layer;

/* A block of columns of CQ_ROWS rows. matrix: its square of the Hessian H (cluster/descent.c), or of the Cholesky
 * factor if `forward`. */
typedef struct cq_column_block {
    int32_t n_cols, n_values;
    int32_t n_rows, codebook_rows, trellis; /* with a trellis, the rows that share a codebook choose together */
    int32_t forward;                        /* a column moves only those after it */
    const float *matrix;
    int64_t stride;
    _Alignas(4 * CQ_ROWS) float weight[CQ_ROWS]; /* what a row's squared error counts beside the others' */
    _Alignas(4 * CQ_ROWS) float values[CQ_MAX_CENTROIDS][CQ_ROWS]; /* what the columns can take */
    _Alignas(4 * CQ_ROWS) float state[CQ_BLOCK][CQ_ROWS], value[CQ_BLOCK][CQ_ROWS];
    _Alignas(4 * CQ_ROWS) float change[CQ_BLOCK][CQ_ROWS]; /* out: what moved the other columns */
    _Alignas(4 * CQ_ROWS) int32_t index[CQ_BLOCK][CQ_ROWS];
} cq_column_block;

/* Columns of one row by their centroid, columns[first[c]] .. columns[first[c + 1]] in ascending order, and a block of
 * columns of the rows of H that belong to them. Rows count step each, from `begin` on half of it, from `end` on
 * nothing.
 */
typedef struct cq_centroid_columns {
    int32_t n_centroids, begin, end;
    const int32_t *first, *columns;
    const float *step;
    const float (*rows)[CQ_BLOCK];
} cq_centroid_columns;

typedef struct {
    /* One layer of the dynamic program of k-means: next and split for every end of the layer. */
    void (*kmeans_layer)(const cq_kmeans *s, const cq_kmeans_layer *layer);
    /* index and value: what comes nearest to the block's states. */
    void (*nearest_block)(cq_column_block *b);
    /* Column after column takes the value that minimizes the loss, and moves the states of the block's others. */
    void (*descend_block)(cq_column_block *b);
    /* rows[r][j] += sum over i < n_cols of change[i][r] * matrix[i * stride + j], for CQ_ROWS rows and j < n. */
    void (*rank_update)(const float (*change)[CQ_ROWS], int32_t n_cols, const float *matrix, int64_t stride,
                        float *const *rows, int32_t n);
    /* sums[c][j]: sum over the columns i of centroid c of step[i] * rows[i][j]. */
    void (*sum_by_centroid)(const cq_centroid_columns *columns, float (*sums)[CQ_BLOCK]);
} cq_cluster_kernels;

#define CQ_DECLARE(symbol, name, clustering, compiled) extern const cq_cluster_kernels cq_cluster_kernels_##clustering;
CQ_INSTRUCTION_SETS(CQ_DECLARE)
#undef CQ_DECLARE

/* As cq_kernels_current. */
const cq_cluster_kernels *cq_cluster_kernels_current(void);
#endif
