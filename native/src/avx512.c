/* AVX-512 with VNNI (Cascade Lake, Ice Lake, Zen 4 and later).
 *
 * vpdpbusd multiplies unsigned by signed bytes, so weights are kept as W + 128 (the table is xored with 0x80 once) and
 * 128 * sum(x) is subtracted at the end. A block of 64 weights is one register:
 *
 *   indices   CQ4: 32 bytes in both halves, the upper half shifted right by 4. CQ2: 16 bytes in all four lanes, shifted
 *             by 0, 2, 4, 6. CQ3: as CQ2, and the 8 bytes of high bits are a mask register.
 *   table     16 bytes in every lane for vpshufb: centroids, times the group's scale. vpmulhrsw of c and scale * 256 is
 *             (c * scale * 256 + 16384) >> 15 = (c * scale + 64) >> 7, the format's rounding.
 *
 * Only bytes of the matrix are read: blocks have exactly the widths of the loads, codebooks and scales are copied. */
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))),     \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#include <immintrin.h>
#endif
#include "indices.h"
#include "x86.h"

#define CQ_LANES 16
#define CQ_TILE_VECS 4
#define CQ_SCORE_KEYS 16
typedef __m512 vec;

static inline float sum_lanes(vec v) { return _mm512_reduce_add_ps(v); }

#include "float_ops.h"

/* Where tables come from: one for the whole row; one codebook and a scale per block; anything else. */
enum table_source { ROW_TABLE, BLOCK_SCALES, SPANS };

static enum table_source table_source_of(const cq_matrix *w) {
    if (w->codebook_cols < w->n_cols) return SPANS;
    if (w->scale_cols == CQ_BLOCK) return BLOCK_SCALES;
    return w->scale_cols == 0 || w->scale_cols >= w->n_cols ? ROW_TABLE : SPANS;
}

typedef struct {
    cq_row row;
    cq_span span;
    __m512i table;     /* of the span */
    __m512i low, high; /* BLOCK_SCALES: centroids 0..7 and 8..15 as int16 in every lane */
} cursor;

CQ_INLINE __m512i span_table(const cq_span *span, const int32_t bits) {
    __m256i wide = _mm256_cvtepi8_epi16(load_centroids(span->centroids, bits));
    if (span->group_scale) wide = _mm256_mulhrs_epi16(wide, _mm256_set1_epi16((short)(*span->group_scale << 8)));
    const __m128i table = _mm256_cvtepi16_epi8(wide);
    return _mm512_xor_si512(_mm512_broadcast_i32x4(table), _mm512_set1_epi8(-128));
}

CQ_INLINE cursor cursor_at(const cq_matrix *w, int64_t row, const int32_t bits, const enum table_source source) {
    cursor c = {.row = cq_row_at(w, row)};
    c.span = cq_first_span(&c.row);
    if (source == BLOCK_SCALES) {
        const __m128i centroids = load_centroids(c.row.centroids, bits);
        c.low = _mm512_broadcast_i32x4(_mm_cvtepi8_epi16(centroids));
        c.high = _mm512_broadcast_i32x4(_mm_cvtepi8_epi16(_mm_srli_si128(centroids, 8)));
    }
    c.table = span_table(&c.span, bits);
    return c;
}

/* Tables of blocks b .. b + n - 1, n <= 4. */
CQ_INLINE void tables_at(cursor *c, const int32_t bits, const enum table_source source, int32_t b, const int32_t n,
                         __m512i tables[4]) {
    if (source == BLOCK_SCALES) {
        int32_t scales = 0;
        memcpy(&scales, c->row.group_scales + b, (size_t)n);
        /* Lane i takes byte i as the high byte of every int16: the scale times 256. */
        const __m512i spread = _mm512_set_epi32(0x03ff03ff, 0x03ff03ff, 0x03ff03ff, 0x03ff03ff, 0x02ff02ff, 0x02ff02ff,
                                                0x02ff02ff, 0x02ff02ff, 0x01ff01ff, 0x01ff01ff, 0x01ff01ff, 0x01ff01ff,
                                                0x00ff00ff, 0x00ff00ff, 0x00ff00ff, 0x00ff00ff);
        const __m512i scale = _mm512_shuffle_epi8(_mm512_set1_epi32(scales), spread);
        const __m512i four = _mm512_xor_si512(
            _mm512_packs_epi16(_mm512_mulhrs_epi16(c->low, scale), _mm512_mulhrs_epi16(c->high, scale)),
            _mm512_set1_epi8(-128));
        tables[0] = _mm512_shuffle_i32x4(four, four, 0x00);
        tables[1] = _mm512_shuffle_i32x4(four, four, 0x55);
        tables[2] = _mm512_shuffle_i32x4(four, four, 0xaa);
        tables[3] = _mm512_shuffle_i32x4(four, four, 0xff);
        return;
    }
    for (int32_t i = 0; i < n; i++) {
        if (source == SPANS && b + i == c->span.end) {
            cq_next_span(&c->row, bits, &c->span);
            c->table = span_table(&c->span, bits);
        }
        tables[i] = c->table;
    }
}

