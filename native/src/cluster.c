/* Codebooks for the rows of a weight matrix: exact weighted 1-D k-means, then a fit to what the kernels multiply.
 *
 * 1. Every scale group of a row is divided by its weighted root mean square.
 * 2. Each codebook is solved exactly (kmeans.c), weights taken relative to the amplitudes.
 * 3. Centroids become int8. Then group scales, centroids, assignments and the row's scale are refitted in turn by least
 *    squares. A round counts only if the loss, measured on the effective int8 weights, falls: it never increases.
 *
 * Rows are independent, so the result does not depend on the number of threads. */
#include "fit.h"
#include <math.h>
#include <omp.h>

/* Per thread. */
typedef struct {
    const cq_kernels *kernels;
    cq_kmeans kmeans;
    double *codebook; /* [n_codebooks * n_centroids]: centroids before rounding */
    float *amplitude; /* [n_groups]: real scale of each group */
    uint8_t *indices;
    int8_t *centroids, *group_scales;
} workspace;

static size_t carve(workspace *s, uint8_t *base, int32_t n_cols) {
    size_t n = (size_t)n_cols, blocks = n / CQ_BLOCK + 1, used = cq_kmeans_carve(&s->kmeans, base, n_cols);
    cq_take(base, &used, &s->codebook, 8 * blocks * CQ_MAX_CENTROIDS);
    cq_take(base, &used, &s->amplitude, 4 * blocks);
    cq_take(base, &used, &s->indices, n);
    cq_take(base, &used, &s->centroids, blocks * CQ_MAX_CENTROIDS);
    return cq_take(base, &used, &s->group_scales, blocks);
}

/* ---- one row ---- */

static int32_t group_of(const cq_clustering *job, int32_t col) { return job->scale_cols ? col / job->scale_cols : 0; }

/* Rounds the amplitudes of all groups to the file's grid: u8 steps of the row's scale. */
static void set_scales(const cq_clustering *job, workspace *s, cq_fit *f) {
    float top = 0;
    for (int32_t g = 0; g < cq_n_groups(job); g++) top = fmaxf(top, s->amplitude[g]);
    f->scale = top;
    if (!job->scale_cols) return;
    f->scale = top * (128.0f / 127.0f);
    for (int32_t g = 0; g < cq_n_groups(job); g++) {
        f->group_scales[g] = (int8_t)(top > 0 ? lrintf(127.0f * (s->amplitude[g] / top)) : 0);
        s->amplitude[g] = f->scale * ((float)f->group_scales[g] / 128.0f);
    }
}

/* Start: each group's weighted root mean square. */
static void start_scales(const cq_clustering *job, const float *w, workspace *s, cq_fit *f) {
    int32_t cols = job->scale_cols ? job->scale_cols : job->n_cols;
    for (int32_t g = 0; g < cq_n_groups(job); g++) {
        int32_t end = (g + 1) * cols < job->n_cols ? (g + 1) * cols : job->n_cols;
        double sum = 0, total = 0;
        for (int32_t i = g * cols; i < end; i++) {
            sum += (double)job->weight[i] * w[i] * w[i];
            total += (double)job->weight[i];
        }
        s->amplitude[g] = total > 0 ? (float)sqrt(sum / total) : 0;
    }
    set_scales(job, s, f);
}

/* Least squares of each group's amplitude with centroids and assignments fixed. */
static void refit_scales(const cq_clustering *job, const float *w, workspace *s, cq_fit *f) {
    int32_t cols = job->scale_cols ? job->scale_cols : job->n_cols;
    for (int32_t g = 0; g < cq_n_groups(job); g++) {
        int32_t end = (g + 1) * cols < job->n_cols ? (g + 1) * cols : job->n_cols;
        double wc = 0, cc = 0;
        for (int32_t i = g * cols; i < end; i++) {
            double c = f->centroids[i / job->codebook_cols * job->n_centroids + f->indices[i]];
            wc += job->weight[i] * c * w[i];
            cc += job->weight[i] * c * c;
        }
        s->amplitude[g] = wc > 0 ? (float)(wc / cc) : 0;
    }
    set_scales(job, s, f);
}

/* Exact codebooks for the current amplitudes. */
static void solve_codebooks(const cq_clustering *job, const float *w, workspace *s) {
    float top = 0; /* weights are taken relative to the largest amplitude: its square may not fit a float */
    for (int32_t g = 0; g < cq_n_groups(job); g++) top = fmaxf(top, s->amplitude[g]);
    for (int32_t b = 0; b < cq_n_codebooks(job); b++) {
        int32_t begin = b * job->codebook_cols, n = job->n_cols - begin;
        if (n > job->codebook_cols) n = job->codebook_cols;
        for (int32_t i = 0; i < n; i++) {
            float a = s->amplitude[group_of(job, begin + i)];
            s->kmeans.key[i] = cq_sortable(a > 0 ? w[begin + i] / a : 0);
            s->kmeans.q[i] = a > 0 ? job->weight[begin + i] * (a / top) * (a / top) : 0;
        }
        cq_kmeans_solve(s->kernels, &s->kmeans, n, job->n_centroids, s->codebook + b * job->n_centroids);
    }
}

