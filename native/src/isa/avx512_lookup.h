/* Tables of weights and look-ups of 64 indices in AVX-512, the primitives of template/decode.h: with VBMI (CQ_VBMI) or
 * without. Included after the target pragma.
 *
 * Without VBMI vpshufb finds 16 bytes in the lane of the index, so a block's table is spread over all lanes, and of 32
 * entries a mask takes the second half: two to five shuffles, all on one port. With it vpermb finds 64 bytes anywhere:
 * the tables of four blocks of 16 entries, where an index is that of the lane above that of the entry, or one of 32,
 * twice. */
#ifndef CQ_AVX512_LOOKUP_H
#define CQ_AVX512_LOOKUP_H
#include "isa/indices.h"
#include "isa/x86.h"

typedef __m512i indices64, weights64; /* weights: W + 128 */

CQ_INLINE int32_t n_halves(const int32_t type) { return cq_index_bits(type) == 5 ? 2 : 1; }

/* In each lane the entries of a block's table, 0 to 15 and 16 to 31; the latter unused by smaller codebooks. */
typedef struct {
    __m512i half[2];
} lanes_of_entries;

CQ_INLINE __m512i load_both_halves(const uint8_t *block) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)block));
}

/* Nibbles of both halves in the low bits of their bytes. */
CQ_INLINE __m512i align_fours(__m512i both) {
    return _mm512_srlv_epi64(both, _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0));
}

#ifdef CQ_VBMI

typedef __m512i halves64; /* bit 4 of each byte, beside anything */

/* table of 16: four blocks' lanes, this one's number at bit 4; of 32: twice. */
typedef struct {
    __m512i table, lane;
} entries;

/* bits ? a : b */
CQ_INLINE __m512i select_bits(const char bits, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi64(a, b, _mm512_set1_epi8(bits), 0xe4);
}

/* The table of lane i, a constant. */
CQ_INLINE entries table_of_lane(const lanes_of_entries *lanes, const int32_t type, const int32_t i) {
    if (n_halves(type) == 1) return (entries){lanes->half[0], _mm512_set1_epi8((char)(16 * i))};
    const __m512i both =
        _mm512_set_epi64(2 * i + 9, 2 * i + 8, 2 * i + 1, 2 * i, 2 * i + 9, 2 * i + 8, 2 * i + 1, 2 * i);
    return (entries){_mm512_permutex2var_epi64(lanes->half[0], both, lanes->half[1]), _mm512_setzero_si512()};
}

/* Beside the four bits anything: look-ups leave it out. */
CQ_INLINE indices64 fours_of(__m512i both) { return align_fours(both); }

CQ_INLINE halves64 halves_of_plane(uint64_t plane) { return _mm512_maskz_mov_epi8(plane, _mm512_set1_epi8(16)); }

CQ_INLINE halves64 halves_of_fours(const uint8_t *above) {
    return _mm512_rolv_epi64(load_both_halves(above), _mm512_set_epi64(61, 61, 61, 61, 1, 1, 1, 1));
}

CQ_INLINE weights64 look_up(entries from, indices64 index) {
    return _mm512_permutexvar_epi8(select_bits(15, index, from.lane), from.table);
}

CQ_INLINE weights64 look_up_32(entries from, indices64 index, halves64 halves) {
    return _mm512_permutexvar_epi8(select_bits(16, halves, index), from.table);
}

#else

typedef __mmask64 halves64;
typedef lanes_of_entries entries; /* one table in all lanes */

CQ_INLINE entries table_of_lane(const lanes_of_entries *lanes, const int32_t type, const int32_t i) {
    entries table = *lanes;
#pragma GCC unroll 2
    for (int32_t h = 0; h < n_halves(type); h++)
        table.half[h] = i == 0   ? _mm512_shuffle_i32x4(lanes->half[h], lanes->half[h], 0x00)
                        : i == 1 ? _mm512_shuffle_i32x4(lanes->half[h], lanes->half[h], 0x55)
                        : i == 2 ? _mm512_shuffle_i32x4(lanes->half[h], lanes->half[h], 0xaa)
                                 : _mm512_shuffle_i32x4(lanes->half[h], lanes->half[h], 0xff);
    return table;
}

CQ_INLINE indices64 fours_of(__m512i both) { return _mm512_and_si512(align_fours(both), _mm512_set1_epi8(15)); }

CQ_INLINE halves64 halves_of_plane(uint64_t plane) { return plane; }

CQ_INLINE halves64 halves_of_fours(const uint8_t *above) {
    const __m512i fourth_bits = _mm512_inserti64x4(_mm512_set1_epi8(8), _mm256_set1_epi8((char)0x80), 1);
    return _mm512_test_epi8_mask(load_both_halves(above), fourth_bits);
}

CQ_INLINE weights64 look_up(entries table, indices64 index) { return _mm512_shuffle_epi8(table.half[0], index); }

CQ_INLINE weights64 look_up_32(entries table, indices64 index, halves64 halves) {
    return _mm512_mask_shuffle_epi8(look_up(table, index), halves, table.half[1], index);
}

#endif

CQ_INLINE __m512i load_all_lanes(const uint8_t *block) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)block));
}

CQ_INLINE __m512i align_twos(__m512i lanes) {
    return _mm512_srlv_epi64(lanes, _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0));
}

CQ_INLINE indices64 four_bits(const uint8_t *block) { return fours_of(load_both_halves(block)); }

CQ_INLINE indices64 two_bits(const uint8_t *block) {
    return _mm512_and_si512(align_twos(load_all_lanes(block)), _mm512_set1_epi8(3));
}

CQ_INLINE __m512i xor_masked(__m512i a, __m512i b, const char mask) { /* a ^ (b & mask) */
    return _mm512_ternarylogic_epi64(a, b, _mm512_set1_epi8(mask), 0x78);
}

CQ_INLINE indices64 four_bits_on_trellis(const uint8_t *block, const uint8_t *above2) {
    return fours_of(xor_masked(load_both_halves(block), load_both_halves(above2), (char)0x88));
}

CQ_INLINE indices64 two_bits_on_trellis(const uint8_t *block, const uint8_t *above, const uint8_t *above2) {
    const __m512i lower = align_twos(xor_masked(load_all_lanes(block), load_all_lanes(above2), (char)0xaa));
    const __m512i upper = _mm512_rolv_epi64(load_all_lanes(above), _mm512_set_epi64(59, 59, 61, 61, 63, 63, 1, 1));
    const __m512i selected = _mm512_ternarylogic_epi64(lower, upper, _mm512_set1_epi8(4), 0xd8); /* 4: of upper */
    return _mm512_and_si512(selected, _mm512_set1_epi8(7));
}

CQ_INLINE indices64 add_bit(indices64 index, uint64_t plane, const char value) {
    return _mm512_mask_add_epi8(index, plane, index, _mm512_set1_epi8(value));
}
#endif
