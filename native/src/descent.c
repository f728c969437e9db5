/* Codebooks and assignments under the full second moments H = X^T X of the inputs: a row's loss is the squared error of
 * its outputs, r^T H r with r = effective weights - w. Starts from what cluster.c found under H's diagonal.
 *
 * 1. Error feedback (GPTQ, arXiv 2210.17323): columns from left to right take their nearest effective weight, and the
 *    error is moved to the columns after it in proportion to their correlation.
 * 2. Rounds of (LNQ, arXiv 2505.07004): centroids by their normal equations (P^T H P) d = -P^T H r, P having one column
 *    per centroid, rounded to int8; then coordinate descent, each column taking the value that minimizes the loss with
 *    the others fixed, its gradient kept up to date. A round counts only if the loss falls.
 *
 * CQ_ROWS rows go together, in blocks of columns (column_block.h): what a block changes is added to the other columns
 * as one product of matrices. Rows influence each other only through codebooks that they share, and the rows of such a
 * set are always in one batch, so the result does not depend on the number of threads. With a trellis the rows of a set
 * choose their values together (trellis.h). */
#include "descent.h"
#include "fit.h"
#include <math.h>
#include <omp.h>

enum { SWEEPS = 2 }; /* sweeps of coordinate descent per round */
#define RIDGE 1e-6   /* relative to the diagonal: centroids that no column uses stay where they are */

/* One row at work. */
typedef struct {
    cq_fit fit, best;
    const float *w;
    float weight;   /* what its loss counts beside the others' of its set */
    float *value;   /* [n_cols]: effective weights times the scale */
    float *state;   /* [n_cols]: the gradient, H (value - w); in error feedback what is left of w */
    float *moments; /* [n_centroids][n_cols]: H P of one codebook */
    double *target; /* [n_codebooks * n_centroids]: centroids before rounding; of its set's first lane */
    int active;     /* whether the last round improved its set */
} lane;

typedef struct {
    const cq_clustering *job;
    const cq_kernels *kernels;
    const float *matrix; /* [n_cols][n_cols]: H, or the factor u of error feedback */
    lane *lanes;
    int32_t n;
} batch;

static size_t carve(lane *lanes, uint8_t *base, const cq_clustering *job) {
    size_t n = (size_t)job->n_cols, blocks = n / CQ_BLOCK + 1, used = 0;
    for (lane *s = lanes; s < lanes + CQ_ROWS; s++) {
        cq_take(base, &used, &s->value, 4 * n);
        cq_take(base, &used, &s->state, 4 * n);
        cq_take(base, &used, &s->moments, 4 * n * (size_t)job->n_centroids);
        cq_take(base, &used, &s->target, 8 * blocks * CQ_MAX_CENTROIDS);
        cq_take(base, &used, &s->fit.indices, n);
        cq_take(base, &used, &s->fit.centroids, blocks * CQ_MAX_CENTROIDS);
        cq_take(base, &used, &s->fit.group_scales, blocks);
    }
    return used;
}

static const float *matrix_row(const batch *b, int32_t i) { return b->matrix + (size_t)i * b->job->n_cols; }

