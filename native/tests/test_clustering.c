/* The inner loops of clustering, of which converted files depend on every instruction set, against loops written here.
 */
#include "check.h"
#include "cluster_kernels.h"

static const double EPS = 0x1p-24;

static void fill(float *x, int32_t n, float scale) {
    for (int32_t i = 0; i < n; i++) x[i] = scale * random_float();
}

static void check_hadamard(int32_t n, int32_t block) {
    guarded memory = guarded_new((size_t)n * 4);
    float *x = memory.data, *before = malloc((size_t)n * 4);
    fill(x, n, 2);
    memcpy(before, x, (size_t)n * 4);
    cq_kernels_current()->hadamard(x, n, block);
    for (int32_t i = 0; i < n; i++) {
        double want = 0, size = 0;
        const float *from = before + i / block * block;
        for (int32_t j = 0; j < block; j++) {
            want += __builtin_parity((unsigned)(i % block & j)) ? -from[j] : from[j];
            size += fabs((double)from[j]);
        }
        CHECK(fabs(x[i] - want / sqrt(block)) <= 10 * EPS * size, "hadamard %d of %d [%d]", block, n, i);
    }
    free(before);
    guarded_free(memory);
}

static void check_rank_update(int32_t n_cols, int32_t n) {
    guarded memory = guarded_new((size_t)n_cols * (size_t)n * 4),
            rows_memory = guarded_new((size_t)CQ_ROWS * (size_t)n * 4);
    float change[CQ_BLOCK][CQ_ROWS], *matrix = memory.data, *rows[CQ_ROWS],
                                     *before = malloc((size_t)CQ_ROWS * (size_t)n * 4);
    for (int32_t r = 0; r < CQ_ROWS; r++) rows[r] = (float *)rows_memory.data + (size_t)r * (size_t)n;
    fill(change[0], CQ_BLOCK * CQ_ROWS, 1), fill(matrix, n_cols * n, 1), fill(rows[0], CQ_ROWS * n, 1);
    memcpy(before, rows[0], (size_t)CQ_ROWS * (size_t)n * 4);
    cq_cluster_kernels_current()->rank_update((const float (*)[CQ_ROWS])change, n_cols, matrix, n, rows, n);
    for (int32_t r = 0; r < CQ_ROWS; r++)
        for (int32_t j = 0; j < n; j++) {
            double want = before[r * n + j], size = fabs(want);
            for (int32_t i = 0; i < n_cols; i++) {
                const double product = (double)change[i][r] * matrix[i * n + j];
                want += product, size += fabs(product);
            }
            CHECK(fabs(rows[r][j] - want) <= (n_cols + 2) * EPS * size, "rank_update %d x %d [%d][%d]", n_cols, n, r,
                  j);
        }
    free(before);
    guarded_free(memory), guarded_free(rows_memory);
}

static int32_t nearest(const cq_column_block *b, int32_t r, float wanted) {
    int32_t best = 0;
    for (int32_t c = 1; c < b->n_values; c++)
        if (fabsf(wanted - b->values[c][r]) < fabsf(wanted - b->values[best][r])) best = c;
    return best;
}

