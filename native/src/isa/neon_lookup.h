/* Tables of weights and look-ups of 64 indices in NEON: the primitives of template/decode.h.
 *
 * Tables are 16 bytes for tbl; sqrdmulh of a centroid and scale * 256 is (2 * c * scale * 256 + 32768) >> 16 =
 * (c * scale + 64) >> 7, the format's rounding. Only bytes of the matrix are read. */
#ifndef CQ_NEON_LOOKUP_H
#define CQ_NEON_LOOKUP_H
#include "isa/indices.h"
#include <arm_neon.h>

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
#endif
