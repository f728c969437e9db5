/* Codebooks for the rows of a weight matrix: weighted 1-D k-means, then a fit to what the kernels multiply. The rows
 * that share codebooks are a set, often of one.
 *
 * 1. Every scale group of a row is divided by its weighted root mean square.
 * 2. Each codebook is solved (kmeans.c) for all rows of its set, weights taken relative to the amplitudes.
 * 3. Centroids become int8. Then group scales, centroids, assignments and the rows' scales are refitted in turn by
 * least squares. A round counts only if the set's loss, measured on the effective int8 weights, falls.
 *
 * Sets are independent, so the result does not depend on the number of threads. */
#include "cluster/carve.h"
#include "cluster/kmeans.h"
#include "cluster/row.h"
#include <math.h>
#include <omp.h>

/* With a trellis the best codebook is narrower than k-means's of as many centroids; rounds of refits find the rest. */
#define TRELLIS_START 0.82

/* Per thread. */
typedef struct {
    const cq_cluster_kernels *kernels;
    cq_kmeans kmeans;
    double *codebook; /* [n_codebooks * n_centroids]: centroids before rounding */
    cq_set_row rows[CQ_MAX_CODEBOOK_ROWS];
    int32_t n; /* rows of the set at work */
} workspace;

static size_t carve(workspace *s, uint8_t *base, const cq_clustering *job) {
    size_t n = (size_t)job->n_cols, blocks = n / CQ_BLOCK + 1;
    size_t used = cq_kmeans_carve(&s->kmeans, base, job->n_cols * job->codebook_rows);
    int8_t *centroids;
    cq_take(base, &used, &s->codebook, 8 * blocks * CQ_MAX_CENTROIDS);
    cq_take(base, &used, &centroids, blocks * CQ_MAX_CENTROIDS);
    for (cq_set_row *r = s->rows; r < s->rows + job->codebook_rows; r++) {
        cq_take(base, &used, &r->amplitude, 4 * blocks);
        cq_take(base, &used, &r->fit.indices, n);
        cq_take(base, &used, &r->fit.group_scales, blocks);
        r->fit.centroids = centroids;
    }
    return used;
}

/* Codebooks by k-means for the current amplitudes. */
static void solve_codebooks(const cq_clustering *job, workspace *s) {
    float top = 0; /* weights are taken relative to the largest amplitude: its square may not fit a float */
    for (cq_set_row *r = s->rows; r < s->rows + s->n; r++)
        for (int32_t g = 0; g < cq_n_groups(job); g++) top = fmaxf(top, r->amplitude[g]);
    for (int32_t b = 0; b < cq_n_codebooks(job); b++) {
        int32_t begin = b * job->codebook_cols, end = begin + job->codebook_cols, n = 0;
        if (end > job->n_cols) end = job->n_cols;
        for (cq_set_row *r = s->rows; r < s->rows + s->n; r++)
            for (int32_t first = begin; first < end; first += CQ_BLOCK) {
                const float a = r->amplitude[cq_group_of(job, first)], share = a > 0 ? (a / top) * (a / top) : 0;
                for (int32_t i = first; i < cq_min(first + CQ_BLOCK, end); i++, n++) {
                    s->kmeans.key[n] = cq_sortable(a > 0 ? r->w[i] / a : 0);
                    s->kmeans.q[n] = r->weight * job->weight[i] * share;
                }
            }
        double *codebook = s->codebook + b * job->n_centroids;
        cq_kmeans_solve(s->kernels, &s->kmeans, n, job->n_centroids, codebook);
        for (int32_t c = 0; c < job->n_centroids && job->trellis; c++) codebook[c] *= TRELLIS_START;
    }
}

/* Least squares of each centroid with amplitudes and assignments fixed: one Lloyd step. */
static void refit_codebooks(const cq_clustering *job, workspace *s) {
    for (int32_t b = 0; b < cq_n_codebooks(job); b++) {
        /* of four columns side by side, as a sum waits for the one before it */
        double sums[4][2][CQ_MAX_CENTROIDS] = {{{0}}};
        int32_t begin = b * job->codebook_cols, end = begin + job->codebook_cols;
        if (end > job->n_cols) end = job->n_cols;
        for (cq_set_row *r = s->rows; r < s->rows + s->n; r++)
            for (int32_t first = begin; first < end; first += CQ_BLOCK) {
                const double a = r->amplitude[cq_group_of(job, first)], ra = r->weight * a;
                for (int32_t i = first; i < cq_min(first + CQ_BLOCK, end); i++) {
                    const double qa = ra * job->weight[i];
                    sums[i % 4][0][r->fit.indices[i]] += qa * r->w[i];
                    sums[i % 4][1][r->fit.indices[i]] += qa * a;
                }
            }
        for (int32_t c = 0; c < job->n_centroids; c++) {
            const int32_t at = b * job->n_centroids + c;
            const double wa = (sums[0][0][c] + sums[1][0][c]) + (sums[2][0][c] + sums[3][0][c]);
            const double aa = (sums[0][1][c] + sums[1][1][c]) + (sums[2][1][c] + sums[3][1][c]);
            s->codebook[at] = aa > 0 ? wa / aa : s->rows->fit.centroids[at];
        }
    }
}

/* A codebook in ascending order -> the four subsets of the trellis (trellis.h), each of every fourth centroid. */
static void deal_to_subsets(int8_t *centroids, int32_t k) {
    int8_t ascending[CQ_MAX_CENTROIDS];
    memcpy(ascending, centroids, (size_t)k);
    for (int32_t i = 0; i < k; i++) centroids[i / 4 + i % 4 * (k / 4)] = ascending[i];
}