/* One column at a time, so that the choices are followed exactly: a column's state is what the kernel left there. */
static void check_column_block(int32_t n_values, int32_t feedback) {
    static float matrix[CQ_BLOCK * CQ_BLOCK];
    cq_column_block b = {.n_cols = CQ_BLOCK, .n_values = n_values, .matrix = matrix, .stride = CQ_BLOCK}, was;
    fill(matrix, CQ_BLOCK * CQ_BLOCK, 0.1f), fill(b.values[0], CQ_MAX_CENTROIDS * CQ_ROWS, 1);
    fill(b.state[0], CQ_BLOCK * CQ_ROWS, 1), fill(b.value[0], CQ_BLOCK * CQ_ROWS, 1);
    for (int32_t i = 0; i < CQ_BLOCK; i++) matrix[i * CQ_BLOCK + i] = 1.0f + 0.1f * (float)(i % 7);
    was = b;
    b.forward = feedback;
    cq_cluster_kernels_current()->descend_block(&b);
    for (int32_t r = 0; r < CQ_ROWS; r++) {
        double state[CQ_BLOCK];
        for (int32_t i = 0; i < CQ_BLOCK; i++) state[i] = was.state[i][r];
        for (int32_t i = 0; i < CQ_BLOCK; i++) {
            const double pivot = matrix[i * CQ_BLOCK + i];
            const double wanted = was.value[i][r] - state[i] / pivot;
            const int32_t chosen = b.index[i][r], best = nearest(&b, r, (float)wanted);
            const double loss = fabs(wanted - b.values[chosen][r]) - fabs(wanted - b.values[best][r]);
            CHECK(chosen >= 0 && chosen < n_values && loss <= 1e-5, "column %d row %d: index %d", i, r, chosen);
            const double step = b.values[chosen][r] - was.value[i][r];
            CHECK(fabs(b.change[i][r] - step) <= 1e-5, "column %d row %d: change %g", i, r, (double)b.change[i][r]);
            for (int32_t j = feedback ? i + 1 : 0; j < CQ_BLOCK; j++) state[j] += step * matrix[i * CQ_BLOCK + j];
        }
        for (int32_t i = 0; i < CQ_BLOCK && !feedback; i++)
            CHECK(fabs(b.state[i][r] - state[i]) <= 1e-4, "gradient %d row %d", i, r);
    }
}

/* The choices of a column against all 2^n paths through each set. */
static void check_trellis(int32_t n_values, int32_t n_rows, int32_t codebook_rows) {
    cq_column_block b = {
        .n_cols = 5, .n_values = n_values, .n_rows = n_rows, .codebook_rows = codebook_rows, .trellis = 1};
    fill(b.values[0], CQ_MAX_CENTROIDS * CQ_ROWS, 1), fill(b.state[0], CQ_BLOCK * CQ_ROWS, 1);
    for (int32_t r = 0; r < CQ_ROWS; r++) b.weight[r] = 0.1f * (float)random_between(1, 100);
    cq_cluster_kernels_current()->nearest_block(&b);
    const int32_t subset_size = n_values / 4;
    for (int32_t i = 0; i < b.n_cols; i++)
        for (int32_t first = 0; first < n_rows; first += codebook_rows) {
            const int32_t n = n_rows - first < codebook_rows ? n_rows - first : codebook_rows;
            double best = INFINITY, got = 0;
            int32_t allowed = 0;
            for (int32_t u = 0; u < 1 << n; u++) {
                double total = 0;
                int32_t same = 1;
                for (int32_t r = 0; r < n; r++) {
                    const int32_t u0 = u >> r, u1 = u >> (r + n - 1) % n, u2 = u >> (r + 2 * n - 2) % n;
                    const int32_t subset = ((u0 ^ u2) & 1) + 2 * (u1 & 1), row = first + r;
                    double nearest_error = INFINITY;
                    for (int32_t c = subset * subset_size; c < (subset + 1) * subset_size; c++)
                        nearest_error = fmin(nearest_error, fabs((double)b.state[i][row] - b.values[c][row]));
                    total += b.weight[row] * nearest_error * nearest_error;
                    same &= b.index[i][row] / subset_size == subset;
                }
                best = fmin(best, total);
                allowed |= same;
            }
            for (int32_t row = first; row < first + n; row++) {
                const double error = b.state[i][row] - (double)b.values[b.index[i][row]][row];
                got += b.weight[row] * error * error;
                CHECK(b.value[i][row] == b.values[b.index[i][row]][row], "trellis: value of column %d row %d", i, row);
            }
            CHECK(allowed && fabs(got - best) <= 1e-5 * (best + 1e-3),
                  "trellis of %d, %d rows in sets of %d: %g, best %g", n_values, n_rows, codebook_rows, got, best);
        }
}

/* Sums of a block of columns by centroid against loops; rows from `begin` on count half, from `end` on nothing.
 */
