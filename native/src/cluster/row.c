/* One row of a set with its codebooks fixed: amplitudes, assignments and the scale, each by least squares with the
 * others fixed. */
#include "cluster/row.h"
#include <math.h>

/* Rounds the amplitudes of all groups to the file's grid: u8 steps of the row's scale. */
static void set_scales(const cq_clustering *job, cq_set_row *r) {
    float top = 0;
    for (int32_t g = 0; g < cq_n_groups(job); g++) top = fmaxf(top, r->amplitude[g]);
    r->fit.scale = top;
    if (!job->scale_cols) return;
    r->fit.scale = top * (128.0f / 127.0f);
    for (int32_t g = 0; g < cq_n_groups(job); g++) {
        r->fit.group_scales[g] = (int8_t)(top > 0 ? lrintf(127.0f * (r->amplitude[g] / top)) : 0);
        r->amplitude[g] = r->fit.scale * ((float)r->fit.group_scales[g] / 128.0f);
    }
}

/* Columns [begin, end) of a group. */
typedef struct {
    int32_t begin, end;
} columns;

static columns group_columns(const cq_clustering *job, int32_t g) {
    const int32_t cols = job->scale_cols ? job->scale_cols : job->n_cols;
    return (columns){g * cols, cq_min((g + 1) * cols, job->n_cols)};
}

/* Start: each group's weighted root mean square. */
void cq_start_scales(const cq_clustering *job, cq_set_row *r) {
    for (int32_t g = 0; g < cq_n_groups(job); g++) {
        const columns group = group_columns(job, g);
        double sum = 0, total = 0;
#pragma omp simd reduction(+ : sum, total)
        for (int32_t i = group.begin; i < group.end; i++) {
            sum += (double)job->weight[i] * r->w[i] * r->w[i];
            total += (double)job->weight[i];
        }
        r->amplitude[g] = total > 0 ? (float)sqrt(sum / total) : 0;
    }
    set_scales(job, r);
}

/* Least squares of each group's amplitude with centroids and assignments fixed. */
void cq_refit_scales(const cq_clustering *job, cq_set_row *r) {
    for (int32_t g = 0; g < cq_n_groups(job); g++) {
        const columns group = group_columns(job, g);
        double wc = 0, cc = 0;
        for (int32_t begin = group.begin; begin < group.end; begin += CQ_BLOCK) {
            const int32_t end = cq_min(begin + CQ_BLOCK, group.end);
            const int8_t *centroids = r->fit.centroids + begin / job->codebook_cols * job->n_centroids;
#pragma omp simd reduction(+ : wc, cc)
            for (int32_t i = begin; i < end; i++) {
                const double c = centroids[r->fit.indices[i]], hc = job->weight[i] * c;
                wc += hc * r->w[i], cc += hc * c;
            }
        }
        r->amplitude[g] = wc > 0 ? (float)(wc / cc) : 0;
    }
    set_scales(job, r);
}

/* Nearest effective weight per element. */
void cq_assign_nearest(const cq_clustering *job, const float *w, cq_fit *f) {
    for (int32_t begin = 0; begin < job->n_cols; begin += CQ_BLOCK) {
        float w8[CQ_MAX_CENTROIDS], middle[CQ_MAX_CENTROIDS];
        int32_t end = begin + CQ_BLOCK < job->n_cols ? begin + CQ_BLOCK : job->n_cols;
        cq_effective_weights(job, f, begin, w8);
        for (int32_t c = 0; c + 1 < job->n_centroids; c++) middle[c] = f->scale * 0.5f * (w8[c] + w8[c + 1]);
        for (int32_t i = begin; i < end; i++) {
            int32_t index = 0;
            for (int32_t c = 0; c + 1 < job->n_centroids; c++) index += w[i] > middle[c];
            f->indices[i] = (uint8_t)index;
        }
    }
}

/* The best scale for the row's assignments, rounded to float, and its loss. */
void cq_fit_scale(const cq_clustering *job, const float *w, cq_fit *f) {
    double ww = 0, we = 0, ee = 0;
    for (int32_t begin = 0; begin < job->n_cols; begin += CQ_BLOCK) {
        float w8[CQ_MAX_CENTROIDS];
        cq_effective_weights(job, f, begin, w8);
        const int32_t end = cq_min(begin + CQ_BLOCK, job->n_cols);
#pragma omp simd reduction(+ : ww, we, ee)
        for (int32_t i = begin; i < end; i++) {
            const double e = w8[f->indices[i]], hw = (double)job->weight[i] * w[i], he = job->weight[i] * e;
            ww += hw * w[i], we += hw * e, ee += he * e;
        }
    }
    f->scale = we > 0 ? (float)(we / ee) : 0;
    f->loss = fmax(0, ww + f->scale * (f->scale * ee - 2 * we));
}
