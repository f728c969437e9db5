/* Weighted 1-D k-means (kmeans.c), exact for up to CQ_KMEANS_CUTS values. The caller owns the workspace it needs. */
#ifndef CQ_KMEANS_H
#define CQ_KMEANS_H
#include "cluster_kernels.h"
#include <string.h>

enum { CQ_KMEANS_CUTS = 512 };

/* Floats as unsigned integers of the same order: negative values have all bits flipped, the others the sign bit. */
static inline uint32_t cq_sortable(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

/* Places a workspace for up to n values at base; returns its bytes. */
size_t cq_kmeans_carve(cq_kmeans *s, uint8_t *base, int32_t n);

/* The k best centroids, ascending, of the n pairs in key and q; of fewer than k pairs, the last repeats. */
void cq_kmeans_solve(const cq_cluster_kernels *kernels, cq_kmeans *s, int32_t n, int32_t k, double *centroids);
#endif
