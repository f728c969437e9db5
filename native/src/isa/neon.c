/* NEON (every 64-bit Arm), twice: with the widening multiplies of the base architecture, and with dotprod's sdot. */
#if defined(__aarch64__)
#include "isa/neon_lookup.h"     /* tables of weights, 64 look-ups */
#include "isa/neon_vectors.h"    /* vec and its primitives */
#include "isa/template/decode.h" /* decode_block, decode_row_block: what they make of 64 look-ups */
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

static void f16_to_f32(const uint16_t *x, float *out, int32_t n) {
    int32_t i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + i))));
    for (; i < n; i++) out[i] = vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x[i]))), 0);
}

static void f32_to_f16(const float *x, uint16_t *out, int32_t n) {
    int32_t i = 0;
    for (; i + 4 <= n; i += 4) vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
    for (; i < n; i++) out[i] = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x[i]))), 0);
}

enum { PANEL_ROWS = 8, QUAD_ROWS = 4 };

/* Four rows -> int8 [n_cols / 4][4 rows][4]: a store that interleaves four registers of dwords is the transposition. */
CQ_INLINE void decode_quad(const int32_t type, const cq_matrix *w, int64_t row, int32_t n_rows, uint8_t *out) {
    const int32_t n_blocks = w->n_cols / CQ_BLOCK;
    cq_row rows[QUAD_ROWS];
    cq_span spans[QUAD_ROWS];
    entries tables[QUAD_ROWS];
    weights64 decoded[QUAD_ROWS];
    memset(decoded, 0, sizeof decoded);
    for (int32_t r = 0; r < n_rows; r++) {
        rows[r] = cq_row_at(w, row + r);
        spans[r] = cq_first_span(&rows[r]);
        tables[r] = table_of(load_codebook(spans[r].centroids, type), type, spans[r].group_scale);
    }
    for (int32_t b = 0; b < n_blocks; b++) {
        for (int32_t r = 0; r < n_rows; r++) {
            if (b == spans[r].end) {
                cq_next_span(&rows[r], type, &spans[r]);
                tables[r] = table_of(load_codebook(spans[r].centroids, type), type, spans[r].group_scale);
            }
            decoded[r] = decode_row_block(&rows[r], type, b, tables[r]);
        }
        for (int32_t i = 0; i < 4; i++, out += 64) {
            const uint32x4x4_t four = {{vreinterpretq_u32_s8(decoded[0].v[i]), vreinterpretq_u32_s8(decoded[1].v[i]),
                                        vreinterpretq_u32_s8(decoded[2].v[i]), vreinterpretq_u32_s8(decoded[3].v[i])}};
            vst4q_u32((uint32_t *)out, four);
        }
    }
}

/* The panel is int8 [2][n_cols / 4][4 rows][4]; rows beyond n_rows are zero. */
static void decode_panel(const cq_matrix *w, int64_t row, int32_t n_rows, uint8_t *panel) {
    for (int32_t first = 0; first < PANEL_ROWS; first += QUAD_ROWS) {
        const int32_t n = n_rows > first ? cq_min(n_rows - first, QUAD_ROWS) : 0;
        uint8_t *out = panel + (int64_t)first * w->n_cols;
        CQ_WITH_TYPE(w, decode_quad, w, row + first, n, out)
    }
}

static void pack_panel(const int8_t *rows, int64_t stride, int32_t n_rows, int32_t n_cols, uint8_t *panel) {
    memset(panel, 0, (size_t)PANEL_ROWS * n_cols);
    for (int32_t r = 0; r < n_rows; r++) {
        uint8_t *out = panel + r / QUAD_ROWS * QUAD_ROWS * n_cols + r % QUAD_ROWS * 4;
        for (int32_t k = 0; k < n_cols; k += 4) memcpy(out + k * QUAD_ROWS, rows + r * stride + k, 4);
    }
}

#if defined(__linux__)
static int has_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#else
static int has_dotprod(void) { return 1; } /* every Apple processor that runs 64-bit macOS programs */
#endif
static int has_neon(void) { return 1; }

/* What templates make of it: gemv, gemm_panel, dot_q8_0 and peak_macs with either instruction, and the float kernels.
 */
#define CQ_NEON(name) name##_base
#define CQ_NEON_DOTPROD 0
#include "isa/template/neon_products.h"
#undef CQ_NEON
#undef CQ_NEON_DOTPROD

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define CQ_NEON(name) name##_dotprod
#define CQ_NEON_DOTPROD 1
#include "isa/template/neon_products.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#include "isa/template/float_ops.h" /* rms_norm ... dot_f16 */

#include "isa/template/attention.h" /* attention_heads, attention_chunk */

const cq_kernels cq_kernels_neon = {
    .supported = has_neon,
    .gemv = gemv_base,
    .panel_rows = PANEL_ROWS,
    .panel_col_bytes = PANEL_ROWS,
    .decode_panel = decode_panel,
    .pack_panel = pack_panel,
    .gemm_panel = gemm_panel_base,
    .dot_q8_0 = dot_q8_0_base,
    .peak_macs = peak_macs_base,
    CQ_FLOAT_KERNELS,
};

const cq_kernels cq_kernels_neon_dotprod = {
    .supported = has_dotprod,
    .gemv = gemv_dotprod,
    .panel_rows = PANEL_ROWS,
    .panel_col_bytes = PANEL_ROWS,
    .decode_panel = decode_panel,
    .pack_panel = pack_panel,
    .gemm_panel = gemm_panel_dotprod,
    .dot_q8_0 = dot_q8_0_dotprod,
    .peak_macs = peak_macs_dotprod,
    CQ_FLOAT_KERNELS,
};
#endif
