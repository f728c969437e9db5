/* Codebooks of rows under the Hessian H of the inputs, assignments fixed: with P having a column per centroid,
 * the normal equations (P^T H P) d = -P^T H r give what to add to the centroids (LNQ, arXiv 2505.07004).
 *
 * P^T H P is summed a block of columns at a time, for all rows of a batch, from a copy that stays in the caches (in H
 * itself rows are apart by powers of two): by centroid over the rows of H, then by centroid over the block's columns. H
 * is symmetric, so rows beyond the block are left out and the block's own count half; the result is added to its
 * transpose. */
#include "cluster/refit.h"
#include <math.h>

#define RIDGE 1e-6 /* relative to the diagonal: centroids that no column uses stay where they are */

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

/* Sorts a row's columns [begin, end), counted from `begin`, by centroid; first [n_centroids + 1]. */
static void sort_columns(const cq_batch *b, cq_descent_row *s, int32_t begin, int32_t end, int32_t *first) {
    const int32_t k = b->job->n_centroids;
    int32_t next[CQ_MAX_CENTROIDS + 1] = {0};
    for (int32_t i = begin; i < end; i++) next[s->fit.indices[i] + 1]++;
    for (int32_t c = 0; c < k; c++) next[c + 1] += next[c];
    memcpy(first, next, sizeof(int32_t) * (size_t)(k + 1));
    for (int32_t i = begin; i < end; i++) s->columns[next[s->fit.indices[i]]++] = i - begin;
}

/* Adds what a row's columns [begin, end) of the block bring to its set's equations. sums: by centroid over the rows. */
static void add_to_equations(const cq_batch *b, cq_descent_row *set, const cq_descent_row *s, int32_t begin,
                             int32_t end, const float (*sums)[CQ_BLOCK]) {
    const int32_t k = b->job->n_centroids;
    for (int32_t i = begin; i < end; i++) {
        const double step = (double)s->weight * s->step[i];
        double *normal = set->normal + s->fit.indices[i] * k;
        for (int32_t c = 0; c < k; c++) normal[c] += step * sums[c][i - begin];
        set->slope[s->fit.indices[i]] += step * s->state[i];
    }
}

/* The columns [begin, end) of one codebook and of one square of the matrix. */
static void add_square(const cq_batch *b, int32_t begin, int32_t end) {
    int32_t first[CQ_ROWS][CQ_MAX_CENTROIDS + 1];
    for (int32_t r = 0; r < b->n; r++) sort_columns(b, b->rows + r, begin, end, first[r]);
    for (int32_t block = begin; block < end; block += CQ_BLOCK) {
        const int32_t block_end = cq_min(block + CQ_BLOCK, end);
        float (*hessian_rows)[CQ_BLOCK] = b->rows->hessian_rows;
        for (int32_t i = begin; i < block_end; i++)
            memcpy(hessian_rows[i - begin], cq_matrix_at(b, i, block), 4 * (size_t)(block_end - block));
        for (int32_t r = 0; r < b->n; r++) {
            float sums[CQ_MAX_CENTROIDS][CQ_BLOCK];
            cq_descent_row *s = b->rows + r, *set = s - r % b->job->codebook_rows;
            if (!s->active) continue;
            const cq_centroid_columns columns = {b->job->n_centroids,
                                                 block - begin,
                                                 block_end - begin,
                                                 first[r],
                                                 s->columns,
                                                 s->step + begin,
                                                 (const float (*)[CQ_BLOCK])hessian_rows};
            b->kernels->sum_by_centroid(&columns, sums);
            add_to_equations(b, set, s, block, block_end, (const float (*)[CQ_BLOCK])sums);
        }
    }
}

/* Real centroids of a set's codebook, into target: they minimize the loss with everything else fixed. */
static void solve_codebook(const cq_batch *b, cq_descent_row *set, int32_t book) {
    const int32_t k = b->job->n_centroids;
    double a[CQ_MAX_CENTROIDS * CQ_MAX_CENTROIDS], d[CQ_MAX_CENTROIDS], top = 0;
    for (int32_t i = 0; i < k; i++) {
        for (int32_t j = 0; j < k; j++) a[i * k + j] = set->normal[i * k + j] + set->normal[j * k + i];
        top = fmax(top, a[i * k + i]);
    }
    for (int32_t c = 0; c < k; c++) a[c * k + c] += RIDGE * top + 1e-30, d[c] = -set->slope[c];
    solve(a, d, k);
    for (int32_t c = 0; c < k; c++) set->target[book * k + c] = set->fit.centroids[book * k + c] + d[c];
}

/* Rounds a set's targets to int8, the largest to 127. */
static void round_centroids(const cq_batch *b, cq_descent_row *set) {
    int32_t n = cq_n_codebooks(b->job) * b->job->n_centroids;
    double top = 0;
    for (int32_t i = 0; i < n; i++) top = fmax(top, fabs(set->target[i]));
    if (top == 0) return;
    for (cq_descent_row *s = set; s < cq_end_of_set(b, set); s++) s->fit.scale = (float)(s->fit.scale * top / 127.0);
    for (int32_t i = 0; i < n; i++) set->fit.centroids[i] = (int8_t)lrint(set->target[i] * 127.0 / top);
}

static void fill_steps(const cq_batch *b, cq_descent_row *s) {
    for (int32_t i = 0; i < b->job->n_cols; i++)
        s->step[i] = b->job->scale_cols ? s->fit.scale * (float)s->fit.group_scales[i / b->job->scale_cols] / 128.0f
                                        : s->fit.scale;
}

void cq_refit_codebooks(const cq_batch *b) {
    const int32_t n = b->job->n_cols, cols = b->job->codebook_cols, k = b->job->n_centroids;
    cq_descent_row *end_of_rows = b->rows + b->n;
    for (cq_descent_row *s = b->rows; s < end_of_rows; s++) fill_steps(b, s);
    for (int32_t book = 0; book < cq_n_codebooks(b->job); book++) {
        const int32_t end = cq_min((book + 1) * cols, n);
        for (cq_descent_row *set = b->rows; set < end_of_rows; set += b->job->codebook_rows)
            memset(set->normal, 0, 8 * (size_t)(k * k)), memset(set->slope, 0, 8 * (size_t)k);
        for (int32_t begin = book * cols; begin < end; begin = cq_square_end(b, begin))
            add_square(b, begin, cq_min(end, cq_square_end(b, begin)));
        for (cq_descent_row *set = b->rows; set < end_of_rows; set += b->job->codebook_rows)
            if (set->active) solve_codebook(b, set, book);
    }
    for (cq_descent_row *set = b->rows; set < end_of_rows; set += b->job->codebook_rows)
        if (set->active) round_centroids(b, set);
}
