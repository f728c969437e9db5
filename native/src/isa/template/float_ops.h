/* TEMPLATE. The float operations of cq_kernels, in generic C that each instruction set's file compiles once for itself.
 * Included after the primitives that vectors.h lists, and after f16_to_f32 and f32_to_f16 as in cq_kernels. */
#ifndef CQ_FLOAT_OPS_H
#define CQ_FLOAT_OPS_H
#include "isa/template/vectors.h"

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
CQ_INLINE void rotate_pairs(float *x, const float *cos_sin, int32_t n_pairs, const int32_t step, int32_t distance) {
#pragma omp simd
    for (int32_t i = 0; i < n_pairs; i++) {
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

/* Sums into the lanes without the bit `distance`, differences into those with it. */
CQ_INLINE vec butterfly(vec v, int32_t distance) {
    vec sign;
    for (int32_t lane = 0; lane < CQ_LANES; lane++) sign[lane] = lane & distance ? -1.0f : 1.0f;
    return swap_lanes(v, distance) + v * sign;
}

static void hadamard_narrow(float *x, int32_t n, int32_t block, float scale) {
    for (int32_t distance = block / 2; distance >= 1; distance /= 2)
        for (int32_t begin = 0; begin < n; begin += 2 * distance)
            for (int32_t i = begin; i < begin + distance; i++) {
                const float a = x[i], b = x[i + distance];
                x[i] = a + b, x[i + distance] = a - b;
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
    for (int32_t distance = block / 2; distance >= CQ_LANES; distance /= 2)
        for (int32_t begin = 0; begin < n; begin += 2 * distance)
            for (int32_t i = begin; i < begin + distance; i += CQ_LANES) {
                const vec a = load_vec(x + i), b = load_vec(x + i + distance);
                store_vec(x + i, a + b);
                store_vec(x + i + distance, a - b);
            }
    for (int32_t i = 0; i < n; i += CQ_LANES) {
        vec v = load_vec(x + i);
        if (CQ_LANES > 8) v = butterfly(v, 8);
        if (CQ_LANES > 4) v = butterfly(v, 4);
        v = butterfly(butterfly(v, 2), 1);
        store_vec(x + i, v * scale);
    }
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

static void dot_chunk(const float *w, const float *const *x, int32_t n_tokens, int32_t offset, int32_t n, float *dot,
                      int32_t accumulate) {
    int32_t t = 0;
    for (; t + 4 <= n_tokens; t += 4) dot_tile(4, w, x + t, offset, n, dot + t, accumulate);
    for (; t < n_tokens; t++) dot_tile(1, w, x + t, offset, n, dot + t, accumulate);
}

static void dot_f32(const float *w, const float *const *x, int32_t n_tokens, int32_t n_cols, float *dot) {
    dot_chunk(w, x, n_tokens, 0, n_cols, dot, 0);
}

/* A chunk of the row is converted once, then read from the first-level cache for every token. */
static void dot_f16(const uint16_t *w, const float *const *x, int32_t n_tokens, int32_t n_cols, float *dot) {
    enum { CHUNK_COLS = 1024 };
    float chunk[CHUNK_COLS];
    for (int32_t i = 0; i < n_cols; i += CHUNK_COLS) {
        const int32_t n = n_cols - i < CHUNK_COLS ? n_cols - i : CHUNK_COLS;
        f16_to_f32(w + i, chunk, n);
        dot_chunk(chunk, x, n_tokens, i, n, dot, i > 0);
    }
}

/* Of a cq_kernels, with attention.h. */
#define CQ_FLOAT_KERNELS                                                                                               \
    .rms_norm = rms_norm, .quantize = quantize, .swiglu = swiglu, .rope = rope, .hadamard = hadamard, .axpy = axpy,    \
    .scale_acc = scale_acc, .dot_f32 = dot_f32, .dot_f16 = dot_f16, .f16_to_f32 = f16_to_f32,                          \
    .f32_to_f16 = f32_to_f16, .attention_heads = attention_heads, .attention_chunk = attention_chunk
#endif
