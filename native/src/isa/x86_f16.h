/* F16 and Q8_0, the same in every x86 set. Included after the target pragma. */
#ifndef CQ_X86_F16_H
#define CQ_X86_F16_H
#include "isa/x86.h"

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
