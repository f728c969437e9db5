/* Panels in AVX-512: decoding rows, transposing them into a panel, and multiplying it with tokens.
 *
 * A panel is uint8 [n_cols / 4][PANEL_ROWS][4], W + 128: one vpdpbusd multiplies four columns of 16 rows with four
 * columns of a token, broadcast. */
#ifndef CQ_AVX512_PANEL_H
#define CQ_AVX512_PANEL_H
#include "isa/avx512_tables.h"
#include "isa/panel_tiles.h"
#include "isa/template/decode.h"

enum { PANEL_ROWS = 32, PANEL_HEAD = 0, PANEL_COL_BYTES = PANEL_ROWS, HALF_ROWS = 16, PANEL_STEP = 4 * PANEL_ROWS };
enum { TILE_TOKENS = 12, BLOCK_TOKENS = 6, TILE_COLS = 4096 /* 128 KiB */ };

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
        const __m512i even_lo = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88),
                      odd_lo = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even_hi = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88),
                      odd_hi = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_store_si512(out + j * PANEL_STEP, _mm512_shuffle_i32x4(even_lo, even_hi, 0x88));
        _mm512_store_si512(out + (4 + j) * PANEL_STEP, _mm512_shuffle_i32x4(odd_lo, odd_hi, 0x88));
        _mm512_store_si512(out + (8 + j) * PANEL_STEP, _mm512_shuffle_i32x4(even_lo, even_hi, 0xdd));
        _mm512_store_si512(out + (12 + j) * PANEL_STEP, _mm512_shuffle_i32x4(odd_lo, odd_hi, 0xdd));
    }
}

/* 32 columns at a time: row r beside row r + 16, so that one transposition takes both halves. */
static void pack_panel(const int8_t *rows, int64_t stride, int32_t n_rows, int32_t n_cols, uint8_t *panel) {
    uint8_t pairs[HALF_ROWS * 64] __attribute__((aligned(64))), lines[16 * PANEL_STEP] __attribute__((aligned(64)));
    memset(pairs, 128, sizeof pairs);
    for (int32_t k = 0; k < n_cols; k += 32, panel += 8 * PANEL_STEP) {
        for (int32_t r = 0; r < n_rows; r++)
            _mm256_store_si256(
                (__m256i *)(pairs + r % HALF_ROWS * 64 + r / HALF_ROWS * 32),
                _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(rows + r * stride + k)), _mm256_set1_epi8(-128)));
        transpose_block(pairs, 64, lines);
        for (int32_t i = 0; i < 16; i++) memcpy(panel + i % 8 * PANEL_STEP + i / 8 * 64, lines + i * PANEL_STEP, 64);
    }
}

enum { CHUNK_BLOCKS = 4, CHUNK = CHUNK_BLOCKS * CQ_BLOCK };

/* Blocks b .. b + n - 1, n <= CHUNK_BLOCKS, of up to HALF_ROWS rows. Rows that share a codebook follow each other. The
 * same place in the next panel is fetched, for when this one has been multiplied. */
CQ_INLINE void decode_chunk(const int32_t n, const int32_t type, const enum table_source source, cursor *c,
                            int32_t n_rows, int32_t b, uint8_t *rows) {
    const int32_t which = b / c->row.codebook_blocks << cq_index_bits(type);
    codebook book = {0};
    for (int32_t r = 0; r < n_rows; r++) {
        const cq_row *row = &c[r].row;
        if (scales_codebook(source) && row->centroids + which != book.centroids)
            book = load_codebook(row->centroids + which, 0, type);
        const int32_t block_bytes = 8 * cq_stored_bits(type);
        const uint8_t *next = row->indices + (int64_t)block_bytes * (row->n_blocks * PANEL_ROWS + b);
        for (int32_t line = 0; line < n * block_bytes; line += 64) _mm_prefetch((const char *)next + line, _MM_HINT_T1);
        entries tables[CHUNK_BLOCKS];
        tables_at(&c[r], &book, type, source, b, n, tables);
#pragma GCC unroll 4
        for (int32_t i = 0; i < n; i++)
            _mm512_store_si512(rows + r * CHUNK + i * CQ_BLOCK, decode_row_block(row, type, b + i, tables[i]));
    }
}

CQ_INLINE void decode_half(const int32_t type, const enum table_source source, const cq_matrix *w, int64_t row,
                           int32_t n_rows, uint8_t *panel) {
    const int32_t n_blocks = w->n_cols / CQ_BLOCK;
    uint8_t rows[HALF_ROWS * CHUNK] __attribute__((aligned(64)));
    cursor c[HALF_ROWS];
    if (n_rows < HALF_ROWS) memset(rows, 128, sizeof rows); /* rows beyond the matrix: weight zero */
    for (int32_t r = 0; r < n_rows; r++) c[r] = cursor_at(w, row + r, type, source);
    for (int32_t b = 0, n; b < n_blocks; b += n) {
        n = n_blocks - b < CHUNK_BLOCKS ? 1 : CHUNK_BLOCKS;
        if (n_rows > 0 && n == CHUNK_BLOCKS) decode_chunk(CHUNK_BLOCKS, type, source, c, n_rows, b, rows);
        if (n_rows > 0 && n == 1) decode_chunk(1, type, source, c, n_rows, b, rows);
        for (int32_t i = 0; i < n; i++)
            transpose_block(rows + i * CQ_BLOCK, CHUNK, panel + (int64_t)(b + i) * CQ_BLOCK * PANEL_ROWS);
    }
}

