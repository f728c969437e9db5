/* Which table a block of weights looks up, and how tables are made, in AVX-512. Included after the target pragma.
 *
 * A table is the codebook times the group scale: vpmulhrsw of a centroid and scale * 256 is (c * scale * 256 + 16384)
 * >> 15 = (c * scale + 64) >> 7, the format's rounding. Then 128 is added: vpdpbusd multiplies unsigned by signed
 * bytes. */
#ifndef CQ_AVX512_TABLES_H
#define CQ_AVX512_TABLES_H
#include "isa/avx512_lookup.h"

/* Where tables come from: one for the whole row; a scale per block or per two blocks, under codebooks that change only
 * between groups of four blocks; anything else. */
enum table_source { ROW_TABLE, BLOCK_SCALES, PAIR_SCALES, SPANS };

CQ_INLINE enum table_source table_source_of(const cq_matrix *w) {
    const int one_codebook = w->codebook_cols >= w->n_cols;
    if (one_codebook && (w->scale_cols == 0 || w->scale_cols >= w->n_cols)) return ROW_TABLE;
    if (!one_codebook && w->codebook_cols % (4 * CQ_BLOCK)) return SPANS;
    return w->scale_cols == CQ_BLOCK ? BLOCK_SCALES : w->scale_cols == 2 * CQ_BLOCK ? PAIR_SCALES : SPANS;
}

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
#endif
