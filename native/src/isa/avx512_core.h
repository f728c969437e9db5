/* AVX-512 kernels with VNNI, compiled twice: by avx512.c, and by avx512vbmi.c with look-ups across lanes (CQ_VBMI).
 *
 * vpdpbusd multiplies unsigned by signed bytes, so weights are kept as W + 128 (the table is xored with 0x80 once) and
 * 128 * sum(x) is subtracted at the end. A block of 64 weights is one register:
 *
 *   indices   CQ4: 32 bytes in both halves, the upper half shifted right by 4. CQ2: 16 bytes in all four lanes, shifted
 *             by 0, 2, 4, 6. All other bits of an index lie in planes of 8 bytes, which are mask registers.
 *   table     vpmulhrsw of a centroid and scale * 256 is (c * scale * 256 + 16384) >> 15 = (c * scale + 64) >> 7, the
 *             format's rounding. avx512_lookup.h has what becomes of it.
 *
 * Only bytes of the matrix are read: blocks have exactly the widths of the loads, codebooks and scales are copied. */
#ifndef CQ_AVX512_CORE_H
#define CQ_AVX512_CORE_H
#define CQ_DPBUSD _mm256_dpbusd_epi32
#include "isa/indices.h"
#include "isa/x86.h"

#define CQ_LANES 16
#define CQ_TILE_VECS 4
#define CQ_SCORE_KEYS 8
#define CQ_SCORE_VECS 2
typedef __m512 vec;