/* Block b of a row -> 64 bytes W + 128 in column order. */
CQ_INLINE __m512i decode_block(const cq_row *row, const int32_t bits, int32_t b, __m512i table) {
    const uint8_t *block = row->indices + (int64_t)b * 8 * bits;
    if (bits == 4) {
        const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)block));
        const __m512i shifted = _mm512_srlv_epi64(both, _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0));
        return _mm512_shuffle_epi8(table, _mm512_and_si512(shifted, _mm512_set1_epi8(15)));
    }
    const __m512i lanes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)block));
    const __m512i shifted = _mm512_srlv_epi64(lanes, _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0));
    __m512i index = _mm512_and_si512(shifted, _mm512_set1_epi8(3));
    if (bits == 3) {
        __mmask64 high;
        memcpy(&high, block + 16, 8);
        index = _mm512_mask_add_epi8(index, high, index, _mm512_set1_epi8(4));
    }
    return _mm512_shuffle_epi8(table, index);
}

/* sum[r] += blocks b .. b + n - 1 of N rows. x is loaded once for all of them. */
CQ_INLINE void gemv_step(const int32_t N, const int32_t bits, const enum table_source source, cursor *c, int32_t b,
                         const int32_t n, const int8_t *x, __m512i *sum) {
#pragma GCC unroll 4
    for (int32_t r = 0; r < N; r++) {
        __m512i tables[4];
        tables_at(&c[r], bits, source, b, n, tables);
#pragma GCC unroll 4
        for (int32_t i = 0; i < n; i++)
            sum[r] = _mm512_dpbusd_epi32(sum[r], decode_block(&c[r].row, bits, b + i, tables[i]),
                                         _mm512_loadu_si512(x + (b + i) * CQ_BLOCK));
    }
}

/* N rows at once: their independent sums and streams hide latency. */
CQ_INLINE void gemv_rows(const int32_t N, const int32_t bits, const enum table_source source, const cq_matrix *w,
                         int64_t row, const int8_t *x, int32_t x_sum, int32_t *acc) {
    const int32_t n_blocks = w->n_cols / CQ_BLOCK;
    cursor c[4];
    __m512i sum[4];
#pragma GCC unroll 4
    for (int32_t r = 0; r < N; r++) c[r] = cursor_at(w, row + r, bits, source), sum[r] = _mm512_setzero_si512();
    int32_t b = 0;
    for (; b + 4 <= n_blocks; b += 4) {
#pragma GCC unroll 4
        for (int32_t r = 0; r < N; r++)
            _mm_prefetch((const char *)c[r].row.indices + (int64_t)b * 8 * bits + 1024, _MM_HINT_T0);
        gemv_step(N, bits, source, c, b, 4, x, sum);
    }
    for (; b < n_blocks; b++) gemv_step(N, bits, source, c, b, 1, x, sum);
#pragma GCC unroll 4
    for (int32_t r = 0; r < N; r++) acc[r] = _mm512_reduce_add_epi32(sum[r]) - 128 * x_sum;
}

CQ_INLINE void gemv_all(const int32_t bits, const enum table_source source, const cq_matrix *w, int64_t row,
                        int32_t n_rows, const int8_t *x, int32_t x_sum, int32_t *acc) {
    int32_t r = 0;
    for (; r + 4 <= n_rows; r += 4) gemv_rows(4, bits, source, w, row + r, x, x_sum, acc + r);
    for (; r < n_rows; r++) gemv_rows(1, bits, source, w, row + r, x, x_sum, acc + r);
}

