/* What fine-tuning needs of a clustered matrix: its float weights, and a gradient of them carried over to centroids,
 * group scales and row scales. Rounding is passed through: the derivatives are those of centroid * group / 128 * scale.
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

/* Sums over one row; centroids, groups and scale are zero before. */
static void row_gradient(const cq_clustering *job, const cq_fit *fit, const float *gradient, float *centroids,
                         float *groups, float *scale) {
    for (int32_t begin = 0; begin < job->n_cols; begin += CQ_BLOCK) {
        const int32_t end = begin + CQ_BLOCK < job->n_cols ? begin + CQ_BLOCK : job->n_cols;
        const int32_t book = begin / job->codebook_cols * job->n_centroids;
        const int32_t group = job->scale_cols ? begin / job->scale_cols : 0;
        float w8[CQ_MAX_CENTROIDS], sums[CQ_MAX_CENTROIDS] = {0};
        cq_effective_weights(job, fit, begin, w8);
        for (int32_t i = begin; i < end; i++) sums[fit->indices[i]] += gradient[i];
        for (int32_t c = 0; c < job->n_centroids; c++) {
            *scale += sums[c] * w8[c];
            centroids[book + c] += sums[c] * fit->scale * (job->scale_cols ? fit->group_scales[group] / 128.0f : 1.0f);
            if (job->scale_cols) groups[group] += sums[c] * fit->scale * (float)fit->centroids[book + c] / 128.0f;
        }
    }
}

int cq_clustered_gradient(const cq_clustering *job, const float *gradient, float *centroids, float *groups,
                          float *scales, int32_t n_threads) {
    if (!cq_clustering_valid(job) || n_threads < 1) return CQ_ERR_ARGUMENT;
    const size_t n_centroids = (size_t)cq_n_codebooks(job) * job->n_centroids, n_groups = (size_t)cq_n_groups(job);
#pragma omp parallel for num_threads(n_threads)
    for (int32_t row = 0; row < job->n_rows; row++) {
        const cq_fit fit = cq_fit_of_row(job, row);
        row_gradient(job, &fit, gradient + (size_t)row * job->n_cols, centroids + row * n_centroids,
                     groups ? groups + row * n_groups : NULL, scales + row);
    }
    return CQ_OK;
}
