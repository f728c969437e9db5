/* Codebooks and assignments under the full second moments H = X^T X of the inputs: a row's loss is the squared error of
 * its outputs, r^T H r with r = effective weights - w. Starts from what cluster.c found under H's diagonal.
 *
 * 1. Error feedback (GPTQ, arXiv 2210.17323): columns from left to right take their nearest effective weight, and the
 *    error is moved to the columns after it in proportion to their correlation.
 * 2. Rounds of (LNQ, arXiv 2505.07004): centroids by their normal equations (P^T H P) d = -P^T H r, P having one column
 *    per centroid, rounded to int8; then coordinate descent, each column taking the value that minimizes the loss with
 *    the others fixed, its gradient kept up to date. A round counts only if the loss falls.
 *
 * BATCH rows go together, so that each row of H, which outgrows the second-level cache, is read once for all of them.
 * Rows do not influence each other, so the result does not depend on the number of threads. */
#include "fit.h"
#include <math.h>
#include <omp.h>

enum { BATCH = 8, SWEEPS = 2 }; /* sweeps of coordinate descent per round */
#define RIDGE 1e-6              /* relative to the diagonal: centroids that no column uses stay where they are */

/* One row at work. */
typedef struct {
    cq_fit fit, best;
    const float *w;
    float *value;                   /* [n_cols]: effective weights times the scale */
    float *error;                   /* [n_cols]: value - w; in error feedback what is left of w */
    float *gradient;                /* [n_cols]: H error */
    float *moments;                 /* [n_centroids][n_cols]: H P of one codebook */
    double *target;                 /* [n_codebooks * n_centroids]: centroids before rounding */
    float values[CQ_MAX_CENTROIDS]; /* what the columns of the current block can take */
    int active;                     /* whether the last round improved it */
} lane;

typedef struct {
    const cq_clustering *job;
    const cq_kernels *kernels;
    const float *matrix; /* [n_cols][n_cols]: H, or the factor u of error feedback */
    lane *lanes;
    int32_t n;
} batch;

static size_t carve(lane *lanes, uint8_t *base, int32_t n_cols) {
    size_t n = (size_t)n_cols, blocks = n / CQ_BLOCK + 1, used = 0;
    for (lane *s = lanes; s < lanes + BATCH; s++) {
        cq_take(base, &used, &s->value, 4 * n);
        cq_take(base, &used, &s->error, 4 * n);
        cq_take(base, &used, &s->gradient, 4 * n);
        cq_take(base, &used, &s->moments, 4 * n * CQ_MAX_CENTROIDS);
        cq_take(base, &used, &s->target, 8 * blocks * CQ_MAX_CENTROIDS);
        cq_take(base, &used, &s->fit.indices, n);
        cq_take(base, &used, &s->fit.centroids, blocks * CQ_MAX_CENTROIDS);
        cq_take(base, &used, &s->fit.group_scales, blocks);
    }
    return used;
}

static int32_t nearest(const float *values, int32_t n, float v) {
    int32_t best = 0;
    float distance = fabsf(v - values[0]);
    for (int32_t i = 1; i < n; i++) {
        float other = fabsf(v - values[i]);
        best = other < distance ? i : best;
        distance = fminf(other, distance);
    }
    return best;
}

static const float *matrix_row(const batch *b, int32_t i) { return b->matrix + (size_t)i * b->job->n_cols; }

/* Column i's possible values, which change from block to block. */
static void enter_column(const batch *b, lane *s, int32_t i) {
    if (i % CQ_BLOCK) return;
    cq_effective_weights(b->job, &s->fit, i, s->values);
    for (int32_t c = 0; c < b->job->n_centroids; c++) s->values[c] *= s->fit.scale;
}

/* What one step of a column's centroid changes in its weight. */
static float step_of(const batch *b, const lane *s, int32_t i) {
    return b->job->scale_cols ? s->fit.scale * (float)s->fit.group_scales[i / b->job->scale_cols] / 128.0f
                              : s->fit.scale;
}

static void feedback(const batch *b) {
    int32_t n = b->job->n_cols;
    for (lane *s = b->lanes; s < b->lanes + b->n; s++) memcpy(s->error, s->w, 4 * (size_t)n);
    for (int32_t i = 0; i < n; i++) {
        const float *u = matrix_row(b, i);
        for (lane *s = b->lanes; s < b->lanes + b->n; s++) {
            enter_column(b, s, i);
            int32_t index = nearest(s->values, b->job->n_centroids, s->error[i]);
            s->fit.indices[i] = (uint8_t)index;
            b->kernels->axpy((s->values[index] - s->error[i]) / u[i], u + i + 1, s->error + i + 1, n - i - 1);
        }
    }
    for (lane *s = b->lanes; s < b->lanes + b->n; s++) cq_fit_copy(b->job, &s->best, &s->fit);
}

/* Fills value, error and gradient. */
static void evaluate(const batch *b) {
    int32_t n = b->job->n_cols;
    for (lane *s = b->lanes; s < b->lanes + b->n; s++) memset(s->gradient, 0, 4 * (size_t)n);
    for (int32_t i = 0; i < n; i++)
        for (lane *s = b->lanes; s < b->lanes + b->n; s++) {
            if (!s->active) continue;
            enter_column(b, s, i);
            s->value[i] = s->values[s->fit.indices[i]];
            s->error[i] = s->value[i] - s->w[i];
            b->kernels->axpy(s->error[i], matrix_row(b, i), s->gradient, n);
        }
}

