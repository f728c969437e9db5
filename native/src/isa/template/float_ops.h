/* The float operations, in generic C that each instruction set's file compiles once for itself.
 *
 * The including file defines, before the include:
 *   CQ_LANES, vec     floats per vector, and a vector_size type of that many
 *   sum_lanes(vec)    their sum
 *   repeat_four(p)    four floats at p, over and over
 *   min_vec, max_vec  elementwise; where the second operand is NaN, NaN
 *   reciprocal(v)     1 / v within 2 ulp
 *   store_low_bytes(out, v)  the lowest byte of each float
 *   f16_to_f32, f32_to_f16   as in cq_kernels
 *   CQ_TILE_VECS, CQ_SCORE_KEYS, CQ_SCORE_VECS   register tiles of attention.h
 * and lists CQ_FLOAT_KERNELS at the end of its cq_kernels. */
#ifndef CQ_FLOAT_OPS_H
#define CQ_FLOAT_OPS_H
#include "kernels.h"
#include <math.h>
#include <string.h>

#define CQ_INLINE static inline __attribute__((always_inline))

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

/* Squares are summed in double, so that every instruction set gives the same scale to the last bit or nearly so. */
static void rms_norm(const float *x, const float *weight, float *out, int32_t n, float eps) {
    double squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int32_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
    const float scale = (float)(1.0 / sqrt(squares / n + eps));
    if (weight) {
#pragma omp simd
        for (int32_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
    } else {
#pragma omp simd
        for (int32_t i = 0; i < n; i++) out[i] = x[i] * scale;
    }
}

/* max |x|, compared as integers: the order is the same for magnitudes, and a NaN comes out as the largest. */
static float max_magnitude(const float *x, int32_t n) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int32_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float magnitude;
    memcpy(&magnitude, &largest, 4);
    return magnitude;
}

enum { INTEGER_BITS = 0x4b400000 }; /* 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits */

/* round(x * inverse), to [-top, top], + 1.5 * 2^23; NaN, which is 0 * inf where the scale is subnormal, as 0. */
CQ_INLINE vec quantize_vec(vec x, float inverse, float top) {
    const vec v = min_vec(all_lanes(top), max_vec(all_lanes(-top), x * inverse));
    return (vec)((int_vec)v & (v == v)) + 12582912.0f;
}

static int32_t quantize_group(const float *x, int32_t n, float top, int8_t *q, float *scale) {
    *scale = max_magnitude(x, n) / top;
    const float inverse = *scale > 0 ? 1.0f / *scale : 0.0f;
    int_vec sums = {0};
    int32_t i = 0, sum = 0;
    for (; i + CQ_LANES <= n; i += CQ_LANES) {
        const vec shifted = quantize_vec(load_vec(x + i), inverse, top);
        store_low_bytes(q + i, shifted);
        sums += (int_vec)shifted - INTEGER_BITS;
    }
    if (i < n) {
        float rest[CQ_LANES] = {0};
        int8_t bytes[CQ_LANES];
        memcpy(rest, x + i, sizeof(float) * (size_t)(n - i));
        const vec shifted = quantize_vec(load_vec(rest), inverse, top);
        store_low_bytes(bytes, shifted);
        memcpy(q + i, bytes, (size_t)(n - i));
        sums += (int_vec)shifted - INTEGER_BITS;
    }
    for (int32_t lane = 0; lane < CQ_LANES; lane++) sum += sums[lane];
    return sum;
}

static void quantize(const float *x, int32_t n, int32_t bits, int32_t group, int8_t *q, float *scales, int32_t *sums) {
    const float top = (float)((1 << (bits - 1)) - 1);
    const int32_t step = group ? group : n;
    for (int32_t i = 0, g = 0; i < n; i += step, g++) sums[g] = quantize_group(x + i, step, top, q + i, scales + g);
}

