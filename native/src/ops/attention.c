/* The attention operation: new keys and values into the cache, then units of work for the team.
 *
 * Many tokens: a unit is a tile of queries of a few heads that share keys and values. One token has too few of those,
 * and heads that share keys and values would each read them anew: a unit is a group of such heads and a chunk of keys,
 * and a head's partial results are joined afterwards. How keys are cut into chunks depends on their number only, so
 * that results do not depend on the team. */
#include "ops/attention.h"
#include <float.h>
#include <math.h>
#include <string.h>

enum { CQ_MAX_CHUNKS = 32 };

static int64_t partial_floats(const cq_attention *op) { return op->value_dim + 2; /* sum, largest score, total */ }

int64_t cq_attention_partial_bytes(const cq_attention *op) {
    return (int64_t)sizeof(float) * op->n_heads * CQ_MAX_CHUNKS * partial_floats(op);
}

static void append_to_cache(const cq_worker *worker, const cq_attention *op) {
    const int32_t dim = op->head_dim, value_dim = op->value_dim;
    const cq_range range = cq_share(worker, worker->step->n_tokens * op->n_kv_heads);
    for (int32_t item = range.begin; item < range.end; item++) {
        const int64_t token = item / op->n_kv_heads, head = item % op->n_kv_heads;
        const int64_t from = token * op->n_kv_heads + head, to = head * op->n_ctx + worker->step->position + token;
        worker->kernels->f32_to_f16(op->k + from * dim, op->k_cache + to * dim, dim);
        if (op->v) worker->kernels->f32_to_f16(op->v + from * value_dim, op->v_cache + to * value_dim, value_dim);
    }
}

static void attend_batch(const cq_worker *worker, const cq_attention *op) {
    const int32_t n_tokens = worker->step->n_tokens, tiles = cq_ceil_div(n_tokens, CQ_QUERY_TILE);
    const int32_t group = op->n_heads / op->n_kv_heads, pieces = cq_ceil_div(group, CQ_TILE_HEADS);
    const int32_t units = pieces * op->n_kv_heads; /* of a tile */
    for (int32_t unit; (unit = cq_next_unit(worker)) < tiles * units;) {
        /* The last queries see the most keys, so they go first. */
        const int32_t first = (tiles - 1 - unit / units) * CQ_QUERY_TILE, begin = unit % pieces * CQ_TILE_HEADS;
        const int32_t head = unit % units / pieces * group + begin;
        const int64_t row = (int64_t)first * op->n_heads + head;
        worker->kernels->attention_heads(op, head, cq_min(group - begin, CQ_TILE_HEADS), worker->step->position + first,
                                         cq_min(n_tokens - first, CQ_QUERY_TILE), op->q + row * op->head_dim,
                                         op->out + row * op->value_dim, (float *)worker->scratch);
    }
}

static void join_chunks(const cq_worker *worker, const cq_attention *op, int32_t head, int32_t n_chunks) {
    const int32_t dim = op->value_dim;
    const float *partials = worker->partials + head * CQ_MAX_CHUNKS * partial_floats(op);
    float *out = op->out + (int64_t)head * dim, largest = -FLT_MAX, total = 0;
    for (int32_t c = 0; c < n_chunks; c++) largest = fmaxf(largest, partials[c * partial_floats(op) + dim]);
    memset(out, 0, sizeof(float) * (size_t)dim);
    for (int32_t c = 0; c < n_chunks; c++, partials += partial_floats(op)) {
        const float shrink = exp2f(partials[dim] - largest); /* scores are in base 2 */
        worker->kernels->axpy(shrink, partials, out, dim);
        total += shrink * partials[dim + 1];
    }
    for (int32_t d = 0; d < dim; d++) out[d] /= total;
}

static void attend_one(const cq_worker *worker, const cq_attention *op) {
    const int32_t end = worker->step->position + 1, start = cq_first_key(op, worker->step->position);
    const int32_t chunk = CQ_KEY_TILE * cq_ceil_div(end - start, CQ_KEY_TILE * CQ_MAX_CHUNKS);
    const int32_t n_chunks = cq_ceil_div(end - start, chunk), group = op->n_heads / op->n_kv_heads;
    const int32_t pieces = cq_ceil_div(group, CQ_QUERY_TILE); /* of a group that is larger than a tile */
    const int64_t stride = CQ_MAX_CHUNKS * partial_floats(op);
    for (int32_t unit; (unit = cq_next_unit(worker)) < n_chunks * pieces * op->n_kv_heads;) {
        const int32_t c = unit % n_chunks, piece = unit / n_chunks % pieces, kv_head = unit / n_chunks / pieces;
        const int32_t head = kv_head * group + piece * CQ_QUERY_TILE, first = start + c * chunk;
        const int32_t n_heads = cq_min(group - piece * CQ_QUERY_TILE, CQ_QUERY_TILE);
        worker->kernels->attention_chunk(
            op, head, n_heads, first, cq_min(first + chunk, end), op->q + (int64_t)head * op->head_dim,
            worker->partials + head * stride + c * partial_floats(op), stride, (float *)worker->scratch);
    }
    cq_wait_for_all(worker);
    const cq_range range = cq_share(worker, op->n_heads);
    for (int32_t head = range.begin; head < range.end; head++) join_chunks(worker, op, head, n_chunks);
}

void cq_run_attention(const cq_worker *worker, const cq_attention *op) {
    append_to_cache(worker, op);
    cq_wait_for_all(worker);
    if (worker->step->n_tokens == 1)
        attend_one(worker, op);
    else
        attend_batch(worker, op);
}
