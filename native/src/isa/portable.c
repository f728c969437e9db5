/* The reference: plain C, one weight at a time. Every other instruction set must equal its integers. */
#include "isa/indices.h"
#include "isa/portable_vectors.h" /* vec and its primitives */

static float f16_value(uint16_t f16) {
    const uint32_t sign = (uint32_t)(f16 & 0x8000) << 16, exponent = f16 >> 10 & 31, mantissa = f16 & 1023;
    uint32_t bits;
    float value;
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24, exact */
        value = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
        if (exponent == 31 && mantissa) bits |= 1 << 22; /* a signalling NaN becomes quiet, as in hardware */
    }
    memcpy(&value, &bits, 4);
    return value;
}

/* Round to nearest, ties to even: the dropped bits decide through one addition that may carry into the exponent. */
static uint16_t f16_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00 | (bits >> 13 & 0x1ff);
    if (bits >= 0x477ff000) return sign | 0x7c00; /* 65520 and above round to infinity */
    if (bits < 0x38800000) {                      /* below 2^-14: a multiple of 2^-24, rounded by the float adder */
        float magnitude, shifted;
        memcpy(&magnitude, &bits, 4);
        shifted = magnitude + 0.5f;
        memcpy(&bits, &shifted, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    return sign | (uint16_t)((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}

static void f16_to_f32(const uint16_t *x, float *out, int32_t n) {
    for (int32_t i = 0; i < n; i++) out[i] = f16_value(x[i]);
}

static void f32_to_f16(const float *x, uint16_t *out, int32_t n) {
    for (int32_t i = 0; i < n; i++) out[i] = f16_bits(x[i]);
}

/* Of 2 to 5 bits; an odd number of bits: the plane of high bits follows the others. */
static int32_t stored_bits(const uint8_t *block, int32_t bits, int32_t i) {
    const int32_t even = bits & ~1, high = bits == even ? 0 : block[8 * even + i / 8] >> (i % 8) & 1;
    return (even == 4 ? block[i % 32] >> (i / 32 * 4) & 15 : block[i % 16] >> (i / 16 * 2) & 3) | high << even;
}

static int32_t index_at(const cq_row *row, int32_t bits, int trellis, int32_t b, int32_t i) {
    const int32_t free_bit = 1 << (bits - 1);
    const int64_t at = (int64_t)b * 8 * bits;
    const int32_t stored = stored_bits(row->indices + at, bits, i);
    if (!trellis) return stored;
    const int32_t above = stored_bits(row->above + at, bits, i), above2 = stored_bits(row->above2 + at, bits, i);
    return (stored ^ (above2 & free_bit)) | (above & free_bit) << 1;
}

static void decode_row(const cq_matrix *w, int64_t row_index, int8_t *out) {
    const cq_row row = cq_row_at(w, row_index);
    const int32_t bits = cq_stored_bits(w->type);
    const int trellis = cq_has_trellis(w->type);
    for (cq_span span = cq_first_span(&row);; cq_next_span(&row, w->type, &span)) {
        for (int32_t i = span.begin * CQ_BLOCK; i < span.end * CQ_BLOCK; i++) {
            const int32_t centroid = span.centroids[index_at(&row, bits, trellis, i / CQ_BLOCK, i % CQ_BLOCK)];
            out[i] = (int8_t)(span.group_scale ? (centroid * *span.group_scale + 64) >> 7 : centroid);
        }
        if (span.end == row.n_blocks) return;
    }
}

static int32_t dot_i8(const int8_t *w, const int8_t *x, int32_t n) {
    int32_t sum = 0;
    for (int32_t i = 0; i < n; i++) sum += w[i] * x[i];
    return sum;
}

static void gemv(const cq_matrix *w, int64_t row, int32_t n_rows, const int8_t *x, int32_t x_sum, int32_t *acc) {
    int8_t decoded[CQ_MAX_COLS];
    (void)x_sum;
    for (int32_t r = 0; r < n_rows; r++) {
        decode_row(w, row + r, decoded);
        acc[r] = dot_i8(decoded, x, w->n_cols);
    }
}

enum { PANEL_ROWS = 4 };

/* The panel is int8 [PANEL_ROWS][n_cols]. */
static void decode_panel(const cq_matrix *w, int64_t row, int32_t n_rows, uint8_t *panel) {
    for (int32_t r = 0; r < n_rows; r++) decode_row(w, row + r, (int8_t *)panel + (int64_t)r * w->n_cols);
    memset(panel + (int64_t)n_rows * w->n_cols, 0, (size_t)(PANEL_ROWS - n_rows) * w->n_cols);
}

static void pack_panel(const int8_t *rows, int64_t stride, int32_t n_rows, int32_t n_cols, uint8_t *panel) {
    memset(panel, 0, (size_t)PANEL_ROWS * n_cols);
    for (int32_t r = 0; r < n_rows; r++) memcpy(panel + (int64_t)r * n_cols, rows + r * stride, (size_t)n_cols);
}

static void gemm_panel(const uint8_t *panel, int32_t n_cols, const int8_t *const *x, const int32_t *x_sum,
                       int32_t n_tokens, int32_t *acc) {
    (void)x_sum;
    for (int32_t t = 0; t < n_tokens; t++)
        for (int32_t r = 0; r < PANEL_ROWS; r++)
            acc[t * PANEL_ROWS + r] = dot_i8((const int8_t *)panel + (int64_t)r * n_cols, x[t], n_cols);
}

static float dot_q8_0(const uint8_t *blocks, const int8_t *q, const float *scales, int32_t n_cols) {
    float sum = 0;
    for (int32_t b = 0; b < n_cols / 32; b++, blocks += 34) {
        const uint16_t f16 = (uint16_t)(blocks[0] | blocks[1] << 8);
        sum += (float)dot_i8((const int8_t *)blocks + 2, q + b * 32, 32) * (f16_value(f16) * scales[b]);
    }
    return sum;
}

static int64_t peak_macs(int32_t iterations) {
    int8_t w[256], x[256];
    for (int32_t i = 0; i < 256; i++) w[i] = (int8_t)i, x[i] = (int8_t)(i / 2);
    for (int32_t i = 0; i < iterations; i++) {
        __asm__ volatile("" : : "r"(w), "r"(x) : "memory"); /* the arrays may have changed: no iteration is dropped */
        const int32_t sum = dot_i8(w, x, 256);
        __asm__ volatile("" : : "r"(sum));
    }
    return (int64_t)iterations * 256;
}

static int supported(void) { return 1; }

/* What templates make of it: */
#include "isa/template/float_ops.h" /* rms_norm ... dot_f16 */

#include "isa/template/attention.h" /* attention_heads, attention_chunk */

const cq_kernels cq_kernels_portable = {
    .supported = supported,
    .gemv = gemv,
    .panel_rows = PANEL_ROWS,
    .panel_col_bytes = PANEL_ROWS,
    .decode_panel = decode_panel,
    .pack_panel = pack_panel,
    .gemm_panel = gemm_panel,
    .dot_q8_0 = dot_q8_0,
    .peak_macs = peak_macs,
    CQ_FLOAT_KERNELS,
};
