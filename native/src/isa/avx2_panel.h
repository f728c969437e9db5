/* Panels in AVX2: decoding rows, transposing them into a panel, and multiplying it with tokens.
 *
 * With a dot product of unsigned and signed bytes a panel is bytes [n_cols / 4][PANEL_ROWS][4], W + 128. Without one
 * vpmaddubsw multiplies |W| with an x that has W's sign, but for a one: x ^ m = -x - 1 where m is -1. An exclusive or
 * may run on any vector unit, a negation only on those that multiply. So for every four columns there are |W| and then
 * m, and before all columns what that one takes from a row, as int32 [PANEL_ROWS]: the sum of |W| where W < 0. A pair
 * is at most 2 * 128 * 127 and at least 2 * 128 * -128, which int16 holds. */
#ifndef CQ_AVX2_PANEL_H
#define CQ_AVX2_PANEL_H
#include "isa/avx2_lookup.h"
#include "isa/avx2_vectors.h"
#include "isa/panel_tiles.h"
#include "isa/template/decode.h"
#include "isa/template/float_ops.h"

/* Of a tile: accumulators, weights (and their signs), an activation and a product fill 16 registers. */
#ifdef CQ_DPBUSD
enum { PANEL_OFFSET = 128, TILE_TOKENS = 6, BLOCK_TOKENS = 6, PLANES = 1 };
#else
enum { PANEL_OFFSET = 0, TILE_TOKENS = 4, BLOCK_TOKENS = 4, PLANES = 2 };
#endif
enum { PANEL_ROWS = 16, HALF_ROWS = 8, PLANE = 4 * PANEL_ROWS, PANEL_STEP = PLANES * PLANE };
enum { PANEL_HEAD = PLANES == 2 ? 4 * PANEL_ROWS : 0, PANEL_COL_BYTES = PLANES * PANEL_ROWS };
enum { CHUNK_BLOCKS = 4, TILE_COLS = 1024 /* 16 or 32 KiB */ };

/* Four columns of eight rows. Returns, in pairs of columns as int16, what their signs take from the rows. */
CQ_INLINE __m256i store_weights(__m256i w, uint8_t *out) {
    const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), w), magnitude = _mm256_abs_epi8(w);
    _mm256_store_si256((__m256i *)out, PLANES == 2 ? magnitude : w);
    if (PLANES == 2) _mm256_store_si256((__m256i *)(out + PLANE), negative);
    return _mm256_maddubs_epi16(_mm256_and_si256(magnitude, negative), _mm256_set1_epi8(1));
}

/* Eight rows, of which out holds the first half or the second: 32 columns, a transposition of 8 x 8 dwords, and what
 * their signs take is added to head. */
static inline void transpose_block(const uint8_t *rows, int32_t stride, uint8_t *out, uint8_t *head) {
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (int32_t i = 0; i < 8; i++) a[i] = _mm256_load_si256((const __m256i *)(rows + i * stride));
#pragma GCC unroll 4
    for (int32_t i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int32_t i = 0; i < 8; i += 4) { /* a[i + j]: in lane l, dword 4 l + j of rows i .. i + 3 */
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    __m256i taken = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; j++) {
        const __m256i low = _mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
        const __m256i high = _mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
        taken = _mm256_add_epi16(taken, store_weights(low, out + j * PANEL_STEP));
        taken = _mm256_add_epi16(taken, store_weights(high, out + (4 + j) * PANEL_STEP));
    }
    if (PANEL_HEAD == 0) return;
    const __m256i sums = _mm256_madd_epi16(taken, _mm256_set1_epi16(1));
    _mm256_store_si256((__m256i *)head, _mm256_add_epi32(_mm256_load_si256((const __m256i *)head), sums));
}

