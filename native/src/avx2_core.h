/* AVX2 kernels, compiled twice: by avx2.c, and by avxvnni.c with a dot product of bytes.
 *
 * Tables are 16 bytes in both lanes for vpshufb; vpmulhrsw of a centroid and scale * 256 is (c * scale * 256 + 16384)
 * >> 15 = (c * scale + 64) >> 7, the format's rounding. Only bytes of the matrix are read. */
#ifndef CQ_AVX2_CORE_H
#define CQ_AVX2_CORE_H
#include "indices.h"
#include "x86.h"

#define CQ_LANES 8
#define CQ_TILE_VECS 2
#define CQ_SCORE_KEYS 4
#define CQ_SCORE_VECS 2
typedef __m256 vec;

static inline vec repeat_four(const float *p) { return _mm256_broadcast_ps((const __m128 *)p); }
static inline vec min_vec(vec a, vec b) { return _mm256_min_ps(a, b); }
static inline vec max_vec(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec reciprocal(vec v) { return 1.0f / v; }
static inline float sum_lanes(vec v) { return sum_f32(v); }

#include "float_ops.h"

/* With a dot product of unsigned and signed bytes (CQ_DPBUSD) weights are W + 128, else W: what that adds to a sum is
 * 128 times the sum of the activations. */
#ifdef CQ_DPBUSD
enum { OFFSET = 128 };
#else
enum { OFFSET = 0 };
#endif

/* sum + the products of 32 weights and activations, four to a lane. */
CQ_INLINE __m256i add_products(__m256i sum, __m256i weights, __m256i x) {
#ifdef CQ_DPBUSD
    return CQ_DPBUSD(sum, weights, x);
#else
    return _mm256_add_epi32(sum, multiply_i8(weights, x));
#endif
}

/* Sixteen entries: centroids as int16, or a table for vpshufb. high: entries 16 to 31, unused by smaller codebooks. */
typedef struct {
    __m256i low, high;
} entries;

CQ_INLINE entries load_codebook(const int8_t *centroids, const int32_t type) {
    const int32_t bits = cq_index_bits(type);
    const __m256i low = _mm256_cvtepi8_epi16(load_centroids(centroids, bits));
    return (entries){low, bits == 5 ? _mm256_cvtepi8_epi16(load_centroids(centroids + 16, bits)) : low};
}

/* scale: NULL for none. The byte in every position, with the lower half of each int16 cleared, is the scale times 256.
 */
CQ_INLINE __m256i scaled_table(__m256i codebook, const int8_t *scale) {
    const __m256i upper = _mm256_set1_epi16((short)0xff00);
    if (scale) codebook = _mm256_mulhrs_epi16(codebook, _mm256_and_si256(_mm256_set1_epi8(*scale), upper));
    /* packing leaves the two halves in qwords 0 and 2 */
    const __m256i table = _mm256_permute4x64_epi64(_mm256_packs_epi16(codebook, codebook), 0x88);
    return OFFSET ? _mm256_xor_si256(table, _mm256_set1_epi8((char)0x80)) : table;
}

CQ_INLINE entries table_of(entries codebook, const int32_t type, const int8_t *scale) {
    const __m256i low = scaled_table(codebook.low, scale);
    return (entries){low, cq_index_bits(type) == 5 ? scaled_table(codebook.high, scale) : low};
}

typedef struct {
    __m256i first, second;
} indices64, weights64;

typedef indices64 halves64; /* the top bit of each byte */

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
    const __m256i first = _mm256_shuffle_epi8(_mm256_set1_epi32((int32_t)plane), spread);
    const __m256i second = _mm256_shuffle_epi8(_mm256_set1_epi32((int32_t)(plane >> 32)), spread);
    return (halves64){_mm256_cmpeq_epi8(_mm256_and_si256(first, bit), bit),
                      _mm256_cmpeq_epi8(_mm256_and_si256(second, bit), bit)};
}