/* silu(gate) * up. exp saturates, so a very negative gate needs its own bound to reach zero instead of -inf * tiny. */
CQ_INLINE vec swiglu_vec(vec gate, vec up) {
    gate = max_vec(all_lanes(-100.0f), gate);
    return gate * reciprocal(1.0f + exp_vec(-gate)) * up;
}

static void swiglu(const float *gate, const float *up, float *out, int32_t n) {
    int32_t i = 0;
    for (; i + CQ_LANES <= n; i += CQ_LANES) store_vec(out + i, swiglu_vec(load_vec(gate + i), load_vec(up + i)));
    if (i == n) return;
    float rest[2][CQ_LANES] = {0};
    memcpy(rest[0], gate + i, sizeof(float) * (size_t)(n - i));
    memcpy(rest[1], up + i, sizeof(float) * (size_t)(n - i));
    store_vec(rest[0], swiglu_vec(load_vec(rest[0]), load_vec(rest[1])));
    memcpy(out + i, rest[0], sizeof(float) * (size_t)(n - i));
}

/* The distance between the two of a pair as a constant, so that loops become vectors. */
CQ_INLINE void rotate_pairs(float *x, const float *cos_sin, int32_t half, const int32_t step, int32_t distance) {
#pragma omp simd
    for (int32_t i = 0; i < half; i++) {
        const float a = x[i * step], b = x[i * step + distance], c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
        x[i * step] = a * c - b * s;
        x[i * step + distance] = b * c + a * s;
    }
}

static void rope(float *x, const float *cos_sin, int32_t n_rot, int32_t interleaved) {
    if (interleaved)
        rotate_pairs(x, cos_sin, n_rot / 2, 2, 1);
    else
        rotate_pairs(x, cos_sin, n_rot / 2, 1, n_rot / 2);
}

/* Each lane beside the one whose index differs in the bit `half`, a power of two known to the compiler. */
CQ_INLINE vec swap_lanes(vec v, int32_t half) {
#ifdef __clang__
    vec swapped;
    for (int32_t lane = 0; lane < CQ_LANES; lane++) swapped[lane] = v[lane ^ half];
    return swapped;
#else
    int_vec from;
    for (int32_t lane = 0; lane < CQ_LANES; lane++) from[lane] = lane ^ half;
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
    for (int32_t half = n / 2; half >= 1; half /= 2) {
        int_vec upper, lower;
        for (int32_t lane = 0; lane < CQ_LANES; lane++) {
            upper[lane] = lane & half ? CQ_LANES + lane - half : lane;
            lower[lane] = lane & half ? CQ_LANES + lane : lane + half;
        }
#pragma GCC unroll 16
        for (int32_t i = 0; i < n; i++) {
            if (i & half) continue;
            const vec a = rows[i], b = rows[i + half];
            rows[i] = shuffle_lanes(a, b, upper), rows[i + half] = shuffle_lanes(a, b, lower);
        }
    }
}

/* Sums into the lanes without the bit `half`, differences into those with it. */
CQ_INLINE vec butterfly(vec v, int32_t half) {
    vec sign;
    for (int32_t lane = 0; lane < CQ_LANES; lane++) sign[lane] = lane & half ? -1.0f : 1.0f;
    return swap_lanes(v, half) + v * sign;
}

static void hadamard_narrow(float *x, int32_t n, int32_t block, float scale) {
    for (int32_t half = block / 2; half >= 1; half /= 2)
        for (int32_t begin = 0; begin < n; begin += 2 * half)
            for (int32_t i = begin; i < begin + half; i++) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
    for (int32_t i = 0; i < n; i++) x[i] *= scale;
}

/* The fast Walsh-Hadamard transform, in Sylvester's order, divided by sqrt(block). Its steps commute: the wide ones go
 * between vectors, the others inside them. */