/* The block of columns from `begin` on: its values, states and part of the matrix. */
static cq_column_block block_at(const batch *b, int32_t begin) {
    const int32_t rest = b->job->n_cols - begin;
    cq_column_block block = {.n_cols = rest < CQ_BLOCK ? rest : CQ_BLOCK, .n_values = b->job->n_centroids};
    block.matrix = matrix_row(b, begin) + begin, block.stride = b->job->n_cols;
    block.n_rows = b->n, block.ring = b->job->codebook_rows, block.trellis = b->job->trellis;
    for (int32_t r = 0; r < b->n; r++) {
        const lane *s = b->lanes + r;
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
static void leave_block(const batch *b, const cq_column_block *block, int32_t begin) {
    for (int32_t r = 0; r < b->n; r++) {
        lane *s = b->lanes + r;
        for (int32_t i = 0; i < block->n_cols; i++) {
            s->fit.indices[begin + i] = (uint8_t)block->index[i][r];
            s->value[begin + i] = block->value[i][r];
            s->state[begin + i] = block->state[i][r];
        }
    }
}

/* Adds what the block's columns changed to the states of the n columns from `first` on. */
static void update_states(const batch *b, const cq_column_block *block, int32_t begin, int32_t first, int32_t n) {
    float *rows[CQ_ROWS];
    for (int32_t r = 0; r < CQ_ROWS; r++) rows[r] = b->lanes[r].state + first;
    b->kernels->rank_update(block->change, block->n_cols, matrix_row(b, begin) + first, b->job->n_cols, rows, n);
}

/* What one step of a column's centroid changes in its weight. */
static float step_of(const batch *b, const lane *s, int32_t i) {
    return b->job->scale_cols ? s->fit.scale * (float)s->fit.group_scales[i / b->job->scale_cols] / 128.0f
                              : s->fit.scale;
}

static void feedback(const batch *b) {
    int32_t n = b->job->n_cols;
    for (lane *s = b->lanes; s < b->lanes + b->n; s++) memcpy(s->state, s->w, 4 * (size_t)n);
    for (int32_t begin = 0; begin < n; begin += CQ_BLOCK) {
        cq_column_block block = block_at(b, begin);
        b->kernels->feedback_block(&block);
        leave_block(b, &block, begin);
        const int32_t end = begin + block.n_cols;
        update_states(b, &block, begin, end, n - end);
    }
    for (lane *s = b->lanes; s < b->lanes + b->n; s++) cq_fit_copy(b->job, &s->best, &s->fit);
}

/* Fills value and state, the gradient. */
static void evaluate(const batch *b) {
    int32_t n = b->job->n_cols;
    for (lane *s = b->lanes; s < b->lanes + CQ_ROWS; s++) memset(s->state, 0, 4 * (size_t)n);
    for (int32_t begin = 0; begin < n; begin += CQ_BLOCK) {
        cq_column_block block = block_at(b, begin);
        for (int32_t r = 0; r < b->n; r++)
            for (int32_t i = 0; i < block.n_cols; i++) {
                lane *s = b->lanes + r;
                s->value[begin + i] = block.values[s->fit.indices[begin + i]][r];
                block.change[i][r] = s->value[begin + i] - s->w[begin + i];
            }
        update_states(b, &block, begin, 0, n);
    }
}

static double loss_of(const batch *b, const lane *s) {
    double loss = 0;
    for (int32_t i = 0; i < b->job->n_cols; i++) loss += (double)(s->value[i] - s->w[i]) * s->state[i];
    return loss;
}

/* Solves a x = b for a symmetric positive definite a [n][n] by Cholesky; x replaces b. */
static void solve(double *a, double *b, int32_t n) {
    for (int32_t i = 0; i < n; i++) {
        for (int32_t j = 0; j <= i; j++) {
            double sum = a[i * n + j];
            for (int32_t k = 0; k < j; k++) sum -= a[i * n + k] * a[j * n + k];
            a[i * n + j] = i == j ? sqrt(fmax(sum, 1e-300)) : sum / a[j * n + j];
        }
        for (int32_t k = 0; k < i; k++) b[i] -= a[i * n + k] * b[k];
        b[i] /= a[i * n + i];
    }
    for (int32_t i = n - 1; i >= 0; i--) {
        for (int32_t k = i + 1; k < n; k++) b[i] -= a[k * n + i] * b[k];
        b[i] /= a[i * n + i];
    }
}

/* Where the set that starts with lane `first` ends. */
static lane *end_of_set(const batch *b, lane *first) {
    lane *end = first + b->job->codebook_rows;
    return end < b->lanes + b->n ? end : b->lanes + b->n;
}

/* Real centroids of a set's codebook `book`, into target: they minimize the loss with everything else fixed. begin,
 * end: its columns; moments are filled. */
static void solve_codebook(const batch *b, lane *set, int32_t book, int32_t begin, int32_t end) {
    int32_t n = b->job->n_cols, k = b->job->n_centroids;
    double a[CQ_MAX_CENTROIDS * CQ_MAX_CENTROIDS] = {0}, d[CQ_MAX_CENTROIDS] = {0}, top = 0;
    for (const lane *s = set; s < end_of_set(b, set); s++)
        for (int32_t i = begin; i < end; i++) {
            const double step = (double)s->weight * step_of(b, s, i);
            for (int32_t c = 0; c < k; c++) a[s->fit.indices[i] * k + c] += step * s->moments[(size_t)c * n + i];
            d[s->fit.indices[i]] -= step * s->state[i];
        }
    for (int32_t c = 0; c < k; c++) top = fmax(top, a[c * k + c]);
    for (int32_t c = 0; c < k; c++) a[c * k + c] += RIDGE * top + 1e-30;
    solve(a, d, k);
    for (int32_t c = 0; c < k; c++) set->target[book * k + c] = set->fit.centroids[book * k + c] + d[c];
}

static void refit_codebooks(const batch *b) {
    int32_t n = b->job->n_cols, cols = b->job->codebook_cols;
    for (int32_t book = 0; book < cq_n_codebooks(b->job); book++) {
        int32_t begin = book * cols, end = begin + cols < n ? begin + cols : n;
        for (lane *s = b->lanes; s < b->lanes + b->n; s++)
            memset(s->moments, 0, 4 * (size_t)n * (size_t)b->job->n_centroids);
        for (int32_t i = begin; i < end; i++)
            for (lane *s = b->lanes; s < b->lanes + b->n; s++)
                if (s->active)
                    b->kernels->axpy(step_of(b, s, i), matrix_row(b, i), s->moments + (size_t)s->fit.indices[i] * n, n);
        for (lane *set = b->lanes; set < b->lanes + b->n; set += b->job->codebook_rows)
            if (set->active) solve_codebook(b, set, book, begin, end);
    }
}

/* Rounds a set's targets to int8, the largest to 127. */
static void round_centroids(const batch *b, lane *set) {
    int32_t n = cq_n_codebooks(b->job) * b->job->n_centroids;
    double top = 0;
    for (int32_t i = 0; i < n; i++) top = fmax(top, fabs(set->target[i]));
    if (top == 0) return;
    for (lane *s = set; s < end_of_set(b, set); s++) s->fit.scale = (float)(s->fit.scale * top / 127.0);
    for (int32_t i = 0; i < n; i++) set->fit.centroids[i] = (int8_t)lrint(set->target[i] * 127.0 / top);
}

/* One sweep over the columns: the minimizing value of column i is value - gradient / H[i][i]. */
static void sweep(const batch *b) {
    int32_t n = b->job->n_cols;
    for (int32_t begin = 0; begin < n; begin += CQ_BLOCK) {
        cq_column_block block = block_at(b, begin);
        b->kernels->descend_block(&block);
        leave_block(b, &block, begin);
        const int32_t end = begin + block.n_cols;
        update_states(b, &block, begin, 0, begin);
        update_states(b, &block, begin, end, n - end);
    }
}

/* Keeps a set's round if its loss fell, else the set is done. */
static void judge(const batch *b, lane *set) {
    double loss = 0, best = 0;
    for (lane *s = set; s < end_of_set(b, set); s++) {
        s->fit.loss = loss_of(b, s);
        loss += s->weight * s->fit.loss, best += s->weight * s->best.loss;
    }
    for (lane *s = set; s < end_of_set(b, set); s++) {
        s->active = loss < best;
        if (s->active) cq_fit_copy(b->job, &s->best, &s->fit);
    }
}

static void descend(const batch *b) {
    evaluate(b);
    for (lane *s = b->lanes; s < b->lanes + b->n; s++) s->best.loss = loss_of(b, s);
    for (int32_t round = 0; round < b->job->n_iterations; round++) {
        refit_codebooks(b);
        for (lane *set = b->lanes; set < b->lanes + b->n; set += b->job->codebook_rows)
            if (set->active) round_centroids(b, set);
        evaluate(b);
        for (int32_t i = 0; i < SWEEPS; i++) sweep(b);
        for (lane *set = b->lanes; set < b->lanes + b->n; set += b->job->codebook_rows)
            if (set->active) judge(b, set);
    }
}

/* ---- entry points ---- */

int64_t cq_descent_scratch_bytes(const cq_clustering *job) {
    lane lanes[CQ_ROWS];
    return (int64_t)carve(lanes, NULL, job);
}

static void start_lane(const cq_clustering *job, int32_t row, lane *s, const lane *set) {
    s->w = job->w + (size_t)row * job->n_cols;
    s->weight = job->row_weight[row];
    s->best = cq_fit_of_row(job, row);
    s->active = 1;
    s->fit.centroids = set->fit.centroids;
    cq_fit_copy(job, &s->fit, &s->best);
}

/* Batches in any order, one workspace per thread. */
static int for_batches(const cq_clustering *job, void (*function)(const batch *), const float *matrix,
                       int32_t n_threads, uint8_t *scratch) {
    const cq_kernels *kernels = cq_kernels_current();
    if (!cq_clustering_valid(job) || n_threads < 1 || !kernels) return CQ_ERR_ARGUMENT;
    int64_t bytes = cq_descent_scratch_bytes(job);
#pragma omp parallel num_threads(n_threads)
    {
        lane lanes[CQ_ROWS];
        carve(lanes, scratch + bytes * omp_get_thread_num(), job);
#pragma omp for schedule(dynamic, 1)
        for (int32_t row = 0; row < job->n_rows; row += CQ_ROWS) {
            batch b = {job, kernels, matrix, lanes, job->n_rows - row < CQ_ROWS ? job->n_rows - row : CQ_ROWS};
            for (int32_t i = 0; i < b.n; i++) start_lane(job, row + i, lanes + i, lanes + i - i % job->codebook_rows);
            function(&b);
            for (int32_t i = 0; i < b.n; i++)
                job->scales[row + i] = lanes[i].best.scale, job->loss[row + i] = lanes[i].best.loss;
        }
    }
    return CQ_OK;
}

int cq_feedback_rows(const cq_clustering *job, const float *u, int32_t n_threads, uint8_t *scratch) {
    return for_batches(job, feedback, u, n_threads, scratch);
}

int cq_descend_rows(const cq_clustering *job, const float *h, int32_t n_threads, uint8_t *scratch) {
    return for_batches(job, descend, h, n_threads, scratch);
}