static void decode_panel(const cq_matrix *w, int64_t row, int32_t n_rows, uint8_t *panel) {
    const int32_t first = cq_min(n_rows, HALF_ROWS), second = n_rows - first;
    CQ_SPECIALIZE(w, decode_half, w, row, first, panel)
    CQ_SPECIALIZE(w, decode_half, w, row + first, second, panel + 4 * HALF_ROWS)
}
typedef struct {
    __m512i half[2];
} tile_sums;

/* Floats of one token from its accumulators. */
CQ_INLINE void scale_token(const tile_sums sum, const cq_scaling *to, int32_t t) {
    const __m512 token_scale = _mm512_set1_ps(to->token_scales[t]);
    for (int32_t h = 0; h < 2; h++) {
        const int32_t n = cq_min(16, to->n_rows - 16 * h);
        if (n <= 0) break;
        const __mmask16 rows = (__mmask16)((1u << n) - 1);
        const __m512 scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(rows, to->row_scales + 16 * h), token_scale);
        const __m512 value = _mm512_cvtepi32_ps(sum.half[h]);
        float *out = to->out[t] + 16 * h;
        _mm512_mask_storeu_ps(out, rows,
                              to->accumulate ? _mm512_fmadd_ps(value, scale, _mm512_maskz_loadu_ps(rows, out))
                                             : _mm512_mul_ps(value, scale));
    }
}

/* What a token's sums start from: what the weights' offset adds to them. */
CQ_INLINE tile_sums first_sums(const uint8_t *panel, int32_t x_sum) {
    const __m512i offset = _mm512_set1_epi32(-128 * x_sum);
    (void)panel;
    return (tile_sums){{offset, offset}};
}

/* sum[N] += columns of a panel times columns of N tokens: 2 N accumulators, two weight registers, one broadcast. N is a
 * constant and everything is unrolled, else the compiler keeps the sums in memory. */
CQ_INLINE void add_columns(const int32_t N, const uint8_t *columns, int32_t n_cols, const int8_t *const *x,
                           tile_sums *sum) {
    for (int32_t k = 0; k < n_cols; k += 4, columns += PANEL_STEP) {
        const __m512i w0 = _mm512_load_si512(columns), w1 = _mm512_load_si512(columns + 64);
#pragma GCC unroll 12
        for (int32_t t = 0; t < N; t++) {
            int32_t four;
            memcpy(&four, x[t] + k, 4);
            const __m512i activation = _mm512_set1_epi32(four);
            sum[t].half[0] = _mm512_dpbusd_epi32(sum[t].half[0], w0, activation);
            sum[t].half[1] = _mm512_dpbusd_epi32(sum[t].half[1], w1, activation);
        }
    }
}

/* Columns of a panel times N tokens. Sums start from acc, at the first column from first_sums, and end in acc, or
 * scaled where `to` is given. */
CQ_INLINE void tile(const int32_t N, const tile_columns *c, const int8_t *const *tokens, const int32_t *x_sum,
                    int32_t first_token, int32_t *acc) {
    tile_sums sum[TILE_TOKENS];
    const int8_t *x[TILE_TOKENS];
#pragma GCC unroll 12
    for (int32_t t = 0; t < N; t++) {
        const int32_t *from = acc + t * PANEL_ROWS;
        x[t] = tokens[t] + c->col;
        sum[t] = c->col ? (tile_sums){{_mm512_loadu_si512(from), _mm512_loadu_si512(from + 16)}}
                        : first_sums(c->panel, x_sum[t]);
    }
    add_columns(N, c->panel + (int64_t)c->col * PANEL_COL_BYTES, c->n_cols, x, sum);
#pragma GCC unroll 12
    for (int32_t t = 0; t < N; t++) {
        if (c->to) {
            scale_token(sum[t], c->to, first_token + t);
            continue;
        }
        _mm512_storeu_si512(acc + t * PANEL_ROWS, sum[t].half[0]);
        _mm512_storeu_si512(acc + t * PANEL_ROWS + 16, sum[t].half[1]);
    }
}

/* clang-format off */
CQ_TILE(1) CQ_TILE(2) CQ_TILE(3) CQ_TILE(4) CQ_TILE(5) CQ_TILE(6)
CQ_TILE(7) CQ_TILE(8) CQ_TILE(9) CQ_TILE(10) CQ_TILE(11) CQ_TILE(12)

static tile_function *const tiles[TILE_TOKENS] = {
    tile_1, tile_2, tile_3, tile_4, tile_5, tile_6, tile_7, tile_8, tile_9, tile_10, tile_11, tile_12};
/* clang-format on */

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
#endif