CQ_INLINE halves64 halves_of_fours(const uint8_t *above) {
    const __m256i bytes = load32(above);
    return (halves64){_mm256_slli_epi16(bytes, 4), bytes};
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
    const weights64 low = look_up(table, index);
    return (weights64){_mm256_blendv_epi8(low.first, _mm256_shuffle_epi8(table.high, index.first), halves.first),
                       _mm256_blendv_epi8(low.second, _mm256_shuffle_epi8(table.high, index.second), halves.second)};
}

#include "decode.h"

#include "avx2_gemv.h"
#include "avx2_panel.h"

/* Blocks [begin, end) of a row -> bytes at out; the span moves on with them. */
CQ_INLINE void decode_blocks(const int32_t type, const cq_row *row, cq_span *span, int32_t begin, int32_t end,
                             uint8_t *out) {
    for (int32_t b = begin; b < end;) {
        if (b == span->end) cq_next_span(row, type, span);
        const entries table = table_of(load_codebook(span->centroids, type), type, span->group_scale);
        for (const int32_t stop = cq_min(end, span->end); b < stop; b++, out += CQ_BLOCK) {
            const weights64 weights = decode_row_block(row, type, b, table);
            _mm256_store_si256((__m256i *)out, weights.first);
            _mm256_store_si256((__m256i *)(out + 32), weights.second);
        }
    }
}

CQ_INLINE void decode_half(const int32_t type, const cq_matrix *w, int64_t row, int32_t n_rows, uint8_t *panel) {
    enum { CHUNK = CHUNK_BLOCKS * CQ_BLOCK };
    const int32_t n_blocks = w->n_cols / CQ_BLOCK;
    uint8_t decoded[HALF_ROWS * CHUNK] __attribute__((aligned(32)));
    cq_row rows[HALF_ROWS];
    cq_span spans[HALF_ROWS];
    memset(decoded, OFFSET, sizeof decoded); /* rows beyond the matrix: weight zero */
    for (int32_t r = 0; r < n_rows; r++) rows[r] = cq_row_at(w, row + r), spans[r] = cq_first_span(&rows[r]);
    for (int32_t b = 0; b < n_blocks; b += CHUNK_BLOCKS) {
        const int32_t end = cq_min(n_blocks, b + CHUNK_BLOCKS);
        for (int32_t r = 0; r < n_rows; r++) decode_blocks(type, &rows[r], &spans[r], b, end, decoded + r * CHUNK);
        for (int32_t col = 0; col < (end - b) * CQ_BLOCK; col += 32)
            transpose_block(decoded + col, CHUNK, panel + ((int64_t)b * CQ_BLOCK + col) * PANEL_ROWS);
    }
}

/* Two halves of eight rows. */
static void decode_panel(const cq_matrix *w, int64_t row, int32_t n_rows, uint8_t *panel) {
    for (int32_t half = 0; half < 2; half++) {
        const int32_t first = half * HALF_ROWS, n = cq_min(n_rows - first, HALF_ROWS) * (n_rows > first);
        CQ_WITH_TYPE(w, decode_half, w, row + first, n, panel + 4 * first)
    }
}

static int64_t peak_macs(int32_t iterations) {
    enum { CHAINS = 12 };
    __m256i sum[CHAINS], w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(5);
#pragma GCC unroll 12
    for (int32_t i = 0; i < CHAINS; i++) sum[i] = _mm256_setzero_si256();
    for (int32_t i = 0; i < iterations; i++)
#pragma GCC unroll 12
        for (int32_t j = 0; j < CHAINS; j++) {
#ifdef CQ_DPBUSD
            sum[j] = CQ_DPBUSD(sum[j], w, x);
#else
            __asm__ volatile("" : "+x"(x)); /* each product is computed anew */
            const __m256i pairs = _mm256_maddubs_epi16(w, x);
            sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
            __asm__ volatile("" : "+x"(sum[j]));
        }
    return (int64_t)iterations * CHAINS * 32;
}

static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
