/* TEMPLATE. Attention of a tile of queries, in generic C over the primitives that vectors.h lists.
 *
 * Keys are walked in tiles of CQ_KEY_TILE, converted from F16 once per tile, with an online softmax: running maximum m
 * and sum l per query; when m grows, what was summed so far shrinks by exp(m_old - m_new).
 *
 * A batch is consecutive queries of one head, in the vector lanes: scores are [key][CQ_QUERY_TILE], so that maximum,
 * exponential and sum need no operation across lanes. One token (decoding) would leave those lanes empty: its queries
 * are those of a group of heads with the same keys and values, which are read and converted once for all of them; the
 * head dimension is in the lanes and scores are [query][CQ_KEY_TILE]. */
#ifndef CQ_ATTENTION_H
#define CQ_ATTENTION_H
#include "isa/template/attention_tile.h"

/* Scores are in base 2, where an exponential has fewer steps. */
static float score_scale(const cq_attention *op) { return op->scale * 1.44269504f; }

static void transpose_queries(const attention_tile *a, const float *q) {
    const int32_t dim = a->op->head_dim;
    const int64_t stride = (int64_t)a->op->n_heads * dim;
    const float scale = score_scale(a->op);
    for (int32_t i = 0; i < a->n_queries; i += CQ_LANES) {
        const int32_t n = cq_min(a->n_queries - i, CQ_LANES);
        int32_t d = 0;
        for (; d + CQ_LANES <= dim; d += CQ_LANES) {
            vec rows[CQ_LANES] = {0};
            for (int32_t k = 0; k < n; k++) rows[k] = load_vec(q + (i + k) * stride + d) * scale;
            transpose_groups(rows, CQ_LANES);
            for (int32_t k = 0; k < CQ_LANES; k++) store_vec(a->queries + (d + k) * CQ_QUERY_TILE + i, rows[k]);
        }
        for (; d < dim; d++)
            for (int32_t k = 0; k < CQ_LANES; k++)
                a->queries[d * CQ_QUERY_TILE + i + k] = k < n ? q[(i + k) * stride + d] * scale : 0.0f;
    }
}

/* scores[key][query] = key . query for CQ_SCORE_KEYS keys and CQ_SCORE_VECS vectors of queries. */
CQ_INLINE void score_tile(const int32_t dim, const float *keys, const float *queries, float *scores) {
    vec acc[CQ_SCORE_KEYS][CQ_SCORE_VECS] = {0};
    for (int32_t d = 0; d < dim; d++)
#pragma GCC unroll 16
        for (int32_t v = 0; v < CQ_SCORE_VECS; v++) {
            const vec query = load_vec(queries + d * CQ_QUERY_TILE + v * CQ_LANES);
#pragma GCC unroll 16
            for (int32_t k = 0; k < CQ_SCORE_KEYS; k++) acc[k][v] += keys[k * dim + d] * query;
        }
#pragma GCC unroll 16
    for (int32_t k = 0; k < CQ_SCORE_KEYS; k++)
#pragma GCC unroll 16
        for (int32_t v = 0; v < CQ_SCORE_VECS; v++) store_vec(scores + k * CQ_QUERY_TILE + v * CQ_LANES, acc[k][v]);
}

/* Rows past n_keys, up to a multiple of CQ_SCORE_KEYS, come out of stale floats and are never read; so do lanes past
 * n_queries, and scores of keys that no query of a tile sees. */
CQ_INLINE void score_tiles(const int32_t dim, const attention_tile *a, int32_t first_key, int32_t n_keys) {
    for (int32_t lane = 0; lane < a->n_queries; lane += CQ_SCORE_VECS * CQ_LANES) {
        const int32_t seen = seen_keys(n_keys, a->position - first_key + 1, lane + CQ_SCORE_VECS * CQ_LANES - 1);
        for (int32_t key = 0; key < seen; key += CQ_SCORE_KEYS)
            score_tile(dim, a->tile + key * dim, a->queries + lane, a->scores + key * CQ_QUERY_TILE + lane);
    }
}

