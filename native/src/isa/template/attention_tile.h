/* TEMPLATE. What attention.h builds on: a tile of queries and keys, and the product of its probabilities with the
 * values.
 */
#ifndef CQ_ATTENTION_TILE_H
#define CQ_ATTENTION_TILE_H
#include "isa/template/float_ops.h"

#define CQ_HIDDEN (-1e30f) /* score of a key that a query does not see; finite, as their difference must not be NaN */

typedef struct {
    const cq_attention *op;
    int32_t position, n_queries;
    float *tile;               /* [CQ_KEY_TILE][head_dim]: keys; then values, [CQ_KEY_TILE][value_dim] or their first
                                * columns */
    float *queries;            /* [head_dim][CQ_QUERY_TILE], times score_scale */
    float *scores;             /* [CQ_KEY_TILE][CQ_QUERY_TILE], or [query][CQ_KEY_TILE]; then probabilities */
    float *max, *sum, *shrink; /* [CQ_QUERY_TILE] */
} attention_tile;

/* Of n_keys, those that any of the queries up to `last` sees; `ahead`: how many the first one sees. The others are in
 * the future of all of them. */
CQ_INLINE int32_t seen_keys(int32_t n_keys, int32_t ahead, int32_t last) {
    const int32_t seen = ahead + last;
    return seen < 0 ? 0 : cq_min(n_keys, seen);
}

static int32_t value_stride(const cq_attention *op) { return op->v_cache ? op->value_dim : op->head_dim; }

/* Calls function(dim, ...), for the usual sizes with a constant: addresses then need no registers of their own. */
#define CQ_WITH_HEAD_DIM(dim, function, ...)                                                                           \
    switch (dim) {                                                                                                     \
    case 64:                                                                                                           \
        function(64, __VA_ARGS__);                                                                                     \
        break;                                                                                                         \
    case 128:                                                                                                          \
        function(128, __VA_ARGS__);                                                                                    \
        break;                                                                                                         \
    default:                                                                                                           \
        function(dim, __VA_ARGS__);                                                                                    \
    }

static void load_keys(const attention_tile *a, int64_t kv_head, int32_t first, int32_t n_keys) {
    const int32_t dim = a->op->head_dim;
    f16_to_f32(a->op->k_cache + (kv_head * a->op->n_ctx + first) * dim, a->tile, n_keys * dim);
}

/* Nothing to do where they are columns of the keys. */
static void load_values(const attention_tile *a, int64_t kv_head, int32_t first, int32_t n_keys) {
    const int32_t dim = a->op->value_dim;
    if (a->op->v_cache) f16_to_f32(a->op->v_cache + (kv_head * a->op->n_ctx + first) * dim, a->tile, n_keys * dim);
}

/* Of the number-th head of those that go together; two tiles, of keys and values, and scores are common to all. */
static attention_tile carve_scratch(const cq_attention *op, int32_t number, int32_t position, int32_t n_queries,
                                    float *scratch) {
    attention_tile a = {.op = op, .position = position, .n_queries = n_queries, .tile = scratch};
    a.scores = scratch + 2 * CQ_KEY_TILE * cq_attention_tile_width(op);
    a.max = a.scores + CQ_KEY_TILE * CQ_QUERY_TILE + (int64_t)number * CQ_QUERY_TILE * (op->head_dim + 3);
    a.sum = a.max + CQ_QUERY_TILE;
    a.shrink = a.sum + CQ_QUERY_TILE;
    a.queries = a.shrink + CQ_QUERY_TILE;
    for (int32_t i = 0; i < CQ_QUERY_TILE; i++) a.max[i] = CQ_HIDDEN, a.sum[i] = 0;
    return a;
}

/* Where the probability of a key and a query lies in scores, and a query's output in out. */
typedef struct {
    int32_t key, query;
    int64_t out;
} attention_strides;

/* out[i][d ..] = out * shrink[i] + sum over keys of p[key][i] * value[key][d ..], N queries times V vectors. Values are
 * row floats apart. */
