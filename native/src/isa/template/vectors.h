/* TEMPLATE. What generic C needs of a vector of floats, over the primitives of an instruction set's `<set>_vectors.h`,
 * which is included before this and defines:
 *
 *   CQ_LANES, vec     floats per vector: 4, 8 or 16; and a vector_size type of that many
 *   repeat_four(p)    four floats at p, over and over
 *   min_vec, max_vec  elementwise; where the second operand is NaN, NaN
 *   reciprocal(v)     1 / v within 2 ulp
 *   sum_lanes(v)      the sum of its lanes
 *   store_low_bytes(out, v)   the lowest byte of each float
 *   CQ_TILE_VECS, CQ_SCORE_KEYS, CQ_SCORE_VECS   register tiles of attention.h */
#ifndef CQ_VECTORS_H
#define CQ_VECTORS_H
#include "kernels.h"
#include <math.h>
#include <string.h>

typedef float unaligned_vec __attribute__((vector_size(4 * CQ_LANES), aligned(4), may_alias));

CQ_INLINE vec load_vec(const float *p) { return *(const unaligned_vec *)p; }
CQ_INLINE void store_vec(float *p, vec v) { *(unaligned_vec *)p = v; }

typedef int32_t int_vec __attribute__((vector_size(4 * CQ_LANES)));
typedef uint32_t uint_vec __attribute__((vector_size(4 * CQ_LANES)));

CQ_INLINE vec all_lanes(float value) { return value - (vec){0}; }

/* exp(x) within 2 ulp for x in [-87, 88]; outside it is clamped to exp of the nearer end, NaN stays NaN. Written with
 * vectors, as compilers turn the clamps of a scalar loop into branches.
 *
 * x = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 leaves the integer n in the low bits of the float, from where
 * a shift moves it into the exponent: no float-to-int conversion, which NaN would make undefined. */
CQ_INLINE vec exp_vec(vec x) {
    x = min_vec(all_lanes(88.0f), max_vec(all_lanes(-87.0f), x));
    const vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f; /* ln 2 in two parts; the first has 9 bits, so n times it is exact */
    r = r + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f; /* the minimax polynomial of Cephes' expf */
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (vec)(((uint_vec)shifted << 23) + 0x3f800000u);
}

/* 2^x within 2 ulp for x in [-125, 125], below it 2^-125; NaN stays NaN. n and what is left of x as in exp_vec; the
 * minimax polynomial of degree five that is 1 at 0, of relative error 9.2e-8. */
CQ_INLINE vec exp2_vec(vec x) {
    x = max_vec(all_lanes(-125.0f), x);
    const vec shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
    vec p = r * 1.326472709e-3f + 9.671512862e-3f;
    p = p * r + 5.550733746e-2f;
    p = p * r + 2.402224208e-1f;
    p = p * r + 6.931469776e-1f;
    p = p * r + 1.0f;
    return p * (vec)(((uint_vec)shifted << 23) + 0x3f800000u);
}

/* Each lane beside the one whose index differs in the bit `distance`, a power of two known to the compiler. */
CQ_INLINE vec swap_lanes(vec v, int32_t distance) {
#ifdef __clang__
    vec swapped;
    for (int32_t lane = 0; lane < CQ_LANES; lane++) swapped[lane] = v[lane ^ distance];
    return swapped;
#else
    int_vec from;
    for (int32_t lane = 0; lane < CQ_LANES; lane++) from[lane] = lane ^ distance;
    return __builtin_shuffle(v, from);
#endif
}

/* Lanes of a and b by their numbers, b's following a's. */
CQ_INLINE vec shuffle_lanes(vec a, vec b, int_vec from) {
#ifdef __clang__
    vec out;
    for (int32_t lane = 0; lane < CQ_LANES; lane++)
        out[lane] = from[lane] < CQ_LANES ? a[from[lane]] : b[from[lane] - CQ_LANES];
    return out;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

/* rows[i][lane] and rows[lane][i] change places in every group of n rows and n lanes: blocks of half as many rows and
 * lanes, then blocks within these. */
CQ_INLINE void transpose_groups(vec *rows, const int32_t n) {
#pragma GCC unroll 4
    for (int32_t distance = n / 2; distance >= 1; distance /= 2) {
        int_vec upper, lower;
        for (int32_t lane = 0; lane < CQ_LANES; lane++) {
            upper[lane] = lane & distance ? CQ_LANES + lane - distance : lane;
            lower[lane] = lane & distance ? CQ_LANES + lane : lane + distance;
        }
#pragma GCC unroll 16
        for (int32_t i = 0; i < n; i++) {
            if (i & distance) continue;
            const vec a = rows[i], b = rows[i + distance];
            rows[i] = shuffle_lanes(a, b, upper), rows[i + distance] = shuffle_lanes(a, b, lower);
        }
    }
}

/* y += a x */
static void axpy(float a, const float *x, float *y, int32_t n) {
#pragma omp simd
    for (int32_t i = 0; i < n; i++) y[i] += a * x[i];
}
#endif
