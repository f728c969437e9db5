/* NEON (every 64-bit Arm), twice: with the widening multiplies of the base architecture, and with dotprod's sdot.
 *
 * Tables are 16 bytes for tbl; sqrdmulh of a centroid and scale * 256 is (2 * c * scale * 256 + 32768) >> 16 =
 * (c * scale + 64) >> 7, the format's rounding. Only bytes of the matrix are read. */
#if defined(__aarch64__)
#include "isa/indices.h"
#include "isa/neon_vectors.h" /* vec and its primitives */
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

#include "isa/template/float_ops.h" /* rms_norm ... dot_f16 */

#include "isa/template/attention.h" /* attention_heads, attention_chunk */

typedef struct {
    int8x16_t v[4];
} weights64;

/* A codebook or a table: up to 16 entries in val[0], entries 16 to 31 in val[1]. */
typedef int8x16x2_t entries;

CQ_INLINE entries load_codebook(const int8_t *centroids, const int32_t type) {
    int8_t bytes[32] = {0};
    memcpy(bytes, centroids, 1u << cq_index_bits(type));
    return (entries){{vld1q_s8(bytes), vld1q_s8(bytes + 16)}};
}

CQ_INLINE int8x16_t scaled(int8x16_t codebook, int16x8_t factor) {
    return vcombine_s8(vmovn_s16(vqrdmulhq_s16(vmovl_s8(vget_low_s8(codebook)), factor)),
                       vmovn_s16(vqrdmulhq_s16(vmovl_s8(vget_high_s8(codebook)), factor)));
}

CQ_INLINE entries table_of(entries codebook, const int32_t type, const int8_t *scale) { /* NULL for none */
    if (!scale) return codebook;
    const int16x8_t factor = vdupq_n_s16((int16_t)(*scale * 256));
    const int large = cq_index_bits(type) == 5;
    return (entries){{scaled(codebook.val[0], factor), large ? scaled(codebook.val[1], factor) : codebook.val[1]}};
}

typedef struct {
    uint8x16_t v[4];
} indices64;

typedef indices64 halves64; /* 16 or 0 */

CQ_INLINE indices64 fours_of(uint8x16_t bytes, uint8x16_t more) {
    const uint8x16_t mask = vdupq_n_u8(15);
    return (indices64){{vandq_u8(bytes, mask), vandq_u8(more, mask), vshrq_n_u8(bytes, 4), vshrq_n_u8(more, 4)}};
}

CQ_INLINE indices64 twos_of(uint8x16_t bytes) {
    const uint8x16_t mask = vdupq_n_u8(3);
    return (indices64){{vandq_u8(bytes, mask), vandq_u8(vshrq_n_u8(bytes, 2), mask),
                        vandq_u8(vshrq_n_u8(bytes, 4), mask), vshrq_n_u8(bytes, 6)}};
}

CQ_INLINE indices64 four_bits(const uint8_t *block) { return fours_of(vld1q_u8(block), vld1q_u8(block + 16)); }
CQ_INLINE indices64 two_bits(const uint8_t *block) { return twos_of(vld1q_u8(block)); }

CQ_INLINE uint8x16_t xor_masked(const uint8_t *a, const uint8_t *b, uint8_t mask) { /* a ^ (b & mask) */
    return veorq_u8(vld1q_u8(a), vandq_u8(vld1q_u8(b), vdupq_n_u8(mask)));
}

CQ_INLINE indices64 four_bits_on_trellis(const uint8_t *block, const uint8_t *above2) {
    return fours_of(xor_masked(block, above2, 0x88), xor_masked(block + 16, above2 + 16, 0x88));
}

CQ_INLINE indices64 two_bits_on_trellis(const uint8_t *block, const uint8_t *above, const uint8_t *above2) {
    indices64 index = twos_of(xor_masked(block, above2, 0xaa));
    const indices64 upper = twos_of(vld1q_u8(above));
    for (int32_t i = 0; i < 4; i++)
        index.v[i] = vorrq_u8(index.v[i], vshlq_n_u8(vandq_u8(upper.v[i], vdupq_n_u8(2)), 1));
    return index;
}

/* Byte i of a quarter takes byte i / 8 of two and keeps bit i % 8. */
CQ_INLINE indices64 add_bit(indices64 index, uint64_t plane, uint8_t value) {
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    for (int32_t i = 0; i < 4; i++, plane >>= 16) {
        const uint8x16_t two = vcombine_u8(vdup_n_u8((uint8_t)plane), vdup_n_u8((uint8_t)(plane >> 8)));
        index.v[i] = vorrq_u8(index.v[i], vandq_u8(vtstq_u8(two, bit), vdupq_n_u8(value)));
    }
    return index;
}

CQ_INLINE halves64 halves_of_plane(uint64_t plane) {
    const uint8x16_t zero = vdupq_n_u8(0);
    return add_bit((indices64){{zero, zero, zero, zero}}, plane, 16);
}

CQ_INLINE halves64 halves_of_fours(const uint8_t *above) {
    halves64 halves = four_bits(above);
    for (int32_t i = 0; i < 4; i++) halves.v[i] = vshlq_n_u8(vandq_u8(halves.v[i], vdupq_n_u8(8)), 1);
    return halves;
}

CQ_INLINE weights64 look_up(entries table, indices64 index) {
    weights64 out;
    for (int32_t i = 0; i < 4; i++) out.v[i] = vqtbl1q_s8(table.val[0], index.v[i]);
    return out;
}

CQ_INLINE weights64 look_up_32(entries table, indices64 index, halves64 halves) {
    weights64 out;
    for (int32_t i = 0; i < 4; i++) out.v[i] = vqtbl2q_s8(table, vorrq_u8(index.v[i], halves.v[i]));
    return out;
}

#include "isa/template/decode.h" /* decode_block, decode_row_block */

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
