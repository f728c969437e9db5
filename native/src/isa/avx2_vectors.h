/* Vectors of eight floats: the primitives of template/vectors.h. Included after the target pragma. */
#ifndef CQ_AVX2_VECTORS_H
#define CQ_AVX2_VECTORS_H
#include "isa/x86.h"

#define CQ_LANES 8
#define CQ_TILE_VECS 2
#define CQ_SCORE_KEYS 4
#define CQ_SCORE_VECS 2
typedef __m256 vec;

static inline vec repeat_four(const float *p) { return _mm256_broadcast_ps((const __m128 *)p); }
static inline vec min_vec(vec a, vec b) { return _mm256_min_ps(a, b); }
static inline vec max_vec(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec reciprocal(vec v) { return 1.0f / v; }
static inline float sum_lanes(vec v) { return sum_f32(v); }
static inline void store_low_bytes(int8_t *out, vec v) {
    const __m256i first = _mm256_set1_epi32(0x0c080400), bytes = _mm256_shuffle_epi8(_mm256_castps_si256(v), first);
    _mm_storel_epi64((__m128i *)out,
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
#endif