static void pack_panel(const int8_t *rows, int64_t stride, int32_t n_rows, int32_t n_cols, uint8_t *panel) {
    uint8_t block[PANEL_ROWS * 32] __attribute__((aligned(32)));
    memset(block, PANEL_OFFSET, sizeof block);
    memset(panel, 0, PANEL_HEAD);
    for (int32_t k = 0; k < n_cols; k += 32)
        for (int32_t half = 0; half < 2; half++) {
            uint8_t *eight = block + half * HALF_ROWS * 32;
            for (int32_t r = half * HALF_ROWS; r < cq_min(n_rows, (half + 1) * HALF_ROWS); r++)
                _mm256_store_si256((__m256i *)(block + r * 32),
                                   _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(rows + r * stride + k)),
                                                    _mm256_set1_epi8((char)PANEL_OFFSET)));
            transpose_block(eight, 32, panel + PANEL_HEAD + k / 4 * PANEL_STEP + 32 * half, panel + 32 * half);
        }
}

/* Blocks [begin, end) of a row -> bytes at out; the span moves on with them. */
CQ_INLINE void decode_blocks(const int32_t type, const cq_row *row, cq_span *span, int32_t begin, int32_t end,
                             uint8_t *out) {
    for (int32_t b = begin; b < end;) {
        if (b == span->end) cq_next_span(row, type, span);
        const __m256i scale = _mm256_set1_epi16(span->group_scale ? *span->group_scale : NO_SCALE);
        entries table;
        make_tables(1, type, load_codebook(span->centroids, type), &scale, (char)PANEL_OFFSET, &table);
        for (const int32_t stop = cq_min(end, span->end); b < stop; b++, out += CQ_BLOCK) {
            const weights64 weights = decode_row_block(row, type, b, table);
            _mm256_store_si256((__m256i *)out, weights.first);
            _mm256_store_si256((__m256i *)(out + 32), weights.second);
        }
    }
}

/* Rows of one half of a panel. */
CQ_INLINE void decode_half(const int32_t type, const cq_matrix *w, int64_t row, int32_t n_rows, int32_t half,
                           uint8_t *panel) {
    enum { CHUNK = CHUNK_BLOCKS * CQ_BLOCK };
    const int32_t n_blocks = w->n_cols / CQ_BLOCK;
    uint8_t decoded[HALF_ROWS * CHUNK] __attribute__((aligned(32)));
    cq_row rows[HALF_ROWS];
    cq_span spans[HALF_ROWS];
    memset(decoded, PANEL_OFFSET, sizeof decoded); /* rows beyond the matrix: weight zero */
    for (int32_t r = 0; r < n_rows; r++) rows[r] = cq_row_at(w, row + r), spans[r] = cq_first_span(&rows[r]);
    for (int32_t b = 0; b < n_blocks; b += CHUNK_BLOCKS) {
        const int32_t end = cq_min(n_blocks, b + CHUNK_BLOCKS);
        for (int32_t r = 0; r < n_rows; r++) decode_blocks(type, &rows[r], &spans[r], b, end, decoded + r * CHUNK);
        for (int32_t col = 0; col < (end - b) * CQ_BLOCK; col += 32)
            transpose_block(decoded + col, CHUNK,
                            panel + PANEL_HEAD + ((int64_t)b * CQ_BLOCK + col) * PANEL_COL_BYTES + 32 * half,
                            panel + 32 * half);
    }
}

static void decode_panel(const cq_matrix *w, int64_t row, int32_t n_rows, uint8_t *panel) {
    memset(panel, 0, PANEL_HEAD);
    for (int32_t half = 0; half < 2; half++) {
        const int32_t first = half * HALF_ROWS, n = cq_min(n_rows - first, HALF_ROWS) * (n_rows > first);
        CQ_WITH_TYPE(w, decode_half, w, row + first, n, half, panel)
    }
}

typedef struct {
    __m256i half[2];
} tile_sums;

/* What a token's sums start from. */
CQ_INLINE tile_sums first_sums(const uint8_t *panel, int32_t x_sum) {
    const __m256i *head = (const __m256i *)panel, offset = _mm256_set1_epi32(-PANEL_OFFSET * x_sum);
    return PANEL_HEAD ? (tile_sums){{_mm256_load_si256(head), _mm256_load_si256(head + 1)}}
                      : (tile_sums){{offset, offset}};
}

/* sum[N] += columns of a panel times columns of N tokens. N is a constant and everything is unrolled, else the compiler
 * keeps the sums in memory. */
