/* One row's codebooks and assignments, shared by the two ways to choose them: cluster.c and descent.c. */
#ifndef CQ_FIT_H
#define CQ_FIT_H
#include "kernels.h"
#include <string.h>

typedef struct {
    float scale;
    uint8_t *indices;
    int8_t *centroids, *group_scales; /* group_scales NULL: none */
    double loss;
} cq_fit;

static inline int32_t cq_n_codebooks(const cq_clustering *job) { return cq_ceil_div(job->n_cols, job->codebook_cols); }

static inline int32_t cq_n_groups(const cq_clustering *job) {
    return job->scale_cols ? cq_ceil_div(job->n_cols, job->scale_cols) : 1;
}

/* The row's part of the job's output arrays; rows of one set share their centroids. */
static inline cq_fit cq_fit_of_row(const cq_clustering *job, int32_t row) {
    const size_t book = (size_t)(row / job->codebook_rows) * cq_n_codebooks(job);
    return (cq_fit){job->scales[row], job->indices + (size_t)row * job->n_cols,
                    job->centroids + book * job->n_centroids,
                    job->scale_cols ? job->group_scales + (size_t)row * cq_n_groups(job) : NULL, job->loss[row]};
}

static inline void cq_fit_copy(const cq_clustering *job, cq_fit *to, const cq_fit *from) {
    to->scale = from->scale, to->loss = from->loss;
    memcpy(to->indices, from->indices, (size_t)job->n_cols);
    memcpy(to->centroids, from->centroids, (size_t)cq_n_codebooks(job) * job->n_centroids);
    if (job->scale_cols) memcpy(to->group_scales, from->group_scales, (size_t)cq_n_groups(job));
}

/* The effective int8 weights of the codebook at one column. */
static inline void cq_effective_weights(const cq_clustering *job, const cq_fit *fit, int32_t col, float *w8) {
    const int8_t *c = fit->centroids + col / job->codebook_cols * job->n_centroids;
    int32_t scale = job->scale_cols ? fit->group_scales[col / job->scale_cols] : 128;
    for (int32_t i = 0; i < job->n_centroids; i++) w8[i] = (float)((c[i] * scale + 64) >> 7);
}

static inline int cq_clustering_valid(const cq_clustering *job) {
    return job->n_rows >= 0 && job->n_cols > 0 && job->n_cols <= CQ_MAX_COLS && job->n_centroids > 0 &&
           job->n_centroids <= CQ_MAX_CENTROIDS && job->codebook_cols > 0 && job->codebook_cols % CQ_BLOCK == 0 &&
           job->scale_cols >= 0 && job->scale_cols % CQ_BLOCK == 0 && job->codebook_rows > 0 &&
           CQ_MAX_CODEBOOK_ROWS % job->codebook_rows == 0 && (!job->trellis || job->n_centroids % 4 == 0);
}
#endif
