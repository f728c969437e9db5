/* The float weights that a clustering stands for. */
#include "cluster/fit.h"

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