CQ_INLINE void value_tile(const int32_t row, const attention_strides at, const int32_t N, const int32_t V,
                          const attention_tile *a, int32_t n_keys, int32_t i, int32_t d, float *out) {
    vec acc[4][CQ_TILE_VECS];
#pragma GCC unroll 16
    for (int32_t n = 0; n < N; n++)
#pragma GCC unroll 16
        for (int32_t v = 0; v < V; v++)
            acc[n][v] = load_vec(out + (i + n) * at.out + d + v * CQ_LANES) * a->shrink[i + n];
    for (int32_t k = 0; k < n_keys; k++)
#pragma GCC unroll 16
        for (int32_t v = 0; v < V; v++) {
            const vec value = load_vec(a->tile + k * row + d + v * CQ_LANES);
#pragma GCC unroll 16
            for (int32_t n = 0; n < N; n++) acc[n][v] += a->scores[k * at.key + (i + n) * at.query] * value;
        }
#pragma GCC unroll 16
    for (int32_t n = 0; n < N; n++)
#pragma GCC unroll 16
        for (int32_t v = 0; v < V; v++) store_vec(out + (i + n) * at.out + d + v * CQ_LANES, acc[n][v]);
}

CQ_INLINE void value_rows(const int32_t dim, const int32_t row, const attention_strides at, const int32_t N,
                          const attention_tile *a, int32_t n_keys, int32_t i, float *out) {
    int32_t d = 0;
    for (; d + CQ_TILE_VECS * CQ_LANES <= dim; d += CQ_TILE_VECS * CQ_LANES)
        value_tile(row, at, N, CQ_TILE_VECS, a, n_keys, i, d, out);
    for (; d + CQ_LANES <= dim; d += CQ_LANES) value_tile(row, at, N, 1, a, n_keys, i, d, out);
    for (; d < dim; d++)
        for (int32_t n = i; n < i + N; n++) {
            float sum = out[n * at.out + d] * a->shrink[n];
            for (int32_t k = 0; k < n_keys; k++) sum += a->scores[k * at.key + n * at.query] * a->tile[k * row + d];
            out[n * at.out + d] = sum;
        }
}

/* `ahead` as in seen_keys. */
CQ_INLINE void value_tiles(const int32_t dim, const int32_t row, const attention_strides at, const attention_tile *a,
                           int32_t ahead, int32_t n_keys, float *out) {
    int32_t i = 0;
    for (; i + 4 <= a->n_queries; i += 4) value_rows(dim, row, at, 4, a, seen_keys(n_keys, ahead, i + 3), i, out);
    for (; i < a->n_queries; i++) value_rows(dim, row, at, 1, a, seen_keys(n_keys, ahead, i), i, out);
}

CQ_INLINE void packed_values(const int32_t dim, const attention_strides at, const attention_tile *a, int32_t ahead,
                             int32_t n_keys, float *out) {
    value_tiles(dim, dim, at, a, ahead, n_keys, out);
}

CQ_INLINE void add_values(const attention_tile *a, const attention_strides at, int32_t ahead, int32_t n_keys,
                          float *out) {
    const int32_t dim = a->op->value_dim, row = value_stride(a->op);
    if (row != dim) {
        value_tiles(dim, row, at, a, ahead, n_keys, out);
        return;
    }
    CQ_WITH_HEAD_DIM(dim, packed_values, at, a, ahead, n_keys, out)
}

static void add_batch_values(const attention_tile *a, int32_t first_key, int32_t n_keys, float *out) {
    const attention_strides at = {CQ_QUERY_TILE, 1, (int64_t)a->op->n_heads * a->op->value_dim};
    add_values(a, at, a->position - first_key + 1, n_keys, out);
}

static void add_group_values(const attention_tile *a, int32_t n_keys, float *out, int64_t stride) {
    const attention_strides at = {1, CQ_KEY_TILE, stride};
    add_values(a, at, n_keys, n_keys, out);
}
#endif
