/* TEMPLATE. What multiplies in neon.c, included once per instruction: CQ_NEON_DOTPROD 1 uses sdot, 0 widening
 * multiplies. */

/* sum += products of 16 bytes, in four int32. With |w| <= 128 and |x| <= 127 two products are at most
 * 2 * 128 * 127 = 32512, which the int16 of the widening form holds. */
CQ_INLINE int32x4_t CQ_NEON(dot16)(int32x4_t sum, int8x16_t w, int8x16_t x) {
#if CQ_NEON_DOTPROD
    return vdotq_s32(sum, w, x);
#else
    return vpadalq_s16(sum, vmlal_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vget_high_s8(w), vget_high_s8(x)));
#endif
}

/* scale_every 1 or 2: the blocks that share a scale, so that spans are those of the codebook alone; 0: any grouping. */
CQ_INLINE int32_t CQ_NEON(gemv_row)(const int32_t type, const int32_t scale_every, const cq_matrix *w,
                                    int64_t row_index, const int8_t *x) {
    cq_row row = cq_row_at(w, row_index);
    int32x4_t sum[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
    if (scale_every) row.scale_blocks = row.n_blocks;
    for (cq_span span = cq_first_span(&row);; cq_next_span(&row, type, &span)) {
        const entries codebook = load_codebook(span.centroids, type);
        entries table = table_of(codebook, type, span.group_scale);
        for (int32_t b = span.begin; b < span.end; b++) {
            __builtin_prefetch(row.indices + (int64_t)b * 8 * cq_stored_bits(type) + 1024);
            if (scale_every) table = table_of(codebook, type, row.group_scales + b / scale_every);
            const weights64 weights = decode_row_block(&row, type, b, table);
            for (int32_t i = 0; i < 4; i++)
                sum[i] = CQ_NEON(dot16)(sum[i], weights.v[i], vld1q_s8(x + (int64_t)b * CQ_BLOCK + 16 * i));
        }
        if (span.end == row.n_blocks)
            return vaddvq_s32(vaddq_s32(vaddq_s32(sum[0], sum[1]), vaddq_s32(sum[2], sum[3])));
    }
}

CQ_INLINE void CQ_NEON(gemv_all)(const int32_t type, const cq_matrix *w, int64_t row, int32_t n_rows, const int8_t *x,
                                 int32_t *acc) {
    for (int32_t r = 0; r < n_rows; r++)
        if (w->scale_cols == CQ_BLOCK)
            acc[r] = CQ_NEON(gemv_row)(type, 1, w, row + r, x);
        else if (w->scale_cols == 2 * CQ_BLOCK)
            acc[r] = CQ_NEON(gemv_row)(type, 2, w, row + r, x);
        else
            acc[r] = CQ_NEON(gemv_row)(type, 0, w, row + r, x);
}

static void CQ_NEON(gemv)(const cq_matrix *w, int64_t row, int32_t n_rows, const int8_t *x, int32_t x_sum,
                          int32_t *acc) {
    (void)x_sum;
    CQ_WITH_TYPE(w, CQ_NEON(gemv_all), w, row, n_rows, x, acc)
}

#if CQ_NEON_DOTPROD
enum { CQ_NEON(TILE) = 8 };

/* acc[N][8] = panel times N tokens. Of 32 registers, 2 N hold sums, N hold 16 columns of activations, the rest weights.
 */
CQ_INLINE void CQ_NEON(tile)(const int32_t N, const uint8_t *panel, int32_t n_cols, const int8_t *const *x,
                             int32_t *acc) {
    const int8_t *low = (const int8_t *)panel, *high = low + (int64_t)4 * n_cols;
    int32x4_t sum[8][2];
#pragma GCC unroll 8
    for (int32_t t = 0; t < N; t++) sum[t][0] = sum[t][1] = vdupq_n_s32(0);
    for (int32_t k = 0; k < n_cols; k += 16, low += 64, high += 64) {
        int8x16_t a[8];
#pragma GCC unroll 8
        for (int32_t t = 0; t < N; t++) a[t] = vld1q_s8(x[t] + k);
#define CQ_STEP(lane)                                                                                                  \
    {                                                                                                                  \
        const int8x16_t w0 = vld1q_s8(low + 16 * lane), w1 = vld1q_s8(high + 16 * lane);                               \
        _Pragma("GCC unroll 8") for (int32_t t = 0; t < N; t++) {                                                      \
            sum[t][0] = vdotq_laneq_s32(sum[t][0], w0, a[t], lane);                                                    \
            sum[t][1] = vdotq_laneq_s32(sum[t][1], w1, a[t], lane);                                                    \
        }                                                                                                              \
    }
        CQ_STEP(0) CQ_STEP(1) CQ_STEP(2) CQ_STEP(3)
#undef CQ_STEP
    }
#pragma GCC unroll 8
    for (int32_t t = 0; t < N; t++) vst1q_s32(acc + t * 8, sum[t][0]), vst1q_s32(acc + t * 8 + 4, sum[t][1]);
}
#else
enum { CQ_NEON(TILE) = 4 };

/* acc[N][8] = panel times N tokens, two dwords of columns per step. A register of int32 holds two partial sums of each
 * of two rows, because the widening multiply of 8 bytes covers two rows; they are added at the end. */
CQ_INLINE void CQ_NEON(tile)(const int32_t N, const uint8_t *panel, int32_t n_cols, const int8_t *const *x,
                             int32_t *acc) {
    int32x4_t sum[4][4];
#pragma GCC unroll 4
    for (int32_t t = 0; t < N; t++) sum[t][0] = sum[t][1] = sum[t][2] = sum[t][3] = vdupq_n_s32(0);
    for (int32_t k = 0; k < n_cols; k += 8) {
#pragma GCC unroll 2
        for (int32_t quad = 0; quad < 2; quad++) {
            const int8_t *step = (const int8_t *)panel + ((int64_t)quad * n_cols + k) * 4;
            const int8x16_t w0 = vld1q_s8(step), w1 = vld1q_s8(step + 16);
#pragma GCC unroll 4
            for (int32_t t = 0; t < N; t++) {
                int32_t four[2];
                memcpy(four, x[t] + k, 8);
                const int8x8_t a0 = vreinterpret_s8_s32(vdup_n_s32(four[0]));
                const int8x8_t a1 = vreinterpret_s8_s32(vdup_n_s32(four[1]));
                const int16x8_t p0 = vmlal_s8(vmull_s8(vget_low_s8(w0), a0), vget_low_s8(w1), a1);
                const int16x8_t p1 = vmlal_s8(vmull_s8(vget_high_s8(w0), a0), vget_high_s8(w1), a1);
                sum[t][2 * quad] = vpadalq_s16(sum[t][2 * quad], p0);
                sum[t][2 * quad + 1] = vpadalq_s16(sum[t][2 * quad + 1], p1);
            }
        }
    }
#pragma GCC unroll 4
    for (int32_t t = 0; t < N; t++) {
        vst1q_s32(acc + t * 8, vpaddq_s32(sum[t][0], sum[t][1]));
        vst1q_s32(acc + t * 8 + 4, vpaddq_s32(sum[t][2], sum[t][3]));
    }
}
#endif

static void CQ_NEON(gemm_panel)(const uint8_t *panel, int32_t n_cols, const int8_t *const *x, const int32_t *x_sum,
                                int32_t n_tokens, int32_t *acc) {
    (void)x_sum;
    int32_t t = 0;
    for (; t + CQ_NEON(TILE) <= n_tokens; t += CQ_NEON(TILE))
        CQ_NEON(tile)(CQ_NEON(TILE), panel, n_cols, x + t, acc + (int64_t)t * PANEL_ROWS);
    for (; t + 2 <= n_tokens; t += 2) CQ_NEON(tile)(2, panel, n_cols, x + t, acc + (int64_t)t * PANEL_ROWS);
    if (t < n_tokens) CQ_NEON(tile)(1, panel, n_cols, x + t, acc + (int64_t)t * PANEL_ROWS);
}

static float CQ_NEON(dot_q8_0)(const uint8_t *blocks, const int8_t *q, const float *scales, int32_t n_cols) {
    float sum = 0;
    for (int32_t b = 0; b < n_cols / 32; b++, blocks += 34) {
        uint16_t f16;
        memcpy(&f16, blocks, 2);
        const float weight_scale = vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(f16))), 0);
        int32x4_t products = vdupq_n_s32(0);
        for (int32_t i = 0; i < 32; i += 16)
            products = CQ_NEON(dot16)(products, vld1q_s8((const int8_t *)blocks + 2 + i), vld1q_s8(q + b * 32 + i));
        sum += (float)vaddvq_s32(products) * (weight_scale * scales[b]);
    }
    return sum;
}

static int64_t CQ_NEON(peak_macs)(int32_t iterations) {
    enum { CHAINS = 12 };
    int32x4_t sum[CHAINS];
    int8x16_t w = vdupq_n_s8(3), x = vdupq_n_s8(5);
    for (int32_t i = 0; i < CHAINS; i++) sum[i] = vdupq_n_s32(0);
    for (int32_t i = 0; i < iterations; i++)
#pragma GCC unroll 12
        for (int32_t j = 0; j < CHAINS; j++) {
            __asm__ volatile("" : "+w"(x)); /* each product is computed anew */
            sum[j] = CQ_NEON(dot16)(sum[j], w, x);
            __asm__ volatile("" : "+w"(sum[j]));
        }
    return (int64_t)iterations * CHAINS * 16;
}