CQ_INLINE void add_columns(const int32_t N, const uint8_t *columns, int32_t n_cols, const int8_t *const *x,
                           tile_sums *sum) {
    for (int32_t k = 0; k < n_cols; k += 4, columns += PANEL_STEP) {
        const __m256i *step = (const __m256i *)columns;
        const __m256i w0 = _mm256_load_si256(step), w1 = _mm256_load_si256(step + 1);
#ifndef CQ_DPBUSD
        const __m256i m0 = _mm256_load_si256(step + 2), m1 = _mm256_load_si256(step + 3), ones = _mm256_set1_epi16(1);
#endif
#pragma GCC unroll 6
        for (int32_t t = 0; t < N; t++) {
            int32_t four;
            memcpy(&four, x[t] + k, 4);
            const __m256i activation = _mm256_set1_epi32(four);
#ifdef CQ_DPBUSD
            sum[t].half[0] = CQ_DPBUSD(sum[t].half[0], w0, activation);
            sum[t].half[1] = CQ_DPBUSD(sum[t].half[1], w1, activation);
#else
            const __m256i p0 = _mm256_maddubs_epi16(w0, _mm256_xor_si256(activation, m0));
            const __m256i p1 = _mm256_maddubs_epi16(w1, _mm256_xor_si256(activation, m1));
            sum[t].half[0] = _mm256_add_epi32(sum[t].half[0], _mm256_madd_epi16(p0, ones));
            sum[t].half[1] = _mm256_add_epi32(sum[t].half[1], _mm256_madd_epi16(p1, ones));
#endif
        }
    }
}

/* Floats of one token from the sums of all rows of a panel. */
CQ_INLINE void scale_token(const tile_sums sum, const cq_scaling *to, int32_t t) {
    const __m256 token_scale = _mm256_set1_ps(to->token_scales[t]);
    for (int32_t h = 0; h < 2; h++) {
        const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(to->row_scales + 8 * h), token_scale);
        const __m256 value = _mm256_cvtepi32_ps(sum.half[h]);
        float *out = to->out[t] + 8 * h;
        _mm256_storeu_ps(out, to->accumulate ? _mm256_fmadd_ps(value, scale, _mm256_loadu_ps(out))
                                             : _mm256_mul_ps(value, scale));
    }
}

/* Columns of a panel times N tokens: sums start from acc, at the first column from first_sums. */
CQ_INLINE void tile(const int32_t N, const tile_columns *c, const int8_t *const *tokens, const int32_t *x_sum,
                    int32_t first_token, int32_t *acc) {
    tile_sums sum[TILE_TOKENS];
    const int8_t *x[TILE_TOKENS];
#pragma GCC unroll 6
    for (int32_t t = 0; t < N; t++) {
        const __m256i *from = (const __m256i *)(acc + t * PANEL_ROWS);
        x[t] = tokens[t] + c->col;
        sum[t] = c->col ? (tile_sums){{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}}
                        : first_sums(c->panel, x_sum[t]);
    }
    add_columns(N, c->panel + PANEL_HEAD + (int64_t)c->col * PANEL_COL_BYTES, c->n_cols, x, sum);
    const int in_registers = c->to && c->to->n_rows == PANEL_ROWS;
#pragma GCC unroll 6
    for (int32_t t = 0; t < N; t++) {
        if (in_registers) {
            scale_token(sum[t], c->to, first_token + t);
            continue;
        }
        _mm256_storeu_si256((__m256i *)(acc + t * PANEL_ROWS), sum[t].half[0]);
        _mm256_storeu_si256((__m256i *)(acc + t * PANEL_ROWS) + 1, sum[t].half[1]);
        if (!c->to) continue;
        const cq_scaling *to = c->to;
        scale_acc(acc + t * PANEL_ROWS, to->row_scales, to->token_scales[first_token + t], to->out[first_token + t],
                  to->n_rows, to->accumulate);
    }
}

/* clang-format off */
CQ_TILE(1) CQ_TILE(2) CQ_TILE(3) CQ_TILE(4)
#ifdef CQ_DPBUSD
CQ_TILE(5) CQ_TILE(6)
#endif

static tile_function *const tiles[TILE_TOKENS] = {
    tile_1, tile_2, tile_3, tile_4,
#ifdef CQ_DPBUSD
    tile_5, tile_6,
#endif
};
/* clang-format on */

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
#endif
