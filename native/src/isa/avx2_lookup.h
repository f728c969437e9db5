/* Tables of weights and look-ups of 64 indices in AVX2: the primitives of template/decode.h. Included after the target
 * pragma. Only bytes of the matrix are read. */
#ifndef CQ_AVX2_LOOKUP_H
#define CQ_AVX2_LOOKUP_H
#include "isa/indices.h"
#include "isa/x86.h"

/* Two tables of sixteen bytes, in both lanes, for vpshufb, or a codebook: two of sixteen int16. Of 32 entries `high` is
 * the codebook's second half, and in tables what that changes in the first, bit by bit; smaller ones do not use it. */
typedef struct {
    __m256i low, high;
} entries;

/* Centroids times 256: vpmulhrsw with a scale is (256 c * scale + 16384) >> 15 = (c * scale + 64) >> 7, the format's
 * rounding, and NO_SCALE leaves the centroid. */
enum { NO_SCALE = 128 };

CQ_INLINE __m256i load_sixteen(const int8_t *centroids, int32_t bits) {
    return _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_centroids(centroids, bits)), 8);
}

CQ_INLINE entries load_codebook(const int8_t *centroids, const int32_t type) {
    const int32_t bits = cq_index_bits(type);
    const __m256i low = load_sixteen(centroids, bits);
    return (entries){low, bits == 5 ? load_sixteen(centroids + 16, bits) : low};
}

/* Packing leaves the halves of a in qwords 0 and 2, those of b in 1 and 3. offset: 0x80 adds 128, 0 nothing. */
CQ_INLINE entries two_tables(__m256i a, __m256i b, const char offset) {
    const __m256i packed = _mm256_xor_si256(_mm256_packs_epi16(a, b), _mm256_set1_epi8(offset));
    return (entries){_mm256_permute4x64_epi64(packed, 0x88), _mm256_permute4x64_epi64(packed, 0xdd)};
}

/* table[N]: of N rows that share a codebook; scale: each row's, as int16 in all lanes. */
CQ_INLINE void make_tables(const int32_t N, const int32_t type, entries codebook, const __m256i *scale,
                           const char offset, entries *table) {
    if (cq_index_bits(type) == 5) {
#pragma GCC unroll 4
        for (int32_t r = 0; r < N; r++) {
            table[r] = two_tables(_mm256_mulhrs_epi16(codebook.low, scale[r]),
                                  _mm256_mulhrs_epi16(codebook.high, scale[r]), offset);
            table[r].high = _mm256_xor_si256(table[r].low, table[r].high);
        }
        return;
    }
#pragma GCC unroll 4
    for (int32_t r = 0; r < N; r += 2) {
        const int32_t second = r + 1 < N ? r + 1 : r;
        const entries pair = two_tables(_mm256_mulhrs_epi16(codebook.low, scale[r]),
                                        _mm256_mulhrs_epi16(codebook.low, scale[second]), offset);
        table[r].low = pair.low, table[second].low = second > r ? pair.high : pair.low;
    }
}

typedef struct {
    __m256i first, second;
} indices64, weights64;

typedef indices64 halves64; /* bytes of ones or zeros */

CQ_INLINE __m256i load32(const uint8_t *block) { return _mm256_loadu_si256((const __m256i *)block); }

CQ_INLINE __m256i load_both_lanes(const uint8_t *block) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)block));
}

CQ_INLINE indices64 and_all(__m256i first, __m256i second, const char bits) {
    const __m256i mask = _mm256_set1_epi8(bits);
    return (indices64){_mm256_and_si256(first, mask), _mm256_and_si256(second, mask)};
}

CQ_INLINE indices64 fours_of(__m256i bytes) { return and_all(bytes, _mm256_srli_epi16(bytes, 4), 15); }

CQ_INLINE indices64 twos_of(__m256i lanes) {
    return and_all(_mm256_srlv_epi64(lanes, _mm256_set_epi64x(2, 2, 0, 0)),
                   _mm256_srlv_epi64(lanes, _mm256_set_epi64x(6, 6, 4, 4)), 3);
}

CQ_INLINE indices64 four_bits(const uint8_t *block) { return fours_of(load32(block)); }
CQ_INLINE indices64 two_bits(const uint8_t *block) { return twos_of(load_both_lanes(block)); }

CQ_INLINE __m256i xor_masked(__m256i a, __m256i b, const char mask) { /* a ^ (b & mask) */
    return _mm256_xor_si256(a, _mm256_and_si256(b, _mm256_set1_epi8(mask)));
}

CQ_INLINE indices64 four_bits_on_trellis(const uint8_t *block, const uint8_t *above2) {
    return fours_of(xor_masked(load32(block), load32(above2), (char)0x88));
}

CQ_INLINE indices64 two_bits_on_trellis(const uint8_t *block, const uint8_t *above, const uint8_t *above2) {
    const indices64 lower = twos_of(xor_masked(load_both_lanes(block), load_both_lanes(above2), (char)0xaa));
    const indices64 stored = two_bits(above), upper = and_all(stored.first, stored.second, 2);
    return (indices64){_mm256_or_si256(lower.first, _mm256_slli_epi16(upper.first, 1)),
                       _mm256_or_si256(lower.second, _mm256_slli_epi16(upper.second, 1))};
}

/* Every bit of the plane, as a byte of ones or zeros: byte i of a half takes byte i / 8 and keeps bit i % 8. */
CQ_INLINE halves64 halves_of_plane(uint64_t plane) {
    const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i bytes = _mm256_set1_epi64x((long long)plane), four = _mm256_set1_epi8(4);
    const __m256i first = _mm256_shuffle_epi8(bytes, spread);
    const __m256i second = _mm256_shuffle_epi8(bytes, _mm256_or_si256(spread, four));
    return (halves64){_mm256_cmpeq_epi8(_mm256_and_si256(first, bit), bit),
                      _mm256_cmpeq_epi8(_mm256_and_si256(second, bit), bit)};
}

CQ_INLINE halves64 halves_of_fours(const uint8_t *above) {
    const __m256i bytes = load32(above), zero = _mm256_setzero_si256();
    return (halves64){_mm256_cmpgt_epi8(zero, _mm256_slli_epi16(bytes, 4)), _mm256_cmpgt_epi8(zero, bytes)};
}

CQ_INLINE indices64 add_bit(indices64 index, uint64_t plane, const char value) {
    const halves64 mask = halves_of_plane(plane);
    const indices64 bits = and_all(mask.first, mask.second, value);
    return (indices64){_mm256_or_si256(index.first, bits.first), _mm256_or_si256(index.second, bits.second)};
}

CQ_INLINE weights64 look_up(entries table, indices64 index) {
    return (weights64){_mm256_shuffle_epi8(table.low, index.first), _mm256_shuffle_epi8(table.low, index.second)};
}

CQ_INLINE weights64 look_up_32(entries table, indices64 index, halves64 halves) {
    const weights64 low = look_up(table, index), change = look_up((entries){table.high, table.high}, index);
    return (weights64){_mm256_xor_si256(low.first, _mm256_and_si256(change.first, halves.first)),
                       _mm256_xor_si256(low.second, _mm256_and_si256(change.second, halves.second))};
}
#endif
