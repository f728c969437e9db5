/* Codebooks and assignments under the full Hessian H = X^T X, the inputs' second moments: a row's loss is the squared
 * error of its outputs, r^T H r with r = effective weights - w. Starts from what cluster.c found under H's diagonal.
 *
 * 1. Error feedback (GPTQ, arXiv 2210.17323): columns from left to right take their nearest effective weight, and the
 *    error is moved to the columns after it. With H = V V^T, V upper triangular (Cholesky), the loss is |V^T r|^2, of
 * which a column's entry depends on the columns before it: (V^T r)_j = V_jj r_j + sum over i < j of V_ij r_i (the same
 * as by a factor of the inverse, as in QuIP, arXiv 2307.13304).
 * 2. Rounds of (LNQ, arXiv 2505.07004): centroids by their normal equations (refit.c), rounded to int8; then coordinate
 *    descent, each column taking the value that minimizes the loss with the others fixed, its gradient kept up to date.
 *    A round counts only if the loss falls.
 *
 * Both are sweeps over the columns that add to each column's state what the others' changes mean for it, by V or by H.
 * CQ_ROWS rows go together, in blocks of columns (column_block.h): what a block changes is added to the other columns
 * as one product of matrices. Rows influence each other only through codebooks that they share, and the rows of such a
 * set are always in one batch, so the result does not depend on the number of threads. With a trellis the rows of a set
 * choose their values together (trellis.h). H may consist of squares along its diagonal, of which the columns of
 * different ones do not influence each other. */
#include "cluster/batch.h"
#include "cluster/carve.h"
#include "cluster/refit.h"
#include <math.h>
#include <omp.h>

enum { SWEEPS = 2 }; /* sweeps of coordinate descent per round */

static size_t carve(cq_descent_row *rows, uint8_t *base, const cq_clustering *job) {
    size_t n = (size_t)job->n_cols, k = (size_t)job->n_centroids, blocks = n / CQ_BLOCK + 1, used = 0;
    for (cq_descent_row *s = rows; s < rows + CQ_ROWS; s++) {
        cq_take(base, &used, &s->value, 4 * n);
        cq_take(base, &used, &s->state, 4 * n);
        cq_take(base, &used, &s->step, 4 * n);
        cq_take(base, &used, &s->columns, 4 * n);
        cq_take(base, &used, &s->normal, 8 * k * k);
        cq_take(base, &used, &s->slope, 8 * k);
        cq_take(base, &used, &s->target, 8 * blocks * CQ_MAX_CENTROIDS);
        cq_take(base, &used, &s->fit.indices, n);
        cq_take(base, &used, &s->fit.centroids, blocks * CQ_MAX_CENTROIDS);
        cq_take(base, &used, &s->fit.group_scales, blocks);
    }
    cq_take(base, &used, &rows->hessian_rows, sizeof *rows->hessian_rows * n);
    return used;
}

/* The block of columns from `begin` on: its values, states and part of the matrix. */
static cq_column_block block_at(const cq_batch *b, int32_t begin) {
    const int32_t rest = b->job->n_cols - begin;
    cq_column_block block = {.n_cols = rest < CQ_BLOCK ? rest : CQ_BLOCK, .n_values = b->job->n_centroids};
    block.matrix = cq_matrix_at(b, begin, begin), block.stride = b->job->hessian_width;
    block.n_rows = b->n, block.codebook_rows = b->job->codebook_rows, block.trellis = b->job->trellis;
    for (int32_t r = 0; r < b->n; r++) {
        const cq_descent_row *s = b->rows + r;
        block.weight[r] = s->weight;
        float w8[CQ_MAX_CENTROIDS];
        cq_effective_weights(b->job, &s->fit, begin, w8);
        for (int32_t c = 0; c < block.n_values; c++) block.values[c][r] = w8[c] * s->fit.scale;
        for (int32_t i = 0; i < block.n_cols; i++) {
            block.state[i][r] = s->state[begin + i];
            block.value[i][r] = s->value[begin + i];
        }
    }
    return block;
}

/* Takes over the block's choices. */
static void leave_block(const cq_batch *b, const cq_column_block *block, int32_t begin) {
    for (int32_t r = 0; r < b->n; r++) {
        cq_descent_row *s = b->rows + r;
        for (int32_t i = 0; i < block->n_cols; i++) {
            s->fit.indices[begin + i] = (uint8_t)block->index[i][r];
            s->value[begin + i] = block->value[i][r];
            s->state[begin + i] = block->state[i][r];
        }
    }
}

/* Adds what the block's columns changed to the states of the columns [first, end) of its square. */
static void update_states(const cq_batch *b, const cq_column_block *block, int32_t begin, int32_t first, int32_t end) {
    float *states[CQ_ROWS];
    for (int32_t r = 0; r < CQ_ROWS; r++) states[r] = b->rows[r].state + first;
    const float *matrix = cq_matrix_at(b, begin, first);
    b->kernels->rank_update(block->change, block->n_cols, matrix, b->job->hessian_width, states, end - first);
}

/* One sweep over the columns. */
static void sweep(const cq_batch *b, int32_t forward) {
    for (int32_t begin = 0; begin < b->job->n_cols; begin += CQ_BLOCK) {
        cq_column_block block = block_at(b, begin);
        block.forward = forward;
        b->kernels->descend_block(&block);
        leave_block(b, &block, begin);
        if (!forward) update_states(b, &block, begin, cq_square_begin(b, begin), begin);
        update_states(b, &block, begin, begin + block.n_cols, cq_square_end(b, begin));
    }
}

static void clear_states(const cq_batch *b) {
    for (cq_descent_row *s = b->rows; s < b->rows + CQ_ROWS; s++) memset(s->state, 0, 4 * (size_t)b->job->n_cols);
}

