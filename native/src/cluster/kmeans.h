/* Weighted 1-D k-means (kmeans.c), exact for up to CQ_KMEANS_CUTS values, and the workspace it needs, which the caller
 * owns. */
#ifndef CQ_KMEANS_H
#define CQ_KMEANS_H
#include "kernels.h"
#include <string.h>

enum { CQ_STRIDE = 8, CQ_KMEANS_CUTS = 512 };

/* Arrays of n + 1 elements, and CQ_STRIDE more that may be read but do not count; split: [CQ_MAX_CENTROIDS] of the
 * cuts. */
typedef struct cq_kmeans {
    uint32_t *key, *key_tmp; /* values as sortable integers: cq_sortable */
    float *q, *q_tmp;        /* their weights, >= 0 */
    double *s0, *s1;         /* sums of weights and of weighted values up to each end */
    double *best, *next;     /* per end: the greatest sum of gains with one cluster fewer, and with this one */
    double tiny;             /* added to a cluster's weight, which may be 0 */
    uint16_t *split;         /* per number of clusters and end: where the last cluster starts */
} cq_kmeans;

/* The ends lo..hi of one layer, whose last cluster starts at `first` or later; fewer: split of the layer before, a
 * lower bound too. */
typedef struct cq_kmeans_layer {
    int32_t first, lo, hi;
    const uint16_t *fewer;
    uint16_t *split;
} cq_kmeans_layer;

/* Floats as unsigned integers of the same order: negative values have all bits flipped, the others the sign bit. */
static inline uint32_t cq_sortable(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

/* Points `field` at the next 64-byte aligned part of base (NULL: only counts); returns the bytes used so far. */
static inline size_t cq_take(uint8_t *base, size_t *used, void *field, size_t bytes) {
    uint8_t *at = base ? base + *used : NULL;
    memcpy(field, &at, sizeof at);
    return *used += (bytes + 63) & ~(size_t)63;
}

/* Places a workspace for up to n values at base; returns its bytes. */
size_t cq_kmeans_carve(cq_kmeans *s, uint8_t *base, int32_t n);

/* The k best centroids, ascending, of the n pairs in key and q; of fewer than k pairs, the last repeats. */
void cq_kmeans_solve(const cq_kernels *kernels, cq_kmeans *s, int32_t n, int32_t k, double *centroids);
#endif
