/* What the x86 sets share: codebook loads, products of bytes, sums. Included after the target pragma. */
#ifndef CQ_X86_H
#define CQ_X86_H
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* The first 16 of the 2^bits centroids of a codebook, zeros after fewer; reads no byte beyond. */
static inline __m128i load_centroids(const int8_t *centroids, int32_t bits) {
    uint64_t few = 0;
    if (bits >= 4) return _mm_loadu_si128((const __m128i *)centroids);
    memcpy(&few, centroids, bits == 3 ? 8 : 4);
    return _mm_cvtsi64_si128((long long)few);
}

/* Eight int32 sums of 32 products. maddubs wants unsigned times signed: |w| * (x with w's sign). With |w| <= 128 and
 * |x| <= 127 a pair is at most 2 * 128 * 127 = 32512, which int16 holds, so nothing saturates. */
static inline __m256i multiply_i8(__m256i w, __m256i x) {
#ifdef CQ_DPBUSD
    return CQ_DPBUSD(_mm256_setzero_si256(), _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
#else
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

static inline int32_t sum_i32(__m256i v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

static inline float sum_f32(__m256 v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
#endif