/* Error feedback starts from w, where nothing is left over. */
static void feedback(const cq_batch *b) {
    clear_states(b);
    for (cq_descent_row *s = b->rows; s < b->rows + b->n; s++) memcpy(s->value, s->w, 4 * (size_t)b->job->n_cols);
    sweep(b, 1);
    for (cq_descent_row *s = b->rows; s < b->rows + b->n; s++) cq_fit_copy(b->job, &s->best, &s->fit);
}

/* Fills value and state, the gradient. */
static void evaluate(const cq_batch *b) {
    clear_states(b);
    for (int32_t begin = 0; begin < b->job->n_cols; begin += CQ_BLOCK) {
        cq_column_block block = block_at(b, begin);
        for (int32_t r = 0; r < b->n; r++)
            for (int32_t i = 0; i < block.n_cols; i++) {
                cq_descent_row *s = b->rows + r;
                s->value[begin + i] = block.values[s->fit.indices[begin + i]][r];
                block.change[i][r] = s->value[begin + i] - s->w[begin + i];
            }
        update_states(b, &block, begin, cq_square_begin(b, begin), cq_square_end(b, begin));
    }
}

static double loss_of(const cq_batch *b, const cq_descent_row *s) {
    double loss = 0;
    for (int32_t i = 0; i < b->job->n_cols; i++) loss += (double)(s->value[i] - s->w[i]) * s->state[i];
    return loss;
}

static void keep_gradient(const cq_batch *b, const cq_descent_row *s, float *gradients) {
    const size_t n = (size_t)b->job->n_cols, row = (size_t)(s->w - b->job->w) / n;
    if (gradients) memcpy(gradients + row * n, s->state, 4 * n);
}

/* Keeps a set's round if its loss fell, else the set is done. */
static void judge(const cq_batch *b, cq_descent_row *set) {
    double loss = 0, best = 0;
    for (cq_descent_row *s = set; s < cq_end_of_set(b, set); s++) {
        s->fit.loss = loss_of(b, s);
        loss += s->weight * s->fit.loss, best += s->weight * s->best.loss;
    }
    for (cq_descent_row *s = set; s < cq_end_of_set(b, set); s++) {
        s->active = loss < best;
        if (!s->active) continue;
        cq_fit_copy(b->job, &s->best, &s->fit);
        keep_gradient(b, s, b->job->gradient_after);
    }
}

static void descend(const cq_batch *b) {
    evaluate(b);
    for (cq_descent_row *s = b->rows; s < b->rows + b->n; s++) {
        s->best.loss = loss_of(b, s);
        keep_gradient(b, s, b->job->gradient_before), keep_gradient(b, s, b->job->gradient_after);
    }
    for (int32_t round = 0; round < b->job->n_iterations; round++) {
        cq_refit_codebooks(b);
        evaluate(b);
        for (int32_t i = 0; i < SWEEPS; i++) sweep(b, 0);
        for (cq_descent_row *set = b->rows; set < b->rows + b->n; set += b->job->codebook_rows)
            if (set->active) judge(b, set);
    }
}

/* ---- entry points ---- */

int64_t cq_descent_scratch_bytes(const cq_clustering *job) {
    cq_descent_row rows[CQ_ROWS];
    return (int64_t)carve(rows, NULL, job);
}

static void start_row(const cq_clustering *job, int32_t row, cq_descent_row *s, const cq_descent_row *set) {
    s->w = job->w + (size_t)row * job->n_cols;
    s->weight = job->row_weight[row];
    s->best = cq_fit_of_row(job, row);
    s->active = 1;
    s->fit.centroids = set->fit.centroids;
    cq_fit_copy(job, &s->fit, &s->best);
}

/* Blocks of columns lie in one square each. */
static int hessian_valid(const cq_clustering *job) {
    return job->hessian_width > 0 && (job->hessian_width >= job->n_cols || job->hessian_width % CQ_BLOCK == 0);
}

/* Batches in any order, one workspace per thread. */
static int for_batches(const cq_clustering *job, void (*function)(const cq_batch *), const float *matrix,
                       int32_t n_threads, uint8_t *scratch) {
    const cq_cluster_kernels *kernels = cq_cluster_kernels_current();
    if (!cq_clustering_valid(job) || !hessian_valid(job) || n_threads < 1 || !kernels) return CQ_ERR_ARGUMENT;
    int64_t bytes = cq_descent_scratch_bytes(job);
#pragma omp parallel num_threads(n_threads)
    {
        cq_descent_row rows[CQ_ROWS];
        carve(rows, scratch + bytes * omp_get_thread_num(), job);
#pragma omp for schedule(dynamic, 1)
        for (int32_t row = 0; row < job->n_rows; row += CQ_ROWS) {
            cq_batch b = {job, kernels, matrix, rows, job->n_rows - row < CQ_ROWS ? job->n_rows - row : CQ_ROWS};
            for (int32_t i = 0; i < b.n; i++) start_row(job, row + i, rows + i, rows + i - i % job->codebook_rows);
            function(&b);
            for (int32_t i = 0; i < b.n; i++)
                job->scales[row + i] = rows[i].best.scale, job->loss[row + i] = rows[i].best.loss;
        }
    }
    return CQ_OK;
}

int cq_feedback_rows(const cq_clustering *job, const float *cholesky, int32_t n_threads, uint8_t *scratch) {
    return for_batches(job, feedback, cholesky, n_threads, scratch);
}

int cq_descend_rows(const cq_clustering *job, const float *hessian, int32_t n_threads, uint8_t *scratch) {
    return for_batches(job, descend, hessian, n_threads, scratch);
}