static inline vec repeat_four(const float *p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
static inline vec min_vec(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline vec max_vec(vec a, vec b) { return _mm512_max_ps(a, b); }
/* By a step of Newton's: half of the time of a division. */
static inline vec reciprocal(vec v) {
    const vec near = _mm512_rcp14_ps(v);
    return near * (2.0f - v * near);
}
static inline float sum_lanes(vec v) { return _mm512_reduce_add_ps(v); }
static inline void store_low_bytes(int8_t *out, vec v) {
    _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(_mm512_castps_si512(v)));
}

#include "isa/template/float_ops.h"
#include "isa/avx512_panel.h"
#include "isa/template/gemm_blocks.h"

/* Where tables come from: one for the whole row; a scale per block or per two blocks, under codebooks that change only
 * between groups of four blocks; anything else. */
enum table_source { ROW_TABLE, BLOCK_SCALES, PAIR_SCALES, SPANS };

static enum table_source table_source_of(const cq_matrix *w) {
    const int one_codebook = w->codebook_cols >= w->n_cols;
    if (one_codebook && (w->scale_cols == 0 || w->scale_cols >= w->n_cols)) return ROW_TABLE;
    if (!one_codebook && w->codebook_cols % (4 * CQ_BLOCK)) return SPANS;
    return w->scale_cols == CQ_BLOCK ? BLOCK_SCALES : w->scale_cols == 2 * CQ_BLOCK ? PAIR_SCALES : SPANS;
}

CQ_INLINE int32_t n_halves(const int32_t type) { return cq_index_bits(type) == 5 ? 2 : 1; }

/* In each lane the entries of a block's table, 0 to 15 and 16 to 31; the latter unused by smaller codebooks. */
typedef struct {
    __m512i half[2];
} lanes_of_entries;

#include "isa/avx512_lookup.h"

/* ROW_TABLE and SPANS: a row and the table of its current span. */
typedef struct {
    cq_row row;
    cq_span span;
    entries table;
} cursor;

/* BLOCK_SCALES and PAIR_SCALES: a codebook, entries 0..7 and 8..15 as int16 in every lane, for the scales to multiply.
 */
typedef struct {
    const int8_t *centroids;
    int32_t end; /* the first block of the next codebook */
    lanes_of_entries low, high;
} codebook;

CQ_INLINE entries span_table(const cq_span *span, const int32_t type) {
    lanes_of_entries table = {{_mm512_setzero_si512(), _mm512_setzero_si512()}};
#pragma GCC unroll 2
    for (int32_t i = 0; i < n_halves(type); i++) {
        __m256i wide = _mm256_cvtepi8_epi16(load_centroids(span->centroids + 16 * i, cq_index_bits(type)));
        if (span->group_scale) wide = _mm256_mulhrs_epi16(wide, _mm256_set1_epi16((short)(*span->group_scale * 256)));
        const __m512i lanes = _mm512_broadcast_i32x4(_mm256_cvtepi16_epi8(wide));
        table.half[i] = _mm512_xor_si512(lanes, _mm512_set1_epi8(-128));
    }
    return table_of_lane(&table, type, 0);
}

CQ_INLINE int scales_codebook(const enum table_source source) {
    return source == BLOCK_SCALES || source == PAIR_SCALES;
}

CQ_INLINE codebook load_codebook(const int8_t *centroids, int32_t end, const int32_t type) {
    codebook book = {centroids, end, {{_mm512_setzero_si512()}}, {{_mm512_setzero_si512()}}};
#pragma GCC unroll 2
    for (int32_t i = 0; i < n_halves(type); i++) {
        const __m128i half = load_centroids(centroids + 16 * i, cq_index_bits(type));
        book.low.half[i] = _mm512_broadcast_i32x4(_mm_cvtepi8_epi16(half));
        book.high.half[i] = _mm512_broadcast_i32x4(_mm_cvtepi8_epi16(_mm_srli_si128(half, 8)));
    }
    return book;
}

/* The codebook of block b, the one after the last block asked for at most. */
CQ_INLINE void move_codebook(codebook *book, const cq_row *row, const int32_t type, int32_t b) {
    if (b == book->end)
        *book = load_codebook(book->centroids + (1 << cq_index_bits(type)), book->end + row->codebook_blocks, type);
}

CQ_INLINE cursor cursor_at(const cq_matrix *w, int64_t row, const int32_t type, const enum table_source source) {
    cursor c = {.row = cq_row_at(w, row)};
    if (scales_codebook(source)) return c;
    c.span = cq_first_span(&c.row);
    c.table = span_table(&c.span, type);
    return c;
}

/* Four tables in the four lanes, of the four bytes of scales or, with PAIR_SCALES, the first two, twice each. A lane
 * takes the high byte of its int16 from its scale: the scale times 256. */
CQ_INLINE lanes_of_entries four_tables(const codebook *book, int32_t scales, const int32_t type,
                                       const enum table_source source) {
    const int32_t step = source == PAIR_SCALES ? 0 : 0x01000100, lane1 = 0x00ff00ff + step,
                  lane2 = source == PAIR_SCALES ? 0x01ff01ff : 0x02ff02ff, lane3 = lane2 + step;
    const __m512i spread = _mm512_set_epi32(lane3, lane3, lane3, lane3, lane2, lane2, lane2, lane2, lane1, lane1, lane1,
                                            lane1, 0x00ff00ff, 0x00ff00ff, 0x00ff00ff, 0x00ff00ff);
    const __m512i scale = _mm512_shuffle_epi8(_mm512_set1_epi32(scales), spread);
    lanes_of_entries four = {{_mm512_setzero_si512(), _mm512_setzero_si512()}};
#pragma GCC unroll 2
    for (int32_t i = 0; i < n_halves(type); i++) {
        const __m512i low = _mm512_mulhrs_epi16(book->low.half[i], scale),
                      high = _mm512_mulhrs_epi16(book->high.half[i], scale);
        four.half[i] = _mm512_xor_si512(_mm512_packs_epi16(low, high), _mm512_set1_epi8(-128));
    }
    return four;
}

CQ_INLINE void split_tables(const lanes_of_entries *four, const int32_t type, entries tables[4]) {
    tables[0] = table_of_lane(four, type, 0);
    tables[1] = table_of_lane(four, type, 1);
    tables[2] = table_of_lane(four, type, 2);
    tables[3] = table_of_lane(four, type, 3);
}

/* Tables of blocks b .. b + n - 1: n <= 4 from a multiple of 4, or one. */
CQ_INLINE void tables_at(cursor *c, const codebook *book, const int32_t type, const enum table_source source, int32_t b,
                         const int32_t n, entries tables[4]) {
    if (scales_codebook(source)) {
        const int32_t blocks_per_scale = source == PAIR_SCALES ? 2 : 1;
        int32_t scales = 0;
        memcpy(&scales, c->row.group_scales + b / blocks_per_scale, (size_t)cq_ceil_div(n, blocks_per_scale));
        const lanes_of_entries four = four_tables(book, scales, type, source);
        split_tables(&four, type, tables);
        return;
    }
#pragma GCC unroll 4
    for (int32_t i = 0; i < n; i++) {
        if (source == SPANS && b + i == c->span.end) {
            cq_next_span(&c->row, type, &c->span);
            c->table = span_table(&c->span, type);
        }
        tables[i] = c->table;
    }
}

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

#include "isa/template/decode.h"

#include "isa/avx512_gemv.h"

/* Calls function(type, source, ...) with both as compile-time constants. */
#define CQ_SOURCE_CASE(type, source, function, ...)                                                                    \
    case source:                                                                                                       \
        function(type, source, __VA_ARGS__);                                                                           \
        break;
#define CQ_WITH_SOURCE(type, w, ...)                                                                                   \
    switch (table_source_of(w)) {                                                                                      \
        CQ_SOURCE_CASE(type, ROW_TABLE, __VA_ARGS__)                                                                   \
        CQ_SOURCE_CASE(type, BLOCK_SCALES, __VA_ARGS__)                                                                \
        CQ_SOURCE_CASE(type, PAIR_SCALES, __VA_ARGS__)                                                                 \
        CQ_SOURCE_CASE(type, SPANS, __VA_ARGS__)                                                                       \
    }
#define CQ_SPECIALIZE(w, ...) CQ_WITH_TYPE(w, CQ_WITH_SOURCE, w, __VA_ARGS__)

static void gemv(const cq_matrix *w, int64_t row, int32_t n_rows, const int8_t *x, int32_t x_sum, int32_t *acc) {
    CQ_SPECIALIZE(w, gemv_all, w, row, n_rows, x, x_sum, acc)
}

#include "isa/avx512_decode.h"

static int64_t peak_macs(int32_t iterations) {
    __m512i sum[TILE_TOKENS], w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(5);
#pragma GCC unroll 12
    for (int32_t i = 0; i < TILE_TOKENS; i++) sum[i] = _mm512_setzero_si512();
    for (int32_t i = 0; i < iterations; i++)
#pragma GCC unroll 12
        for (int32_t j = 0; j < TILE_TOKENS; j++) {
            sum[j] = _mm512_dpbusd_epi32(sum[j], w, x);
            __asm__ volatile("" : "+v"(sum[j])); /* no iteration is dropped or merged */
        }
    return (int64_t)iterations * TILE_TOKENS * 64;
}

static int has_avx512_vnni(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
#endif