static void batch_scores(const attention_tile *a, int32_t first_key,
                         int32_t n_keys){CQ_WITH_HEAD_DIM(a -> op->head_dim, score_tiles, a, first_key, n_keys)}

/* -1 in the lanes whose query sees the key: it is not in the query's future, nor before its window. */
CQ_INLINE int_vec visible(const attention_tile *a, int32_t key, int32_t first_lane) {
    int_vec distance; /* from the key to the query */
    for (int32_t i = 0; i < CQ_LANES; i++) distance[i] = i;
    distance += a->position + first_lane - key;
    return (distance >= 0) & (distance < (a->op->window > 0 ? a->op->window : INT32_MAX));
}

/* Scores -> 2^(score - max), or zero where the key is not visible; for the queries in lanes first .. masked 0: all
 * keys are visible to all queries. */
CQ_INLINE void softmax_lanes(const int32_t masked, const attention_tile *a, int32_t first_key, int32_t n_keys,
                             int32_t first) {
    const int_vec hidden = (int_vec)all_lanes(CQ_HIDDEN);
    const vec previous = load_vec(a->max + first);
    float *scores = a->scores + first;
    vec max = previous;
    for (int32_t k = 0; k < n_keys; k++) {
        vec score = load_vec(scores + k * CQ_QUERY_TILE);
        if (masked) {
            const int_vec mask = visible(a, first_key + k, first);
            score = (vec)(((int_vec)score & mask) | (hidden & ~mask));
        }
        max = max_vec(max, score);
    }
    const vec shrink = exp2_vec(previous - max);
    vec sum = load_vec(a->sum + first) * shrink;
    for (int32_t k = 0; k < n_keys; k++) {
        vec p = exp2_vec(load_vec(scores + k * CQ_QUERY_TILE) - max);
        if (masked) p = (vec)((int_vec)p & visible(a, first_key + k, first));
        store_vec(scores + k * CQ_QUERY_TILE, p);
        sum += p;
    }
    store_vec(a->max + first, max), store_vec(a->sum + first, sum), store_vec(a->shrink + first, shrink);
}

static void batch_softmax(const attention_tile *a, int32_t first_key, int32_t n_keys) {
    const int32_t window = a->op->window > 0 ? a->op->window : INT32_MAX;
    const int32_t all_visible =
        first_key + n_keys - 1 <= a->position && a->position + a->n_queries - 1 - first_key < window;
    for (int32_t first = 0; first < a->n_queries; first += CQ_LANES)
        if (all_visible)
            softmax_lanes(0, a, first_key, n_keys, first);
        else
            softmax_lanes(1, a, first_key, seen_keys(n_keys, a->position - first_key + 1, first + CQ_LANES - 1), first);
}

static void group_scores(const attention_tile *a, const float *q, int32_t n_keys) {
    const int32_t dim = a->op->head_dim;
    const float *keys[CQ_KEY_TILE];
    for (int32_t k = 0; k < n_keys; k++) keys[k] = a->tile + k * dim;
    for (int32_t i = 0; i < a->n_queries; i++) dot_f32(q + i * dim, keys, n_keys, dim, a->scores + i * CQ_KEY_TILE);
}

static void group_softmax(const attention_tile *a, int32_t n_keys) {
    const float scale = score_scale(a->op);
    for (int32_t i = 0; i < a->n_queries; i++) {
        float *scores = a->scores + i * CQ_KEY_TILE, largest = a->max[i];
#pragma omp simd reduction(max : largest)
        for (int32_t k = 0; k < n_keys; k++) {
            scores[k] *= scale;
            largest = scores[k] > largest ? scores[k] : largest;
        }
        for (int32_t k = n_keys; k % CQ_LANES; k++) scores[k] = CQ_HIDDEN; /* adds 2^-125 to a sum of at least one */
        vec sum = {0};
        for (int32_t k = 0; k < n_keys; k += CQ_LANES) {
            const vec p = exp2_vec(load_vec(scores + k) - largest);
            store_vec(scores + k, p);
            sum += p;
        }
        a->shrink[i] = exp2_vec(all_lanes(a->max[i] - largest))[0];
        a->sum[i] = a->sum[i] * a->shrink[i] + sum_lanes(sum);
        a->max[i] = largest;
    }
}