/* Calls function(bits, source, ...) with both as compile-time constants. */
#define CQ_SPECIALIZE(w, function, ...)                                                                                \
    switch (cq_bits(w) * 4 + (int32_t)table_source_of(w)) {                                                            \
    case 2 * 4 + ROW_TABLE: function(2, ROW_TABLE, __VA_ARGS__); break;                                                \
    case 2 * 4 + BLOCK_SCALES: function(2, BLOCK_SCALES, __VA_ARGS__); break;                                          \
    case 2 * 4 + SPANS: function(2, SPANS, __VA_ARGS__); break;                                                        \
    case 3 * 4 + ROW_TABLE: function(3, ROW_TABLE, __VA_ARGS__); break;                                                \
    case 3 * 4 + BLOCK_SCALES: function(3, BLOCK_SCALES, __VA_ARGS__); break;                                          \
    case 3 * 4 + SPANS: function(3, SPANS, __VA_ARGS__); break;                                                        \
    case 4 * 4 + ROW_TABLE: function(4, ROW_TABLE, __VA_ARGS__); break;                                                \
    case 4 * 4 + BLOCK_SCALES: function(4, BLOCK_SCALES, __VA_ARGS__); break;                                          \
    case 4 * 4 + SPANS: function(4, SPANS, __VA_ARGS__); break;                                                        \
    }

static void gemv(const cq_matrix *w, int64_t row, int32_t n_rows, const int8_t *x, int32_t x_sum, int32_t *acc) {
    CQ_SPECIALIZE(w, gemv_all, w, row, n_rows, x, x_sum, acc)
}

enum { PANEL_ROWS = 32, HALF_ROWS = 16, PANEL_STEP = 4 * PANEL_ROWS, TILE_TOKENS = 12, TILE_COLS = 1024 };

/* out[k * PANEL_STEP] = dword k of each of 16 rows, for k < 16: a transposition of 16 x 16 dwords. */
static inline void transpose_block(const uint8_t *rows, int32_t stride, uint8_t *out) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int32_t i = 0; i < 16; i++) a[i] = _mm512_load_si512(rows + i * stride);
#pragma GCC unroll 8
    for (int32_t i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int32_t i = 0; i < 16; i += 4) { /* a[i + j]: in lane l, dword 4 l + j of rows i .. i + 3 */
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; j++) {
        const __m512i even_lo = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd_lo = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even_hi = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88), odd_hi = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_store_si512(out + j * PANEL_STEP, _mm512_shuffle_i32x4(even_lo, even_hi, 0x88));
        _mm512_store_si512(out + (4 + j) * PANEL_STEP, _mm512_shuffle_i32x4(odd_lo, odd_hi, 0x88));
        _mm512_store_si512(out + (8 + j) * PANEL_STEP, _mm512_shuffle_i32x4(even_lo, even_hi, 0xdd));
        _mm512_store_si512(out + (12 + j) * PANEL_STEP, _mm512_shuffle_i32x4(odd_lo, odd_hi, 0xdd));
    }
}

CQ_INLINE void decode_half(const int32_t bits, const enum table_source source, const cq_matrix *w, int64_t row,
                           int32_t n_rows, uint8_t *panel) {
    enum { CHUNK = 4 * CQ_BLOCK };
    const int32_t n_blocks = w->n_cols / CQ_BLOCK;
    uint8_t rows[HALF_ROWS * CHUNK] __attribute__((aligned(64)));
    cursor c[HALF_ROWS];
    memset(rows, 128, sizeof rows); /* rows beyond the matrix: weight zero */
    for (int32_t r = 0; r < n_rows; r++) c[r] = cursor_at(w, row + r, bits, source);
    for (int32_t b = 0; b < n_blocks; b += 4) {
        const int32_t n = cq_min(4, n_blocks - b);
        for (int32_t r = 0; r < n_rows; r++) {
            __m512i tables[4];
            tables_at(&c[r], bits, source, b, n, tables);
            for (int32_t i = 0; i < n; i++)
                _mm512_store_si512(rows + r * CHUNK + i * CQ_BLOCK, decode_block(&c[r].row, bits, b + i, tables[i]));
        }
        for (int32_t i = 0; i < n; i++)
            transpose_block(rows + i * CQ_BLOCK, CHUNK, panel + (int64_t)(b + i) * CQ_BLOCK * PANEL_ROWS);
    }
}