static void hadamard(float *x, int32_t n, int32_t block) {
    const float scale = 1.0f / sqrtf((float)block);
    if (block < CQ_LANES) {
        hadamard_narrow(x, n, block, scale);
        return;
    }
    for (int32_t half = block / 2; half >= CQ_LANES; half /= 2)
        for (int32_t begin = 0; begin < n; begin += 2 * half)
            for (int32_t i = begin; i < begin + half; i += CQ_LANES) {
                const vec a = load_vec(x + i), b = load_vec(x + i + half);
                store_vec(x + i, a + b);
                store_vec(x + i + half, a - b);
            }
    for (int32_t i = 0; i < n; i += CQ_LANES) {
        vec v = load_vec(x + i);
        if (CQ_LANES > 8) v = butterfly(v, 8);
        if (CQ_LANES > 4) v = butterfly(v, 4);
        v = butterfly(butterfly(v, 2), 1);
        store_vec(x + i, v * scale);
    }
}

static void axpy(float a, const float *x, float *y, int32_t n) {
#pragma omp simd
    for (int32_t i = 0; i < n; i++) y[i] += a * x[i];
}

static void scale_acc(const int32_t *acc, const float *row_scales, float token_scale, float *out, int32_t n,
                      int32_t accumulate) {
    if (accumulate) {
#pragma omp simd
        for (int32_t i = 0; i < n; i++) out[i] += (float)acc[i] * (row_scales[i] * token_scale);
    } else {
#pragma omp simd
        for (int32_t i = 0; i < n; i++) out[i] = (float)acc[i] * (row_scales[i] * token_scale);
    }
}

/* dot[t] (+)= w . x[t][offset ..] for N <= 4 tokens. Two chains per token, so that a token's sum has one order
 * whatever batch it comes in. */
CQ_INLINE void dot_tile(const int32_t N, const float *w, const float *const *x, int32_t offset, int32_t n, float *dot,
                        int32_t accumulate) {
    vec even[4] = {0}, odd[4] = {0};
    int32_t i = 0;
    for (; i + 2 * CQ_LANES <= n; i += 2 * CQ_LANES) {
        const vec w0 = load_vec(w + i), w1 = load_vec(w + i + CQ_LANES);
        for (int32_t t = 0; t < N; t++) {
            even[t] += w0 * load_vec(x[t] + offset + i);
            odd[t] += w1 * load_vec(x[t] + offset + i + CQ_LANES);
        }
    }
    for (int32_t t = 0; t < N; t++) {
        float total = sum_lanes(even[t] + odd[t]);
        for (int32_t j = i; j < n; j++) total += w[j] * x[t][offset + j];
        dot[t] = accumulate ? dot[t] + total : total;
    }
}

static void dot_part(const float *w, const float *const *x, int32_t n_tokens, int32_t offset, int32_t n, float *dot,
                     int32_t accumulate) {
    int32_t t = 0;
    for (; t + 4 <= n_tokens; t += 4) dot_tile(4, w, x + t, offset, n, dot + t, accumulate);
    for (; t < n_tokens; t++) dot_tile(1, w, x + t, offset, n, dot + t, accumulate);
}

static void dot_f32(const float *w, const float *const *x, int32_t n_tokens, int32_t n_cols, float *dot) {
    dot_part(w, x, n_tokens, 0, n_cols, dot, 0);
}

/* A part of the row is converted once, then read from the first-level cache for every token. */
static void dot_f16(const uint16_t *w, const float *const *x, int32_t n_tokens, int32_t n_cols, float *dot) {
    enum { PART = 1024 };
    float part[PART];
    for (int32_t i = 0; i < n_cols; i += PART) {
        const int32_t n = n_cols - i < PART ? n_cols - i : PART;
        f16_to_f32(w + i, part, n);
        dot_part(part, x, n_tokens, i, n, dot, i > 0);
    }
}

#include "isa/template/attention.h"
#include "isa/template/column_block.h"
#include "isa/template/kmeans_layer.h"

#define CQ_FLOAT_KERNELS                                                                                               \
    rms_norm, quantize, swiglu, rope, hadamard, axpy, scale_acc, dot_f32, dot_f16, f16_to_f32, f32_to_f16,             \
        attention_heads, attention_chunk, kmeans_layer, nearest_block, descend_block, rank_update, sum_by_centroid
#endif
