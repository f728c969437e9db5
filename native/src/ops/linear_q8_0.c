/* Q8_0 matrices: each block of 32 columns has a scale of its own in the weights and in the activations.
 *
 * A few tokens: dot products. More: each block of columns of a panel of rows is a small integer GEMM of its own, whose
 * accumulators are scaled and added up as floats. Rows are packed into panels once for all tokens. */
#include "ops/linear_q8_0.h"
#include <string.h>

static int64_t weight_bytes(const cq_kernels *kernels, const cq_matrix *w) {
    return cq_align64(w->n_cols / CQ_Q8_0_COLS * cq_panel_bytes(kernels, CQ_Q8_0_COLS));
}

/* The panels of all blocks of columns, then their scales [n_cols / 32][panel_rows]. */
int64_t cq_q8_0_scratch_bytes(const cq_kernels *kernels, const cq_matrix *w) {
    return weight_bytes(kernels, w) + w->n_cols / CQ_Q8_0_COLS * kernels->panel_rows * (int64_t)sizeof(float);
}

static void dot_rows(const cq_worker *worker, const cq_items *it, int64_t row, int32_t n_rows, int32_t out_col) {
    const cq_linear *op = it->op;
    const cq_matrix *w = op->w;
    for (int32_t r = 0; r < n_rows; r++) {
        const uint8_t *blocks = w->data + (row + r) * cq_row_bytes(w);
        for (int32_t i = 0; i < it->n; i++) {
            const int64_t in = cq_input_row(it, i);
            const float dot = worker->kernels->dot_q8_0(blocks, op->act->q + in * w->n_cols,
                                                        op->act->scales + in * (w->n_cols / CQ_Q8_0_COLS), w->n_cols);
            float *out = cq_output(it, i, out_col + r);
            *out = (op->accumulate ? *out : 0.0f) + dot;
            cq_add_bias(op, row + r, 1, out);
        }
    }
}

/* n_rows <= panel_rows rows; those beyond are zero. */
static void pack_rows(const cq_kernels *kernels, const cq_matrix *w, int64_t row, int32_t n_rows, uint8_t *panel,
                      float *scales) {
    const int64_t stride = cq_row_bytes(w);
    const uint8_t *block = w->data + row * stride;
    uint16_t f16[CQ_MAX_PANEL_ROWS] = {0};
    for (int32_t b = 0; b < w->n_cols / CQ_Q8_0_COLS; b++, block += CQ_Q8_0_BYTES) {
        for (int32_t r = 0; r < n_rows; r++) memcpy(f16 + r, block + r * stride, 2);
        kernels->pack_panel((const int8_t *)block + 2, stride, n_rows, CQ_Q8_0_COLS, panel);
        kernels->f16_to_f32(f16, scales, kernels->panel_rows);
        panel += cq_panel_bytes(kernels, CQ_Q8_0_COLS);
        scales += kernels->panel_rows;
    }
}

/* What gemm_blocks does, for instruction sets without it. */
static void multiply_blocks(const cq_kernels *kernels, const cq_block_panel *p, const cq_block_tokens *tokens,
                            int32_t n_tokens, float *dots) {
    const int32_t rows = kernels->panel_rows;
    int32_t acc[CQ_TOKEN_TILE * CQ_MAX_PANEL_ROWS] __attribute__((aligned(64))), sums[CQ_TOKEN_TILE];
    const int8_t *x[CQ_TOKEN_TILE];
    for (int32_t b = 0; b < p->n_blocks; b++) {
        for (int32_t i = 0; i < n_tokens; i++) x[i] = tokens->q[i] + b * CQ_Q8_0_COLS, sums[i] = tokens->sums[i][b];
        kernels->gemm_panel(p->weights + b * cq_panel_bytes(kernels, CQ_Q8_0_COLS), CQ_Q8_0_COLS, x, sums, n_tokens,
                            acc);
        for (int32_t i = 0; i < n_tokens; i++)
            kernels->scale_acc(acc + i * rows, p->scales + b * rows, tokens->scales[i][b], dots + i * rows, rows,
                               b > 0);
    }
}

/* dots[n_tokens][panel_rows] of one panel with items first .. first + n_tokens - 1. */
static void multiply_panel(const cq_kernels *kernels, const cq_items *it, int32_t first, int32_t n_tokens,
                           const cq_block_panel *panel, float *dots) {
    const cq_activation *act = it->op->act;
    const int8_t *q[CQ_TOKEN_TILE];
    const float *scales[CQ_TOKEN_TILE];
    const int32_t *sums[CQ_TOKEN_TILE];
    for (int32_t i = 0; i < n_tokens; i++) {
        const int64_t in = cq_input_row(it, first + i);
        q[i] = act->q + in * panel->n_blocks * CQ_Q8_0_COLS;
        scales[i] = act->scales + in * panel->n_blocks;
        sums[i] = act->sums + in * panel->n_blocks;
    }
    const cq_block_tokens tokens = {q, scales, sums};
    if (kernels->gemm_blocks)
        kernels->gemm_blocks(panel, &tokens, n_tokens, dots);
    else
        multiply_blocks(kernels, panel, &tokens, n_tokens, dots);
}

static void gemm_rows(const cq_worker *worker, const cq_items *it, int64_t row, int32_t n_rows, int32_t out_col) {
    const cq_linear *op = it->op;
    const int32_t panel_rows = worker->kernels->panel_rows;
    float *scales = (float *)(worker->scratch + weight_bytes(worker->kernels, op->w));
    float dots[CQ_TOKEN_TILE * CQ_MAX_PANEL_ROWS];
    const cq_block_panel panel = {worker->scratch, scales, op->w->n_cols / CQ_Q8_0_COLS};
    for (int32_t done = 0; done < n_rows; done += panel_rows) {
        const int32_t n = cq_min(panel_rows, n_rows - done);
        pack_rows(worker->kernels, op->w, row + done, n, worker->scratch, scales);
        for (int32_t first = 0; first < it->n; first += CQ_TOKEN_TILE) {
            const int32_t n_tokens = cq_min(CQ_TOKEN_TILE, it->n - first);
            multiply_panel(worker->kernels, it, first, n_tokens, &panel, dots);
            for (int32_t i = 0; i < n_tokens; i++) {
                float *out = cq_output(it, first + i, out_col + done);
                for (int32_t r = 0; r < n; r++) out[r] = (op->accumulate ? out[r] : 0.0f) + dots[i * panel_rows + r];
                cq_add_bias(op, row + done, n, out);
            }
        }
    }
}

void cq_q8_0_rows(const cq_worker *worker, const cq_items *it, int64_t row, int32_t n_rows, int32_t out_col) {
    (it->n <= CQ_GEMV_MAX_TOKENS ? dot_rows : gemm_rows)(worker, it, row, n_rows, out_col);
}
