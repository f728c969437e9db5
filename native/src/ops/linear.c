/* Linear layers: every matrix type, dense or routed to experts, for one token or many.
 *
 * The rows of a matrix are cut into units of whole panels, as many for each thread; threads take units as they become
 * free, so that a slower one does fewer. Few tokens: GEMV straight from the packed indices.
 * More: the unit is decoded once to int8 and multiplied with all tokens. */
#include "ops/linear.h"
#include "ops/linear_items.h"
#include "ops/linear_q8_0.h"
#include <string.h>

enum { CQ_UNIT_BYTES = 131072 }; /* at most: the first rows of a unit come from memory without a prefetch */

int64_t cq_linear_scratch_bytes(const cq_kernels *kernels, const cq_matrix *w) {
    if (w->type == CQ_Q8_0) return cq_q8_0_scratch_bytes(kernels, w);
    return cq_is_clustered(w->type) ? cq_panel_bytes(kernels, w->n_cols) : 0;
}

static void clustered_gemv(const cq_worker *worker, const cq_items *it, int64_t row, int32_t n_rows, int32_t out_col) {
    const cq_linear *op = it->op;
    const cq_matrix *w = op->w;
    int32_t acc[CQ_MAX_PANEL_ROWS];
    for (int32_t done = 0; done < n_rows; done += CQ_MAX_PANEL_ROWS) {
        int32_t n = n_rows - done < CQ_MAX_PANEL_ROWS ? n_rows - done : CQ_MAX_PANEL_ROWS;
        for (int32_t i = 0; i < it->n; i++) {
            int32_t in = cq_input_row(it, i);
            float *out = cq_output(it, i, out_col + done);
            worker->kernels->gemv(w, row + done, n, op->act->q + (int64_t)in * w->n_cols, op->act->sums[in], acc);
            worker->kernels->scale_acc(acc, w->scales + row + done, op->act->scales[in], out, n, op->accumulate);
            cq_add_bias(op, row + done, n, out);
        }
    }
}

/* The outputs of a panel are far apart, a few lines per token: they are fetched while the panel is multiplied. */
static void prefetch_outputs(float *const *out, int32_t n_tokens, int32_t n) {
    for (int32_t t = 0; t < n_tokens; t++)
        for (int32_t r = 0; r < n; r += 16) __builtin_prefetch(out[t] + r, 1);
}

static void multiply_panel(const cq_kernels *kernels, const uint8_t *panel, int32_t n_cols, const int8_t *const *x,
                           const int32_t *sums, int32_t n_tokens, const cq_scaling *to) {
    int32_t acc[CQ_TOKEN_TILE * CQ_MAX_PANEL_ROWS] __attribute__((aligned(64)));
    if (kernels->gemm_panel_scaled) {
        kernels->gemm_panel_scaled(panel, n_cols, x, sums, n_tokens, acc, to);
        return;
    }
    prefetch_outputs(to->out, n_tokens, to->n_rows);
    kernels->gemm_panel(panel, n_cols, x, sums, n_tokens, acc);
    for (int32_t t = 0; t < n_tokens; t++)
        kernels->scale_acc(acc + (int64_t)t * kernels->panel_rows, to->row_scales, to->token_scales[t], to->out[t],
                           to->n_rows, to->accumulate);
}

/* Of some tokens: their activations with sums and scales, and where their outputs go. */
typedef struct {
    const int8_t *x[CQ_TOKEN_TILE];
    float *out[CQ_TOKEN_TILE], scales[CQ_TOKEN_TILE];
    int32_t sums[CQ_TOKEN_TILE];
} token_tile;

/* Once for every panel of a matrix, so tokens in a row, as they are without experts, have a shorter way. */
static void point_at_tokens(const cq_items *it, int32_t first, int32_t n, int32_t out_col, token_tile *tile) {
    const cq_activation *act = it->op->act;
    const int64_t n_cols = it->op->w->n_cols, n_rows = it->op->w->n_rows;
    if (!it->slots && it->step == 1) {
        const int64_t begin = it->first + first;
        for (int64_t i = 0; i < n; i++) {
            tile->x[i] = act->q + (begin + i) * n_cols;
            tile->out[i] = it->op->out + (begin + i) * n_rows + out_col;
        }
        memcpy(tile->sums, act->sums + begin, sizeof(int32_t) * (size_t)n);
        memcpy(tile->scales, act->scales + begin, sizeof(float) * (size_t)n);
        return;
    }
    for (int32_t i = 0; i < n; i++) {
        const int64_t in = cq_input_row(it, first + i);
        tile->x[i] = act->q + in * n_cols;
        tile->sums[i] = act->sums[in];
        tile->scales[i] = act->scales[in];
        tile->out[i] = cq_output(it, first + i, out_col);
    }
}

