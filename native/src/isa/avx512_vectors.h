/* Vectors of sixteen floats: the primitives of template/vectors.h. Included after the target pragma. */
#ifndef CQ_AVX512_VECTORS_H
#define CQ_AVX512_VECTORS_H
#include <immintrin.h>
#include <stdint.h>

#define CQ_LANES 16
#define CQ_TILE_VECS 4
#define CQ_SCORE_KEYS 8
#define CQ_SCORE_VECS 2
typedef __m512 vec;

static inline vec repeat_four(const float *p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
static inline vec min_vec(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline vec max_vec(vec a, vec b) { return _mm512_max_ps(a, b); }
/* By a step of Newton's: half of the time of a division. */
static inline vec reciprocal(vec v) {
    const vec near = _mm512_rcp14_ps(v);
    return near * (2.0f - v * near);
}
static inline float sum_lanes(vec v) { return _mm512_reduce_add_ps(v); }
static inline void store_low_bytes(int8_t *out, vec v) {
    _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(_mm512_castps_si512(v)));
}
#endif