static void check_sum_by_centroid(int32_t n_centroids, int32_t n, int32_t begin, int32_t end) {
    float (*rows)[CQ_BLOCK] = malloc((size_t)n * sizeof *rows), *step = malloc((size_t)n * 4);
    float sums[CQ_MAX_CENTROIDS][CQ_BLOCK];
    int32_t columns[256], first[CQ_MAX_CENTROIDS + 1], used = 0;
    fill(rows[0], n * CQ_BLOCK, 1), fill(step, n, 1);
    for (int32_t c = 0; c < n_centroids; c++) { /* every third centroid has no column */
        first[c] = used;
        for (int32_t i = 0; i < n; i++)
            if (i * 7 % n_centroids == c && c % 3 != 2) columns[used++] = i;
    }
    first[n_centroids] = used;
    const cq_centroid_columns of = {n_centroids, begin, end, first, columns, step, (const float (*)[CQ_BLOCK])rows};
    cq_cluster_kernels_current()->sum_by_centroid(&of, sums);
    for (int32_t c = 0; c < n_centroids; c++)
        for (int32_t j = 0; j < CQ_BLOCK; j++) {
            double want = 0;
            for (int32_t p = first[c]; p < first[c + 1]; p++)
                if (columns[p] < end)
                    want += (columns[p] < begin ? 1 : 0.5) * (double)step[columns[p]] * rows[columns[p]][j];
            CHECK(fabs(sums[c][j] - want) <= 1e-5, "sum of centroid %d of %d, column %d", c, n_centroids, j);
        }
    free(rows), free(step);
}

/* Every end's split against all starts. */
static void check_kmeans_layer(int32_t n, int32_t first) {
    const size_t m = (size_t)n + 1 + CQ_STRIDE;
    double *s0 = calloc(m, 8), *s1 = calloc(m, 8), *best = calloc(m, 8), *next = calloc(m, 8);
    uint16_t *fewer = calloc(m, 2), *split = calloc(m, 2);
    for (int32_t i = 0; i < n; i++) { /* sorted values, some of weight zero */
        const double weight = i % 5 == 3 ? 0 : 0.5 + random_between(0, 1000) * 1e-3;
        s0[i + 1] = s0[i] + weight, s1[i + 1] = s1[i] + weight * (i + random_between(0, 900) * 1e-3 - n / 2.0);
    }
    for (int32_t i = 1; i <= n; i++) best[i] = s0[i] > 0 ? s1[i] * s1[i] / s0[i] : 0;
    const cq_kmeans s = {.s0 = s0, .s1 = s1, .best = best, .next = next, .tiny = 1e-20 * s0[n]};
    const cq_kmeans_layer layer = {first, first + 1, n, fewer, split};
    cq_cluster_kernels_current()->kmeans_layer(&s, &layer);
    for (int32_t i = first + 1; i <= n; i++) {
        double top = -1;
        for (int32_t j = first; j < i; j++) {
            const double w = s0[i] - s0[j], v = s1[i] - s1[j];
            top = fmax(top, best[j] + (w > 0 ? v * v / w : 0));
        }
        CHECK(split[i] >= first && split[i] < i && fabs(next[i] - top) <= 1e-9 * top, "kmeans n %d end %d: %g, want %g",
              n, i, next[i], top);
    }
    free(s0), free(s1), free(best), free(next), free(fewer), free(split);
}

void test_clustering(void) {
    for (int32_t block = 2; block <= 128; block *= 2) check_hadamard(384, block);
    for (int32_t n = 1; n <= 130; n += 43) check_rank_update(1 + n % 64, n);
    for (int32_t n_values = 1; n_values <= CQ_MAX_CENTROIDS; n_values += 5)
        for (int32_t feedback = 0; feedback < 2; feedback++) check_column_block(n_values, feedback);
    for (int32_t n_values = 4; n_values <= CQ_MAX_CENTROIDS; n_values *= 2)
        for (int32_t n_rows = 1; n_rows <= CQ_ROWS; n_rows++)
            for (int32_t set = 1; set <= CQ_MAX_CODEBOOK_ROWS; set *= 2) check_trellis(n_values, n_rows, set);
    for (int32_t n_centroids = 1; n_centroids <= CQ_MAX_CENTROIDS; n_centroids += 5)
        check_sum_by_centroid(n_centroids, 200, 64, 128), check_sum_by_centroid(n_centroids, 200, 128, 168);
    for (int32_t n = 2; n < 200; n += 7) check_kmeans_layer(n, 1), check_kmeans_layer(n, n / 2);
}