static attention_tile begin_head(const cq_attention *op, int32_t number, int32_t position, int32_t n_queries,
                                 const float *q, float *out, float *scratch) {
    const int64_t stride = (int64_t)op->n_heads * op->value_dim;
    for (int32_t i = 0; i < n_queries; i++) /* outputs of a head are far apart */
        for (int32_t d = 0; d < op->value_dim; d += 16) __builtin_prefetch(out + i * stride + d, 1);
    const attention_tile a = carve_scratch(op, number, position, n_queries, scratch);
    transpose_queries(&a, q);
    for (int32_t i = 0; i < n_queries; i++) memset(out + i * stride, 0, sizeof(float) * (size_t)op->value_dim);
    return a;
}

static void attention_heads(const cq_attention *op, int32_t head, int32_t n_heads, int32_t position, int32_t n_queries,
                            const float *q, float *out, float *scratch) {
    const int32_t dim = op->value_dim, end = position + n_queries;
    const int64_t stride = (int64_t)op->n_heads * dim, kv_head = head / (op->n_heads / op->n_kv_heads);
    attention_tile heads[CQ_TILE_HEADS], values;
    for (int32_t h = 0; h < n_heads; h++)
        heads[h] = begin_head(op, h, position, n_queries, q + h * op->head_dim, out + h * dim, scratch);
    for (int32_t first = cq_first_key(op, position); first < end; first += CQ_KEY_TILE) {
        const int32_t n_keys = cq_min(end - first, CQ_KEY_TILE);
        load_keys(heads, kv_head, first, n_keys);
        for (int32_t h = 0; h < n_heads; h++) {
            batch_scores(&heads[h], first, n_keys);
            batch_softmax(&heads[h], first, n_keys);
            values = heads[h];
            if (op->v_cache) values.tile += CQ_KEY_TILE * cq_attention_tile_width(op);
            if (h == 0) load_values(&values, kv_head, first, n_keys);
            add_batch_values(&values, first, n_keys, out + h * dim);
        }
    }
    for (int32_t h = 0; h < n_heads; h++)
        for (int32_t i = 0; i < n_queries; i++) {
            const float share = 1.0f / heads[h].sum[i];
            for (int32_t d = 0; d < dim; d++) out[i * stride + h * dim + d] *= share;
        }
}

static void attention_chunk(const cq_attention *op, int32_t head, int32_t n_heads, int32_t first, int32_t end,
                            const float *q, float *partials, int64_t stride, float *scratch) {
    const int32_t dim = op->value_dim;
    const int64_t kv_head = head / (op->n_heads / op->n_kv_heads);
    const attention_tile a = carve_scratch(op, 0, 0, n_heads, scratch);
    for (int32_t i = 0; i < n_heads; i++) memset(partials + i * stride, 0, sizeof(float) * (size_t)dim);
    for (; first < end; first += CQ_KEY_TILE) {
        const int32_t n_keys = cq_min(end - first, CQ_KEY_TILE);
        load_keys(&a, kv_head, first, n_keys);
        group_scores(&a, q, n_keys);
        group_softmax(&a, n_keys);
        load_values(&a, kv_head, first, n_keys);
        add_group_values(&a, n_keys, partials, stride);
    }
    for (int32_t i = 0; i < n_heads; i++) {
        partials[i * stride + dim] = a.max[i];
        partials[i * stride + dim + 1] = a.sum[i];
    }
}
#endif
