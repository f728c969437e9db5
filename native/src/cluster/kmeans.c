/* Exact weighted k-means of numbers: sort, prefix sums, then dynamic programming over the sorted values with divide and
 * conquer over the monotone split points, O(k n log n) (Wang & Song, Ckmeans.1d.dp, R Journal 2011; Gronlund et al.,
 * arXiv 1701.07204). With S0 and S1 the sums of weights and of weighted values of a cluster, its squared error is
 * sum(q v^2) - S1^2 / S0, so the program maximizes the sum of S1^2 / S0.
 *
 * Of more than CQ_KMEANS_CUTS values, clusters end only at every second, third, ... one: half the time for a start that
 * costs 1.5% more at 576 columns, and that the rounds of cluster.c bring to the same loss or below
 * (docs/decisions/clustering.md).
 */
#include "cluster/kmeans.h"
#include "cluster/carve.h"

enum { RADIX_BITS = 11, RADIX = 1 << RADIX_BITS };

size_t cq_kmeans_carve(cq_kmeans *s, uint8_t *base, int32_t n) {
    size_t m = (size_t)n + 1 + CQ_STRIDE, used = 0;
    cq_take(base, &used, &s->key, 4 * m);
    cq_take(base, &used, &s->key_tmp, 4 * m);
    cq_take(base, &used, &s->q, 4 * m);
    cq_take(base, &used, &s->q_tmp, 4 * m);
    cq_take(base, &used, &s->s0, 8 * m);
    cq_take(base, &used, &s->s1, 8 * m);
    cq_take(base, &used, &s->best, 8 * m);
    cq_take(base, &used, &s->next, 8 * m);
    const size_t cuts = (size_t)(n < CQ_KMEANS_CUTS ? n : CQ_KMEANS_CUTS) + 1 + CQ_STRIDE;
    return cq_take(base, &used, &s->split, 2 * cuts * CQ_MAX_CENTROIDS);
}

/* ---- sorting ---- */

/* Inverse of cq_sortable. */
static float unsortable(uint32_t key) {
    uint32_t bits = key ^ ((key & 0x80000000u) ? 0x80000000u : 0xffffffffu);
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Sorts key[n], carrying q along: three stable counting passes of 11 bits. An odd number: the result is swapped in. */
static void sort_pairs(cq_kmeans *s, int32_t n) {
    for (int shift = 0; shift < 32; shift += RADIX_BITS) {
        int32_t start[RADIX + 1] = {0};
        for (int32_t i = 0; i < n; i++) start[((s->key[i] >> shift) & (RADIX - 1)) + 1]++;
        for (int32_t b = 0; b < RADIX; b++) start[b + 1] += start[b];
        for (int32_t i = 0; i < n; i++) {
            int32_t at = start[(s->key[i] >> shift) & (RADIX - 1)]++;
            s->key_tmp[at] = s->key[i], s->q_tmp[at] = s->q[i];
        }
        uint32_t *key = s->key;
        float *q = s->q;
        s->key = s->key_tmp, s->key_tmp = key, s->q = s->q_tmp, s->q_tmp = q;
    }
}

/* ---- exact k-means ---- */

static double gain(const cq_kmeans *s, int32_t from, int32_t to) {
    double s0 = s->s0[to] - s->s0[from], s1 = s->s1[to] - s->s1[from];
    return s0 > 0 ? s1 * s1 / s0 : 0;
}

/* Leaves at most CQ_KMEANS_CUTS of the n places where a cluster may end, evenly spaced; returns how many. */
static int32_t merge_cuts(cq_kmeans *s, int32_t n) {
    int32_t step = cq_ceil_div(n, CQ_KMEANS_CUTS), cuts = cq_ceil_div(n, step);
    if (step == 1) return n;
    for (int32_t i = 1; i <= cuts; i++) {
        int32_t at = i < cuts ? i * step : n;
        s->s0[i] = s->s0[at], s->s1[i] = s->s1[at], s->key[i - 1] = s->key[at - 1];
    }
    return cuts;
}

void cq_kmeans_solve(const cq_cluster_kernels *kernels, cq_kmeans *s, int32_t n, int32_t k, double *centroids) {
    sort_pairs(s, n);
    s->s0[0] = s->s1[0] = 0;
    for (int32_t i = 0; i < n; i++) {
        s->s0[i + 1] = s->s0[i] + (double)s->q[i];
        s->s1[i + 1] = s->s1[i] + (double)s->q[i] * unsortable(s->key[i]);
    }
    n = merge_cuts(s, n);
    s->tiny = 1e-20 * s->s0[n] + 1e-300;
    int32_t clusters = k < n ? k : n;
    for (int32_t i = 0; i <= n; i++) s->best[i] = gain(s, 0, i), s->split[i] = 0;
    for (int32_t c = 1; c < clusters; c++) {
        int32_t lo = c + 1 == clusters ? n : c + 1; /* the last cluster always ends at n */
        uint16_t *split = s->split + (size_t)c * (n + 1);
        kernels->kmeans_layer(s, &(cq_kmeans_layer){c, lo, n, split - (n + 1), split});
        double *swap = s->best;
        s->best = s->next, s->next = swap;
    }
    int32_t end = n;
    for (int32_t c = clusters - 1; c >= 0; c--) {
        int32_t begin = c ? s->split[(size_t)c * (n + 1) + end] : 0;
        double s0 = s->s0[end] - s->s0[begin];
        centroids[c] = s0 > 0 ? (s->s1[end] - s->s1[begin]) / s0 : unsortable(s->key[begin]);
        end = begin;
    }
    for (int32_t c = clusters; c < k; c++) centroids[c] = centroids[clusters - 1];
}
