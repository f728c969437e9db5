/* What the x86 sets share: codebook loads, F16C conversion, Q8_0. Included after the target pragma.
 */
#ifndef CQ_X86_H
#define CQ_X86_H
#include "kernels.h"
#include <immintrin.h>
#include <string.h>

/* The first 16 of the 2^bits centroids of a codebook, zeros after fewer; reads no byte beyond. */
static inline __m128i load_centroids(const int8_t *centroids, int32_t bits) {
    uint64_t few = 0;
    if (bits >= 4) return _mm_loadu_si128((const __m128i *)centroids);
    memcpy(&few, centroids, bits == 3 ? 8 : 4);
    return _mm_cvtsi64_si128((long long)few);
}

static void f16_to_f32(const uint16_t *x, float *out, int32_t n) {
    int32_t i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + i))));
#endif
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    for (; i < n; i++) out[i] = _cvtsh_ss(x[i]);
}

static void f32_to_f16(const float *x, uint16_t *out, int32_t n) {
    int32_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++) out[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
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

/* Eight partial sums of a block's scaled products. */
static inline __m256 add_block(__m256 sum, const uint8_t *block, const int8_t *q, float scale) {
    const __m256i w = _mm256_loadu_si256((const __m256i *)(block + 2));
    const __m256i x = _mm256_loadu_si256((const __m256i *)q);
    scale *= _cvtsh_ss((uint16_t)(block[0] | block[1] << 8));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(multiply_i8(w, x)), _mm256_set1_ps(scale), sum);
}

static float dot_q8_0(const uint8_t *blocks, const int8_t *q, const float *scales, int32_t n_cols) {
    const int32_t n_blocks = n_cols / 32;
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    int32_t b = 0;
    for (; b + 2 <= n_blocks; b += 2, blocks += 68) {
        _mm_prefetch((const char *)blocks + 4096, _MM_HINT_T0);
        even = add_block(even, blocks, q + b * 32, scales[b]);
        odd = add_block(odd, blocks + 34, q + b * 32 + 32, scales[b + 1]);
    }
    if (b < n_blocks) even = add_block(even, blocks, q + b * 32, scales[b]);
    return sum_f32(_mm256_add_ps(even, odd));
}
#endif
