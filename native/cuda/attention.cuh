/* What the attention kernels share: arguments, which keys a block reads, pairs of halves. */
#ifndef CQ_ATTENTION_CUH
#define CQ_ATTENTION_CUH
#include "common.cuh"

#define CQ_HIDDEN (-1e30f) /* score of a key that a query does not see; finite, as differences must not be NaN */

/* head_dim: columns of queries and keys; value_dim: of values, which latent attention finds in the first of each key.
 */
struct cq_attention {
    const float *q; /* [tokens][n_heads][head_dim] */
    const u16 *k_cache,
        *v_cache;        /* F16 [n_kv_heads][n_ctx][head_dim] and [..][value_dim]; latent attention: no values */
    float *out;          /* [tokens][n_heads][value_dim] */
    float *partial;      /* [splits][tokens][n_heads][value_dim + 2]: sums, then m and l; splits > 1 */
    const int *position; /* of the first token */
    int n_tokens, n_heads, n_kv_heads, n_ctx, window; /* window 0: unlimited */
    float scale;
};

/* Queries [tokens][n_heads][head_dim], keys and values [tokens][n_kv_heads][head_dim] on their way to attention; the
 * caches are F16 [n_kv_heads][n_ctx][head_dim]. Weights of norms: [head_dim], or NULL for no norm. */
struct cq_heads {
    const float *q, *k, *v, *q_weight, *k_weight, *cos_sin;
    const int *position; /* of the first token */
    float *q_out;
    u16 *k_cache, *v_cache;
    int n_heads, n_kv_heads, head_dim, n_rot, interleaved, n_ctx;
    float q_eps, k_eps;
};

/* Keys from .. to - 1. */
struct cq_span {
    int from, to;
};

CQ_DEVICE int window_of(const cq_attention &op) { return op.window > 0 ? op.window : 0x7fffffff; }

/* Row (token, head) of q and out of a block's row: of the heads that share key-value head blockIdx.y. */
CQ_DEVICE long long query_row(const cq_attention &op, int row) {
    const int heads = op.n_heads / op.n_kv_heads;
    return (long long)(row / heads) * op.n_heads + blockIdx.y * heads + row % heads;
}

/* Keys that any of the tokens first .. last sees, in whole tiles from a multiple of `tile` on, dealt to the splits in
 * equal parts; this block's. */
CQ_DEVICE cq_span span_of(const cq_attention &op, int first, int last, int tile) {
    const int position = *op.position, window = window_of(op);
    const int begin = position + first >= window ? position + first - window + 1 : 0;
    const int end = position + last + 1, first_tile = begin / tile;
    const int each = ceil_div(ceil_div(end, tile) - first_tile, gridDim.z);
    const int from = (first_tile + (int)blockIdx.z * each) * tile;
    return {from, min_int(end, from + each * tile)};
}

/* Where a row's result goes: to out, or with splits to this one's part of partial, followed by m and l. */
CQ_DEVICE float *result_row(const cq_attention &op, long long row, int value_dim) {
    if (gridDim.z == 1) return op.out + row * value_dim;
    return op.partial + ((long long)blockIdx.z * op.n_tokens * op.n_heads + row) * (value_dim + 2);
}

/* Two halves of a word. */
CQ_DEVICE float lower(u32 pair) { return from_half((u16)pair); }
CQ_DEVICE float upper(u32 pair) { return from_half((u16)(pair >> 16)); }
#endif
