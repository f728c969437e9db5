/* One row of a set with its codebooks fixed (row.c). */
#ifndef CQ_ROW_H
#define CQ_ROW_H
#include "cluster/fit.h"

/* One row at work. */
typedef struct {
    const float *w;
    float weight;     /* what its loss counts beside the others' of its set */
    float *amplitude; /* [n_groups]: real scale of each group */
    cq_fit fit;       /* its centroids are the set's */
} cq_set_row;

static inline int32_t cq_group_of(const cq_clustering *job, int32_t col) {
    return job->scale_cols ? col / job->scale_cols : 0;
}

/* Amplitudes to start from: each group's weighted root mean square. */
void cq_start_scales(const cq_clustering *job, cq_set_row *r);

/* Least squares of each group's amplitude with centroids and assignments fixed. */
void cq_refit_scales(const cq_clustering *job, cq_set_row *r);

/* The nearest effective weight for each of w [n_cols]. */
void cq_assign_nearest(const cq_clustering *job, const float *w, cq_fit *f);

/* The best scale for the row's assignments, rounded to float, and its loss. */
void cq_fit_scale(const cq_clustering *job, const float *w, cq_fit *f);
#endif
