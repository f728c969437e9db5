/* What fine-tuning needs of a clustered matrix: its float weights, as the file has them or with real centroids and
 * group scales, and a gradient of the weights carried over to those: the derivatives of centroid * group / 128 * scale.
 */
#include "fit.h"

int cq_clustered_weights(const cq_clustering *job, float *out, int32_t n_threads) {
    if (!cq_clustering_valid(job) || n_threads < 1) return CQ_ERR_ARGUMENT;
#pragma omp parallel for num_threads(n_threads)
    for (int32_t row = 0; row < job->n_rows; row++) {
        const cq_fit fit = cq_fit_of_row(job, row);
        float *to = out + (size_t)row * job->n_cols, w8[CQ_MAX_CENTROIDS];
        for (int32_t i = 0; i < job->n_cols; i++) {
            if (i % CQ_BLOCK == 0) cq_effective_weights(job, &fit, i, w8);
            to[i] = fit.scale * w8[fit.indices[i]];
        }
    }
    return CQ_OK;
}

int cq_tuned_weights(const cq_clustering *job, const float *centroids, const float *groups, float *out,
                     int32_t n_threads) {
    if (!cq_clustering_valid(job) || n_threads < 1) return CQ_ERR_ARGUMENT;
    const size_t n_centroids = (size_t)cq_n_codebooks(job) * job->n_centroids, n_groups = (size_t)cq_n_groups(job);
#pragma omp parallel for num_threads(n_threads)
    for (int32_t row = 0; row < job->n_rows; row++) {
        const uint8_t *indices = job->indices + (size_t)row * job->n_cols;
        float *to = out + (size_t)row * job->n_cols;
        for (int32_t i = 0; i < job->n_cols; i++) {
            const float *book =
                centroids + row / job->codebook_rows * n_centroids + i / job->codebook_cols * job->n_centroids;
            const float group = job->scale_cols ? groups[row * n_groups + i / job->scale_cols] / 128.0f : 1.0f;
            to[i] = job->scales[row] * group * book[indices[i]];
        }
    }
    return CQ_OK;
}

/* Adds the sums over one row. */
static void row_gradient(const cq_clustering *job, const cq_fit *fit, const float *gradient, float *centroids,
                         float *groups) {
    for (int32_t begin = 0; begin < job->n_cols; begin += CQ_BLOCK) {
        const int32_t end = begin + CQ_BLOCK < job->n_cols ? begin + CQ_BLOCK : job->n_cols;
        const int32_t book = begin / job->codebook_cols * job->n_centroids;
        const int32_t group = job->scale_cols ? begin / job->scale_cols : 0;
        float sums[CQ_MAX_CENTROIDS] = {0};
        for (int32_t i = begin; i < end; i++) sums[fit->indices[i]] += gradient[i];
        for (int32_t c = 0; c < job->n_centroids; c++) {
            centroids[book + c] += sums[c] * fit->scale * (job->scale_cols ? fit->group_scales[group] / 128.0f : 1.0f);
            if (job->scale_cols) groups[group] += sums[c] * fit->scale * (float)fit->centroids[book + c] / 128.0f;
        }
    }
}

int cq_clustered_gradient(const cq_clustering *job, const float *gradient, float *centroids, float *groups,
                          int32_t n_threads) {
    if (!cq_clustering_valid(job) || n_threads < 1) return CQ_ERR_ARGUMENT;
    const size_t n_centroids = (size_t)cq_n_codebooks(job) * job->n_centroids, n_groups = (size_t)cq_n_groups(job);
#pragma omp parallel for num_threads(n_threads)
    for (int32_t set = 0; set < cq_ceil_div(job->n_rows, job->codebook_rows); set++) {
        const int32_t first = set * job->codebook_rows;
        for (int32_t row = first; row < job->n_rows && row < first + job->codebook_rows; row++) {
            const cq_fit fit = cq_fit_of_row(job, row);
            row_gradient(job, &fit, gradient + (size_t)row * job->n_cols, centroids + set * n_centroids,
                         groups ? groups + row * n_groups : NULL);
        }
    }
    return CQ_OK;
}