/* The panel is uint8 [n_cols / 4][PANEL_ROWS][4]: W + 128. */
static void decode_panel(const cq_matrix *w, int64_t row, int32_t n_rows, uint8_t *panel) {
    const int32_t first = cq_min(n_rows, HALF_ROWS), second = n_rows - first;
    CQ_SPECIALIZE(w, decode_half, w, row, first, panel)
    CQ_SPECIALIZE(w, decode_half, w, row + first, second, panel + 4 * HALF_ROWS)
}

/* acc[N][PANEL_ROWS] (+)= panel times N tokens: 2 N accumulators, two weight registers, one broadcast. N is a constant and
 * everything is unrolled, else the compiler keeps the accumulators in memory. */
CQ_INLINE void tile(const int32_t N, const uint8_t *panel, const int8_t *const *tokens, int32_t col, int32_t n_cols,
                    int32_t *acc, int32_t first) {
    __m512i sum[TILE_TOKENS][2];
    const int8_t *x[TILE_TOKENS];
#pragma GCC unroll 12
    for (int32_t t = 0; t < N; t++) {
        x[t] = tokens[t] + col;
        sum[t][0] = first ? _mm512_setzero_si512() : _mm512_loadu_si512(acc + t * PANEL_ROWS);
        sum[t][1] = first ? _mm512_setzero_si512() : _mm512_loadu_si512(acc + t * PANEL_ROWS + 16);
    }
    for (int32_t k = 0; k < n_cols; k += 4, panel += PANEL_STEP) {
        const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 64);
#pragma GCC unroll 12
        for (int32_t t = 0; t < N; t++) {
            int32_t four;
            memcpy(&four, x[t] + k, 4);
            const __m512i activation = _mm512_set1_epi32(four);
            sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], w0, activation);
            sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], w1, activation);
        }
    }
#pragma GCC unroll 12
    for (int32_t t = 0; t < N; t++) {
        _mm512_storeu_si512(acc + t * PANEL_ROWS, sum[t][0]);
        _mm512_storeu_si512(acc + t * PANEL_ROWS + 16, sum[t][1]);
    }
}

#define CQ_TILE(N)                                                                                                     \
    static void tile_##N(const uint8_t *panel, const int8_t *const *x, int32_t col, int32_t n_cols, int32_t *acc) {    \
        tile(N, panel, x, col, n_cols, acc, col == 0);                                                                 \
    }
CQ_TILE(1) CQ_TILE(2) CQ_TILE(3) CQ_TILE(4) CQ_TILE(5) CQ_TILE(6)
CQ_TILE(7) CQ_TILE(8) CQ_TILE(9) CQ_TILE(10) CQ_TILE(11) CQ_TILE(12)

static void (*const tiles[])(const uint8_t *, const int8_t *const *, int32_t, int32_t, int32_t *) = {
    tile_1, tile_2, tile_3, tile_4, tile_5, tile_6, tile_7, tile_8, tile_9, tile_10, tile_11, tile_12};

/* TILE_COLS columns of the panel (32 KiB) serve all tokens before the next ones; tokens are dealt evenly to tiles, as 13
 * tokens in tiles of 7 and 6 take less than in 12 and 1. */
static void gemm_panel(const uint8_t *panel, int32_t n_cols, const int8_t *const *x, const int32_t *x_sum,
                       int32_t n_tokens, int32_t *acc) {
    const int32_t n_tiles = cq_ceil_div(n_tokens, TILE_TOKENS);
    for (int32_t col = 0; col < n_cols; col += TILE_COLS) {
        for (int32_t i = 0, t = 0; i < n_tiles; i++) {
            const int32_t n = cq_ceil_div(n_tokens - t, n_tiles - i);
            tiles[n - 1](panel + (int64_t)col * PANEL_ROWS, x + t, col, cq_min(TILE_COLS, n_cols - col),
                         acc + (int64_t)t * PANEL_ROWS);
            t += n;
        }
    }
    for (int32_t t = 0; t < n_tokens; t++) {
        const __m512i offset = _mm512_set1_epi32(128 * x_sum[t]);
        int32_t *out = acc + (int64_t)t * PANEL_ROWS;
        _mm512_storeu_si512(out, _mm512_sub_epi32(_mm512_loadu_si512(out), offset));
        _mm512_storeu_si512(out + 16, _mm512_sub_epi32(_mm512_loadu_si512(out + 16), offset));
    }
}

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

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

const cq_kernels cq_kernels_avx512 = {"avx512", supported, gemv, PANEL_ROWS, decode_panel, gemm_panel, dot_q8_0,
                                      peak_macs, CQ_FLOAT_KERNELS};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
