/* TEMPLATE. One layer of the k-means dynamic program (kmeans.c), with vectors of doubles that any set compiles: for
 * every end i, where the last cluster best starts, given the best values with one cluster fewer.
 *
 * The best start grows with the end. So divide and conquer over every STRIDE-th end scans few starts for each, several
 * starts per vector; an end between two of these scans only the starts between theirs, several ends per vector. */
#ifndef CQ_KMEANS_LAYER_H
#define CQ_KMEANS_LAYER_H
#include "cluster_kernels.h"
#include <string.h>

typedef double stride_vec __attribute__((vector_size(8 * CQ_STRIDE)));
typedef double unaligned_stride_vec __attribute__((vector_size(8 * CQ_STRIDE), aligned(8), may_alias));
typedef int64_t stride_mask __attribute__((vector_size(8 * CQ_STRIDE)));

CQ_INLINE stride_vec load_stride(const double *p) { return *(const unaligned_stride_vec *)p; }
CQ_INLINE stride_mask select_lanes(stride_mask where, stride_mask a, stride_mask b) {
    return (a & where) | (b & ~where);
}

/* The greatest values so far and the starts they belong to, per lane. */
typedef struct {
    stride_vec value;
    stride_mask start;
} stride_best;

/* Takes up starts (lanes of j, or all the same) where `valid`, given the weights d0 and weighted values d1 of the last
 * cluster and the best values before it. */
CQ_INLINE void take_up(stride_best *top, stride_vec d0, stride_vec d1, stride_vec before, double tiny, stride_mask j,
                       stride_mask valid) {
    const stride_vec value = d1 * d1 / (d0 + tiny) + before;
    const stride_mask better = (value > top->value) & valid;
    top->value = (stride_vec)select_lanes(better, (stride_mask)value, (stride_mask)top->value);
    top->start = select_lanes(better, j, top->start);
}

/* One end i, whose best start lies in [first, last]. Of equal starts the first. */
static void split_end(const cq_kmeans *s, const cq_kmeans_layer *layer, int32_t i, int32_t first, int32_t last) {
    if (last > i - 1) last = i - 1;
    if (first < layer->fewer[i]) first = layer->fewer[i];
    stride_best top = {(stride_vec){0} - 1, (stride_mask){0} + first};
    stride_mask j = (stride_mask){0, 1, 2, 3, 4, 5, 6, 7} + first;
    for (int32_t start = first; start <= last; start += CQ_STRIDE, j += CQ_STRIDE)
        take_up(&top, s->s0[i] - load_stride(s->s0 + start), s->s1[i] - load_stride(s->s1 + start),
                load_stride(s->best + start), s->tiny, j, j <= last);
    int32_t arg = 0;
    for (int32_t lane = 1; lane < CQ_STRIDE; lane++) {
        const int better = top.value[lane] > top.value[arg];
        const int equal = top.value[lane] == top.value[arg] && top.start[lane] < top.start[arg];
        arg = better || equal ? lane : arg;
    }
    s->next[i] = top.value[arg], layer->split[i] = (uint16_t)top.start[arg];
}

/* The STRIDE ends from i on, whose best starts lie in [first, last]. */
static void split_stride(const cq_kmeans *s, const cq_kmeans_layer *layer, int32_t i, int32_t first, int32_t last) {
    const stride_vec s0 = load_stride(s->s0 + i), s1 = load_stride(s->s1 + i);
    const stride_mask end = (stride_mask){0, 1, 2, 3, 4, 5, 6, 7} + i;
    if (first < layer->fewer[i]) first = layer->fewer[i];
    stride_best top = {(stride_vec){0} - 1, (stride_mask){0} + first};
    for (int32_t j = first; j <= last; j++)
        take_up(&top, s0 - s->s0[j], s1 - s->s1[j], (stride_vec){0} + s->best[j], s->tiny, (stride_mask){0} + j,
                end > j);
    memcpy(s->next + i, &top.value, sizeof top.value);
    for (int32_t lane = 0; lane < CQ_STRIDE; lane++) layer->split[i + lane] = (uint16_t)top.start[lane];
}

/* The ends lo + STRIDE * t for t in [t_lo, t_hi]. */
static void split_anchors(const cq_kmeans *s, const cq_kmeans_layer *layer, int32_t t_lo, int32_t t_hi, int32_t first,
                          int32_t last) {
    while (t_lo <= t_hi) {
        const int32_t t = t_lo + (t_hi - t_lo) / 2, i = layer->lo + CQ_STRIDE * t;
        split_end(s, layer, i, first, last);
        split_anchors(s, layer, t_lo, t - 1, first, layer->split[i]);
        t_lo = t + 1, first = layer->split[i];
    }
}

static void kmeans_layer(const cq_kmeans *s, const cq_kmeans_layer *layer) {
    const int32_t lo = layer->lo, hi = layer->hi, n_strides = (hi - lo + 1) / CQ_STRIDE;
    split_end(s, layer, hi, layer->first, hi - 1);
    const int32_t last = layer->split[hi];
    split_anchors(s, layer, 0, n_strides - 1, layer->first, last);
    for (int32_t t = 0; t + 1 < n_strides; t++) {
        const int32_t i = lo + CQ_STRIDE * t;
        split_stride(s, layer, i, layer->split[i], layer->split[i + CQ_STRIDE]);
    }
    for (int32_t i = n_strides ? lo + CQ_STRIDE * (n_strides - 1) + 1 : lo; i < hi; i++)
        split_end(s, layer, i, i > lo ? layer->split[i - 1] : layer->first, last);
}
#endif
