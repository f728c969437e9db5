/* What the kernels share: the matrices' layout (native/include/cq.h, docs/format.md) and sums over lanes. */
#ifndef CQ_COMMON_CUH
#define CQ_COMMON_CUH
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef signed char i8;

#include "ptx.cuh"
#include "types.cuh"

#define CQ_ENUMERATOR(name, id, bits, trellis) name = id,
enum { CQ_CLUSTERED_TYPES(CQ_ENUMERATOR) };
#undef CQ_ENUMERATOR

enum {
    CQ_F32 = 0,
    CQ_F16 = 1,
    CQ_Q8_0 = 8,
    CQ_BLOCK = 64, /* columns of a packed block of a CQ type */
    CQ_Q8_0_COLS = 32,
    CQ_Q8_0_BYTES = 34,
    CQ_TILE_TOKENS = 64, /* items of a tile of the GEMM kernels; route.cu deals experts' slots into such tiles */
};

/* Weights [n_experts][n_rows][n_cols]; the fields are those of cq.h, the pointers device memory. */
struct cq_matrix {
    int type, n_experts, n_rows, n_cols, codebook_rows, codebook_cols, scale_cols, unused;
    const u8 *data;         /* packed indices, or F32, F16, Q8_0 elements */
    const i8 *centroids;    /* [n_experts][n_rows / codebook_rows][n_cols / codebook_cols][K], rounded up */
    const i8 *group_scales; /* [n_experts][n_rows][n_cols / scale_cols, rounded up], 0 .. 127; or NULL */
    const float *scales;    /* [n_experts][n_rows]; of CQ types, NULL: store_integer */
};

/* out (+)= x W^T (+ bias) for n_items rows: of x, or slots that are routed to experts. The input row of a slot is its
 * token if gather is set, else the slot itself. Where nothing is routed, row r of x is multiplied by matrix
 * r % n_experts: one after the other for the equal parts (an attention head's) that a longer row consists of. */
struct cq_linear {
    cq_matrix w;
    const float *x;      /* [rows][n_cols]: what F32 and F16 matrices multiply */
    const i8 *q;         /* [rows][n_cols]: what the others do */
    const float *scales; /* [rows] of q, or [rows][n_cols / 32] for Q8_0 */
    const float *bias;   /* [n_rows] or NULL */
    const int *ids;      /* [slots]: their experts; NULL: one matrix */
    const int *order;    /* [slots] sorted by expert */
    const int *offsets;  /* [n_experts + 1] */
    const int *tiles;    /* [tiles][2]: expert (-1: none) and first item of its tile in order */
    const int *places;   /* [experts]: which of w's matrices an expert has, -1: none; NULL: all in order */
    float *out;          /* [n_items][n_rows] */
    int n_items, top_k, gather, accumulate;
};

/* Up to three linear layers of one launch, which read the same rows and have matrices of the same type and width (q, k
 * and v; gate and up): blockIdx.z chooses. */
struct cq_linears {
    cq_linear of[3];
};

/* The items of one tile: at [first, last) of order, or where nothing is routed the first-th to last-1st of the rows
 * that multiply the same matrix. expert: which of w's matrices they multiply, -1: none. */
struct cq_tile {
    int expert, first, last;
};

CQ_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
CQ_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

CQ_DEVICE int place_of(const cq_linear &op, int expert) { return op.places ? op.places[expert] : expert; }

/* Which of w's matrices a row of out multiplies, -1: none. */
CQ_DEVICE int matrix_of(const cq_linear &op, int row) {
    return op.ids ? place_of(op, op.ids[row]) : row % op.w.n_experts;
}

CQ_DEVICE cq_tile tile_at(const cq_linear &op, int index) {
    if (!op.ids) {
        const int rows = op.n_items / op.w.n_experts, tiles = ceil_div(rows, CQ_TILE_TOKENS);
        const int first = index % tiles * CQ_TILE_TOKENS;
        return {index / tiles, first, min_int(rows, first + CQ_TILE_TOKENS)};
    }
    const int expert = op.tiles[2 * index], first = op.tiles[2 * index + 1];
    if (expert < 0) return {-1, 0, 0};
    return {place_of(op, expert), first, min_int(op.offsets[expert + 1], first + CQ_TILE_TOKENS)};
}

/* Row of out of a tile's item, and row of x of that row of out. */
CQ_DEVICE int output_row(const cq_linear &op, const cq_tile &tile, int item) {
    return op.ids ? op.order[item] : item * op.w.n_experts + tile.expert;
}
CQ_DEVICE int input_row(const cq_linear &op, int row) { return op.gather ? row / op.top_k : row; }

CQ_DEVICE void store_output(const cq_linear &op, float value, int item_row, int row) {
    float *out = op.out + (long long)item_row * op.w.n_rows + row;
    if (op.accumulate) value += *out;
    *out = op.bias ? value + op.bias[row] : value;
}

/* Stores an accumulator, scaled; expert_row counts over all experts. A matrix without scales stands for its integers:
 * the int32 itself is stored, which tests compare with the oracle. */
CQ_DEVICE void store_integer(const cq_linear &op, int sum, float token_scale, int item_row, int row,
                             long long expert_row) {
    if (op.w.scales)
        store_output(op, (float)sum * (op.w.scales[expert_row] * token_scale), item_row, row);
    else
        ((int *)op.out)[(long long)item_row * op.w.n_rows + row] = sum;
}

/* Over each group of `lanes` (a power of two up to 32) neighbouring lanes; every lane gets the result. All 32 call. */
template <class T> CQ_DEVICE T sum_lanes(T value, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}
CQ_DEVICE float max_lanes(float value, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
    return value;
}

/* Bytes of a Q8_0 block start at any even address: two of them as one word. */
CQ_DEVICE u32 load_word(const u8 *even_address) {
    const u16 *halves = (const u16 *)even_address;
    return halves[0] | (u32)halves[1] << 16;
}
#endif
