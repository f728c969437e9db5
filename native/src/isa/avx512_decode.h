/* The part of avx512_core.h that decodes rows into panels, for many tokens. */
#ifndef CQ_AVX512_DECODE_H
#define CQ_AVX512_DECODE_H

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
#endif