static void clustered_gemm(const cq_worker *worker, const cq_items *it, int64_t row, int32_t n_rows, int32_t out_col) {
    const cq_linear *op = it->op;
    const cq_matrix *w = op->w;
    const cq_kernels *kernels = worker->kernels;
    token_tile tile;
    for (int32_t done = 0; done < n_rows; done += kernels->panel_rows) {
        int32_t n = n_rows - done < kernels->panel_rows ? n_rows - done : kernels->panel_rows;
        kernels->decode_panel(w, row + done, n, worker->scratch);
        for (int32_t first = 0; first < it->n; first += CQ_TOKEN_TILE) {
            const int32_t n_tokens = cq_min(CQ_TOKEN_TILE, it->n - first);
            point_at_tokens(it, first, n_tokens, out_col + done, &tile);
            const cq_scaling to = {tile.out, w->scales + row + done, tile.scales, n, op->accumulate};
            multiply_panel(kernels, worker->scratch, w->n_cols, tile.x, tile.sums, n_tokens, &to);
            for (int32_t i = 0; op->bias && i < n_tokens; i++) cq_add_bias(op, row + done, n, tile.out[i]);
        }
    }
}

/* F32 and F16: one weight row against all tokens while it is in the first-level cache. */
static void float_rows(const cq_worker *worker, const cq_items *it, int64_t row, int32_t n_rows, int32_t out_col) {
    const cq_linear *op = it->op;
    const cq_matrix *w = op->w;
    const float *x[CQ_TOKEN_TILE];
    float dot[CQ_TOKEN_TILE];
    for (int32_t first = 0; first < it->n; first += CQ_TOKEN_TILE) {
        const int32_t n_tokens = cq_min(CQ_TOKEN_TILE, it->n - first);
        for (int32_t i = 0; i < n_tokens; i++) x[i] = op->x + (int64_t)cq_input_row(it, first + i) * w->n_cols;
        for (int32_t r = 0; r < n_rows; r++) {
            const uint8_t *data = w->data + (row + r) * cq_row_bytes(w);
            if (w->type == CQ_F16) worker->kernels->dot_f16((const uint16_t *)data, x, n_tokens, w->n_cols, dot);
            if (w->type == CQ_F32) worker->kernels->dot_f32((const float *)data, x, n_tokens, w->n_cols, dot);
            for (int32_t i = 0; i < n_tokens; i++) {
                float *out = cq_output(it, first + i, out_col + r), value = dot[i] + (op->bias ? op->bias[row + r] : 0);
                *out = op->accumulate ? *out + value : value;
            }
        }
    }
}

static int32_t rows_per_unit(const cq_worker *worker, const cq_matrix *w) {
    const int64_t round = (int64_t)CQ_UNIT_BYTES * worker->n_threads,
                  n = (cq_row_bytes(w) * w->n_rows + round - 1) / round;
    const int32_t panel = worker->kernels->panel_rows, n_panels = cq_ceil_div(w->n_rows, panel);
    return panel * cq_ceil_div(n_panels, cq_min(n_panels, (int32_t)n * worker->n_threads));
}

void cq_run_linear(const cq_worker *worker, const cq_linear *op, int32_t n_rows) {
    const cq_matrix *w = op->w;
    int32_t unit_rows = rows_per_unit(worker, w);
    int32_t units = cq_ceil_div(w->n_rows, unit_rows), first = 0, unit = cq_next_unit(worker);
    for (int32_t i = 0; i < w->n_experts; i++) {
        const int32_t expert = w->experts ? w->experts[i] : i;
        cq_items it = {op, NULL, n_rows / w->n_experts, i, w->n_experts};
        if (op->routing) {
            it.slots = op->routing->order + op->routing->offsets[expert];
            it.n = op->routing->offsets[expert + 1] - op->routing->offsets[expert];
        }
        if (it.n == 0) continue; /* no token chose this expert: it has no units */
        for (; unit < first + units; unit = cq_next_unit(worker)) {
            int32_t col = (unit - first) * unit_rows;
            int32_t n = w->n_rows - col < unit_rows ? w->n_rows - col : unit_rows;
            int64_t row = (int64_t)i * w->n_rows + col;
            if (w->type == CQ_Q8_0)
                cq_q8_0_rows(worker, &it, row, n, col);
            else if (!cq_is_clustered(w->type))
                float_rows(worker, &it, row, n, col);
            else if (it.n <= CQ_GEMV_MAX_TOKENS)
                clustered_gemv(worker, &it, row, n, col);
            else
                clustered_gemm(worker, &it, row, n, col);
        }
        first += units;
    }
}

void cq_dequantize_row(const cq_kernels *kernels, const cq_matrix *w, int64_t row, float *out) {
    const uint8_t *data = w->data + row * cq_row_bytes(w);
    if (w->type == CQ_F32) memcpy(out, data, (size_t)w->n_cols * 4);
    if (w->type == CQ_F16) kernels->f16_to_f32((const uint16_t *)data, out, w->n_cols);
    if (w->type != CQ_Q8_0) return;
    for (int32_t block = 0; block < w->n_cols / CQ_Q8_0_COLS; block++, data += CQ_Q8_0_BYTES) {
        uint16_t f16;
        float scale;
        memcpy(&f16, data, 2);
        kernels->f16_to_f32(&f16, &scale, 1);
        for (int32_t j = 0; j < CQ_Q8_0_COLS; j++) out[block * CQ_Q8_0_COLS + j] = scale * (float)(int8_t)data[2 + j];
    }
}