/* Least squares of each centroid with amplitudes and assignments fixed: one Lloyd step. */
static void refit_codebooks(const cq_clustering *job, const float *w, workspace *s, const cq_fit *f) {
    for (int32_t b = 0; b < cq_n_codebooks(job); b++) {
        double wa[CQ_MAX_CENTROIDS] = {0}, aa[CQ_MAX_CENTROIDS] = {0};
        int32_t begin = b * job->codebook_cols, end = begin + job->codebook_cols;
        if (end > job->n_cols) end = job->n_cols;
        for (int32_t i = begin; i < end; i++) {
            double a = s->amplitude[group_of(job, i)], qa = job->weight[i] * a;
            wa[f->indices[i]] += qa * w[i];
            aa[f->indices[i]] += qa * a;
        }
        for (int32_t c = 0; c < job->n_centroids; c++) {
            int32_t at = b * job->n_centroids + c;
            s->codebook[at] = aa[c] > 0 ? wa[c] / aa[c] : f->centroids[at];
        }
    }
}

/* Rounds the real codebooks to int8, the largest of the row to 127, and sorts each. */
static void set_centroids(const cq_clustering *job, workspace *s, cq_fit *f) {
    int32_t k = job->n_centroids, n = cq_n_codebooks(job) * k;
    double top = 0;
    for (int32_t i = 0; i < n; i++) top = fmax(top, fabs(s->codebook[i]));
    f->scale = (float)(f->scale * top / 127.0);
    for (int32_t i = 0; i < n; i++) {
        int8_t c = (int8_t)(top > 0 ? lrint(s->codebook[i] * 127.0 / top) : 0);
        int32_t at = i, first = i / k * k;
        for (; at > first && f->centroids[at - 1] > c; at--) f->centroids[at] = f->centroids[at - 1];
        f->centroids[at] = c;
    }
}

/* Nearest effective weight per element; then the best scale for these assignments, rounded to float, and its loss. */
static void assign(const cq_clustering *job, const float *w, cq_fit *f) {
    double ww = 0, we = 0, ee = 0;
    for (int32_t begin = 0; begin < job->n_cols; begin += CQ_BLOCK) {
        float w8[CQ_MAX_CENTROIDS], middle[CQ_MAX_CENTROIDS];
        int32_t end = begin + CQ_BLOCK < job->n_cols ? begin + CQ_BLOCK : job->n_cols;
        cq_effective_weights(job, f, begin, w8);
        for (int32_t c = 0; c + 1 < job->n_centroids; c++) middle[c] = f->scale * 0.5f * (w8[c] + w8[c + 1]);
        for (int32_t i = begin; i < end; i++) {
            int32_t index = 0;
            for (int32_t c = 0; c + 1 < job->n_centroids; c++) index += w[i] > middle[c];
            f->indices[i] = (uint8_t)index;
            double h = job->weight[i], e = w8[index];
            ww += h * w[i] * w[i], we += h * w[i] * e, ee += h * e * e;
        }
    }
    f->scale = we > 0 ? (float)(we / ee) : 0;
    f->loss = fmax(0, ww + f->scale * (f->scale * ee - 2 * we));
}

static void cluster_row(const cq_clustering *job, int32_t row, workspace *s) {
    const float *w = job->w + (size_t)row * job->n_cols;
    cq_fit best = cq_fit_of_row(job, row), candidate = {0, s->indices, s->centroids, s->group_scales, 0};
    start_scales(job, w, s, &candidate);
    solve_codebooks(job, w, s);
    set_centroids(job, s, &candidate);
    assign(job, w, &candidate);
    cq_fit_copy(job, &best, &candidate);
    for (int32_t round = 0; round < job->n_iterations; round++) {
        refit_scales(job, w, s, &candidate);
        refit_codebooks(job, w, s, &candidate);
        set_centroids(job, s, &candidate);
        assign(job, w, &candidate);
        if (!(candidate.loss < best.loss)) break;
        cq_fit_copy(job, &best, &candidate);
    }
    job->scales[row] = best.scale, job->loss[row] = best.loss;
}

/* ---- entry points ---- */

int64_t cq_cluster_scratch_bytes(int32_t n_cols) {
    workspace s;
    return (int64_t)carve(&s, NULL, n_cols);
}

/* Rows in any order, one workspace per thread. */
int cq_cluster_rows(const cq_clustering *job, int32_t n_threads, uint8_t *scratch) {
    const cq_kernels *kernels = cq_kernels_current();
    if (!cq_clustering_valid(job) || n_threads < 1 || !kernels) return CQ_ERR_ARGUMENT;
    int64_t bytes = cq_cluster_scratch_bytes(job->n_cols);
#pragma omp parallel num_threads(n_threads)
    {
        workspace s = {.kernels = kernels};
        carve(&s, scratch + bytes * omp_get_thread_num(), job->n_cols);
#pragma omp for schedule(dynamic, 8)
        for (int32_t row = 0; row < job->n_rows; row++) cluster_row(job, row, &s);
    }
    return CQ_OK;
}
