/* Vectors of four floats in plain C: the primitives of template/vectors.h. */
#ifndef CQ_PORTABLE_VECTORS_H
#define CQ_PORTABLE_VECTORS_H
#include <stdint.h>
#include <string.h>

#define CQ_LANES 4
#define CQ_TILE_VECS 2  /* 4 queries x 2 vectors of accumulators fit 16 registers of SSE2 */
#define CQ_SCORE_KEYS 2 /* as do 2 keys x 4 vectors of queries */
#define CQ_SCORE_VECS 4
typedef float vec __attribute__((vector_size(4 * CQ_LANES)));

static inline vec repeat_four(const float *p) { return (vec){p[0], p[1], p[2], p[3]}; }
static inline vec min_vec(vec a, vec b) {
    for (int32_t i = 0; i < CQ_LANES; i++) b[i] = a[i] < b[i] ? a[i] : b[i];
    return b;
}
static inline vec max_vec(vec a, vec b) {
    for (int32_t i = 0; i < CQ_LANES; i++) b[i] = a[i] > b[i] ? a[i] : b[i];
    return b;
}
static inline vec reciprocal(vec v) { return 1.0f / v; }
static inline float sum_lanes(vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
static inline void store_low_bytes(int8_t *out, vec v) {
    int32_t bits[CQ_LANES];
    memcpy(bits, &v, sizeof bits);
    for (int32_t i = 0; i < CQ_LANES; i++) out[i] = (int8_t)bits[i];
}
#endif
