/* The integer core alone, for tests: int32 accumulators of a whole matrix, nothing scaled. */
#include "ops/linear.h"
#include "ops/linear_items.h"
#include <string.h>

static int arguments_ok(const cq_matrix *w, int32_t n_tokens, int32_t n_threads) {
    return cq_is_clustered(w->type) && n_tokens > 0 && n_threads > 0 && w->n_cols % CQ_BLOCK == 0 &&
           w->n_cols <= CQ_MAX_COLS && w->codebook_rows > 0 && w->codebook_rows <= CQ_MAX_CODEBOOK_ROWS &&
           (w->codebook_rows & (w->codebook_rows - 1)) == 0;
}

int cq_gemv_i32(const cq_matrix *w, const int8_t *x, const int32_t *sums, int32_t n_tokens, int32_t *acc,
                int32_t n_threads) {
    if (!arguments_ok(w, n_tokens, n_threads)) return CQ_ERR_ARGUMENT;
    const cq_kernels *kernels = cq_kernels_current();
    for (int64_t t = 0; t < n_tokens; t++) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
        for (int32_t share = 0; share < n_threads; share++) {
            int32_t begin = (int32_t)((int64_t)w->n_rows * share / n_threads);
            int32_t end = (int32_t)((int64_t)w->n_rows * (share + 1) / n_threads);
            kernels->gemv(w, begin, end - begin, x + t * w->n_cols, sums[t], acc + t * w->n_rows + begin);
        }
    }
    return CQ_OK;
}

int64_t cq_gemm_scratch_bytes(const cq_matrix *w) { return cq_linear_scratch_bytes(cq_kernels_current(), w); }

int cq_gemm_i32(const cq_matrix *w, const int8_t *x, const int32_t *sums, int32_t n_tokens, int32_t *acc,
                int32_t n_threads, uint8_t *scratch) {
    if (!arguments_ok(w, n_tokens, n_threads)) return CQ_ERR_ARGUMENT;
    const cq_kernels *kernels = cq_kernels_current();
    int32_t panel_rows = kernels->panel_rows, n_panels = cq_ceil_div(w->n_rows, panel_rows);
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
    for (int32_t p = 0; p < n_panels; p++) {
        uint8_t *panel = scratch + omp_get_thread_num() * cq_linear_scratch_bytes(kernels, w);
        int32_t row = p * panel_rows, n = w->n_rows - row < panel_rows ? w->n_rows - row : panel_rows;
        int32_t tile[CQ_TOKEN_TILE * CQ_MAX_PANEL_ROWS] __attribute__((aligned(64)));
        const int8_t *rows[CQ_TOKEN_TILE];
        kernels->decode_panel(w, row, n, panel);
        for (int32_t first = 0; first < n_tokens; first += CQ_TOKEN_TILE) {
            int32_t count = n_tokens - first < CQ_TOKEN_TILE ? n_tokens - first : CQ_TOKEN_TILE;
            for (int32_t i = 0; i < count; i++) rows[i] = x + (int64_t)(first + i) * w->n_cols;
            kernels->gemm_panel(panel, w->n_cols, rows, sums + first, count, tile);
            for (int32_t i = 0; i < count; i++)
                memcpy(acc + (int64_t)(first + i) * w->n_rows + row, tile + i * panel_rows, (size_t)n * 4);
        }
    }
    return CQ_OK;
}
