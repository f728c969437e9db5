/* Vectors of four floats in NEON: the primitives of template/vectors.h. */
#ifndef CQ_NEON_VECTORS_H
#define CQ_NEON_VECTORS_H
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#define CQ_LANES 4
#define CQ_TILE_VECS 4
#define CQ_SCORE_KEYS 4
#define CQ_SCORE_VECS 4
typedef float32x4_t vec;

static inline vec repeat_four(const float *p) { return vld1q_f32(p); }
static inline vec min_vec(vec a, vec b) { return vminq_f32(a, b); } /* NaN if either is */
static inline vec max_vec(vec a, vec b) { return vmaxq_f32(a, b); }
static inline vec reciprocal(vec v) { return 1.0f / v; }
static inline float sum_lanes(vec v) { return vaddvq_f32(v); }
static inline void store_low_bytes(int8_t *out, vec v) {
    const uint8x16_t bytes = vreinterpretq_u8_f32(v), even = vuzp1q_u8(bytes, bytes);
    const uint32_t four = vgetq_lane_u32(vreinterpretq_u32_u8(vuzp1q_u8(even, even)), 0);
    memcpy(out, &four, 4);
}
#endif