static double loss_of(const batch *b, const lane *s) {
    double loss = 0;
    for (int32_t i = 0; i < b->job->n_cols; i++) loss += (double)(s->value[i] - s->w[i]) * s->gradient[i];
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

/* Real centroids of codebook `book`, into target: they minimize the loss with everything else fixed. begin, end: its
 * columns; moments are filled. */
static void solve_codebook(const batch *b, lane *s, int32_t book, int32_t begin, int32_t end) {
    int32_t n = b->job->n_cols, k = b->job->n_centroids;
    double a[CQ_MAX_CENTROIDS * CQ_MAX_CENTROIDS] = {0}, d[CQ_MAX_CENTROIDS] = {0}, top = 0;
    for (int32_t i = begin; i < end; i++) {
        double step = step_of(b, s, i);
        for (int32_t c = 0; c < k; c++) a[s->fit.indices[i] * k + c] += step * s->moments[(size_t)c * n + i];
        d[s->fit.indices[i]] -= step * s->gradient[i];
    }
    for (int32_t c = 0; c < k; c++) top = fmax(top, a[c * k + c]);
    for (int32_t c = 0; c < k; c++) a[c * k + c] += RIDGE * top + 1e-30;
    solve(a, d, k);
    for (int32_t c = 0; c < k; c++) s->target[book * k + c] = s->fit.centroids[book * k + c] + d[c];
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
        for (lane *s = b->lanes; s < b->lanes + b->n; s++)
            if (s->active) solve_codebook(b, s, book, begin, end);
    }
}

/* Rounds the targets to int8, the largest of the row to 127. */
static void round_centroids(const batch *b, lane *s) {
    int32_t n = cq_n_codebooks(b->job) * b->job->n_centroids;
    double top = 0;
    for (int32_t i = 0; i < n; i++) top = fmax(top, fabs(s->target[i]));
    if (top == 0) return;
    s->fit.scale = (float)(s->fit.scale * top / 127.0);
    for (int32_t i = 0; i < n; i++) s->fit.centroids[i] = (int8_t)lrint(s->target[i] * 127.0 / top);
}

/* One sweep over the columns: the minimizing value of column i is value - gradient / H[i][i]. */
static void sweep(const batch *b) {
    int32_t n = b->job->n_cols;
    for (int32_t i = 0; i < n; i++) {
        const float *h = matrix_row(b, i);
        for (lane *s = b->lanes; s < b->lanes + b->n; s++) {
            if (!s->active) continue;
            enter_column(b, s, i);
            int32_t index = nearest(s->values, b->job->n_centroids, s->value[i] - s->gradient[i] / h[i]);
            float change = s->values[index] - s->value[i];
            if (change == 0) continue;
            s->fit.indices[i] = (uint8_t)index, s->value[i] = s->values[index];
            b->kernels->axpy(change, h, s->gradient, n);
        }
    }
}

static void descend(const batch *b) {
    evaluate(b);
    for (lane *s = b->lanes; s < b->lanes + b->n; s++) s->best.loss = loss_of(b, s);
    for (int32_t round = 0; round < b->job->n_iterations; round++) {
        refit_codebooks(b);
        for (lane *s = b->lanes; s < b->lanes + b->n; s++)
            if (s->active) round_centroids(b, s);
        evaluate(b);
        for (int32_t i = 0; i < SWEEPS; i++) sweep(b);
        for (lane *s = b->lanes; s < b->lanes + b->n; s++) {
            if (!s->active) continue;
            s->fit.loss = loss_of(b, s);
            s->active = s->fit.loss < s->best.loss;
            if (s->active) cq_fit_copy(b->job, &s->best, &s->fit);
        }
    }
}

/* ---- entry points ---- */

int64_t cq_descent_scratch_bytes(int32_t n_cols) {
    lane lanes[BATCH];
    return (int64_t)carve(lanes, NULL, n_cols);
}

static void start_lane(const cq_clustering *job, int32_t row, lane *s) {
    s->w = job->w + (size_t)row * job->n_cols;
    s->best = cq_fit_of_row(job, row);
    s->active = 1;
    cq_fit_copy(job, &s->fit, &s->best);
}

/* Batches in any order, one workspace per thread. */
static int for_batches(const cq_clustering *job, void (*function)(const batch *), const float *matrix,
                       int32_t n_threads, uint8_t *scratch) {
    const cq_kernels *kernels = cq_kernels_current();
    if (!cq_clustering_valid(job) || n_threads < 1 || !kernels) return CQ_ERR_ARGUMENT;
    int64_t bytes = cq_descent_scratch_bytes(job->n_cols);
#pragma omp parallel num_threads(n_threads)
    {
        lane lanes[BATCH];
        carve(lanes, scratch + bytes * omp_get_thread_num(), job->n_cols);
#pragma omp for schedule(dynamic, 1)
        for (int32_t row = 0; row < job->n_rows; row += BATCH) {
            batch b = {job, kernels, matrix, lanes, job->n_rows - row < BATCH ? job->n_rows - row : BATCH};
            for (int32_t i = 0; i < b.n; i++) start_lane(job, row + i, lanes + i);
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