/* Rounds the real codebooks to int8, the largest of the set to 127, and sorts each. */
static void set_centroids(const cq_clustering *job, workspace *s) {
    int32_t k = job->n_centroids, n = cq_n_codebooks(job) * k;
    int8_t *centroids = s->rows->fit.centroids;
    double top = 0;
    for (int32_t i = 0; i < n; i++) top = fmax(top, fabs(s->codebook[i]));
    for (cq_set_row *r = s->rows; r < s->rows + s->n; r++) r->fit.scale = (float)(r->fit.scale * top / 127.0);
    for (int32_t i = 0; i < n; i++) {
        int8_t c = (int8_t)(top > 0 ? lrint(s->codebook[i] * 127.0 / top) : 0);
        int32_t at = i, first = i / k * k;
        for (; at > first && centroids[at - 1] > c; at--) centroids[at] = centroids[at - 1];
        centroids[at] = c;
    }
    for (int32_t i = 0; i < n && job->trellis; i += k) deal_to_subsets(centroids + i, k);
}

/* The nearest effective weights that the trellis allows, for columns [begin, end) of all rows together. Each row has
 * several of the block's rows, for some of the columns each. */
static void assign_block_on_trellis(const cq_clustering *job, workspace *s, int32_t begin, int32_t end) {
    const int32_t pieces = CQ_ROWS / s->n;
    cq_column_block block = {.n_cols = cq_ceil_div(end - begin, pieces), .n_values = job->n_centroids};
    block.n_rows = pieces * s->n, block.codebook_rows = s->n, block.trellis = 1;
    for (int32_t l = 0; l < block.n_rows; l++) {
        const cq_set_row *r = s->rows + l % s->n;
        float w8[CQ_MAX_CENTROIDS];
        cq_effective_weights(job, &r->fit, begin, w8);
        block.weight[l] = r->weight;
        for (int32_t c = 0; c < block.n_values; c++) block.values[c][l] = w8[c] * r->fit.scale;
        for (int32_t i = 0, at = begin + l / s->n * block.n_cols; i < block.n_cols && at < end; i++, at++)
            block.state[i][l] = r->w[at];
    }
    s->kernels->nearest_block(&block);
    for (int32_t l = 0; l < block.n_rows; l++)
        for (int32_t i = 0, at = begin + l / s->n * block.n_cols; i < block.n_cols && at < end; i++, at++)
            s->rows[l % s->n].fit.indices[at] = (uint8_t)block.index[i][l];
}

static void assign_on_trellis(const cq_clustering *job, workspace *s) {
    for (int32_t begin = 0; begin < job->n_cols; begin += CQ_BLOCK)
        assign_block_on_trellis(job, s, begin, cq_min(begin + CQ_BLOCK, job->n_cols));
}

/* Rounds the codebooks and assigns all rows; returns the set's loss. */
static double settle(const cq_clustering *job, workspace *s) {
    double loss = 0;
    set_centroids(job, s);
    if (job->trellis) assign_on_trellis(job, s);
    for (cq_set_row *r = s->rows; r < s->rows + s->n; r++) {
        if (!job->trellis) cq_assign_nearest(job, r->w, &r->fit);
        cq_fit_scale(job, r->w, &r->fit);
        loss += r->weight * r->fit.loss;
    }
    return loss;
}

static void keep(const cq_clustering *job, int32_t row, const workspace *s) {
    for (int32_t r = 0; r < s->n; r++) {
        cq_fit best = cq_fit_of_row(job, row + r);
        cq_fit_copy(job, &best, &s->rows[r].fit);
        job->scales[row + r] = best.scale, job->loss[row + r] = best.loss;
    }
}

static void cluster_set(const cq_clustering *job, int32_t row, workspace *s) {
    s->n = job->n_rows - row < job->codebook_rows ? job->n_rows - row : job->codebook_rows;
    for (int32_t r = 0; r < s->n; r++) {
        s->rows[r].w = job->w + (size_t)(row + r) * job->n_cols;
        s->rows[r].weight = job->row_weight[row + r];
        cq_start_scales(job, &s->rows[r]);
    }
    solve_codebooks(job, s);
    double best = settle(job, s);
    keep(job, row, s);
    for (int32_t round = 0; round < job->n_iterations; round++) {
        for (int32_t r = 0; r < s->n; r++) cq_refit_scales(job, &s->rows[r]);
        refit_codebooks(job, s);
        const double loss = settle(job, s);
        if (!(loss < best)) break;
        best = loss;
        keep(job, row, s);
    }
}

/* ---- entry points ---- */

int64_t cq_cluster_scratch_bytes(const cq_clustering *job) {
    workspace s;
    return (int64_t)carve(&s, NULL, job);
}

/* Sets in any order, one workspace per thread. */
int cq_cluster_rows(const cq_clustering *job, int32_t n_threads, uint8_t *scratch) {
    const cq_cluster_kernels *kernels = cq_cluster_kernels_current();
    if (!cq_clustering_valid(job) || n_threads < 1 || !kernels) return CQ_ERR_ARGUMENT;
    int64_t bytes = cq_cluster_scratch_bytes(job);
#pragma omp parallel num_threads(n_threads)
    {
        workspace s = {.kernels = kernels};
        carve(&s, scratch + bytes * omp_get_thread_num(), job);
#pragma omp for schedule(dynamic, 1)
        for (int32_t row = 0; row < job->n_rows; row += job->codebook_rows) cluster_set(job, row, &s);
    }
    return CQ_OK;
}
