/* Packed indices to int8 weights, four at a time (docs/format.md).
 *
 * Everything works on half blocks: the 32 columns 16h .. 16h + 15 and 32 + 16h .. of a block of 64, h = 0 or 1. Their
 * indices make four words k = 0 .. 3 of eight nibbles, which are already selectors of byte permutes:
 *
 *     nibble   0       1       2       3       4       5       6       7
 *     column   j       j+32    j+1     j+33    j+2     j+34    j+3     j+35        with j = 16h + 4k
 *
 * CQ4 stores such words; CQ2 stores two of them in one, fields of two bits apart; bits above come from planes.
 *
 * Weights are made in offset form. With u = centroid + 128 and group scale g, 0 <= u <= 255 and 0 <= g <= 128:
 *
 *     (centroid * g + 64) >> 7  =  ((u * g + 64) >> 7) - g          as 128 g is a multiple of 2^7
 *
 * u g + 64 <= 32704 fits 16 bits, so one 32-bit multiplication scales two entries of a codebook. No group scale is
 * g = 128: then the table is u itself. */
#ifndef CQ_CODEBOOK_CUH
#define CQ_CODEBOOK_CUH
#include "common.cuh"

#define CQ_BITS_IF(name, id, bits, trellis) +(CQ_TYPE == id ? bits : 0)
#define CQ_TRELLIS_IF(name, id, bits, trellis) +(CQ_TYPE == id ? trellis : 0)
enum {
    CQ_BITS = 0 CQ_CLUSTERED_TYPES(CQ_BITS_IF),
    CQ_TRELLIS = 0 CQ_CLUSTERED_TYPES(CQ_TRELLIS_IF),
    CQ_NIBBLES = CQ_BITS >= 4, /* fields of four bits, else of two */
    CQ_PLANE = CQ_BITS % 2,    /* and the bit above them in a plane */
    CQ_BLOCK_BYTES = 8 * CQ_BITS,
    CQ_K = 1 << (CQ_BITS + CQ_TRELLIS),
    CQ_TABLE = CQ_K / 4, /* words of a codebook */
    CQ_NO_GROUP_SCALE = 128,
};

/* What is stored of a half block of one row. plane: of columns 0 .. 31 and 32 .. 63. */
struct cq_half {
    u32 fields[4], plane[2];
};

/* 16 bytes at once where blocks are multiples of 16; those with a plane are multiples of 8. */
CQ_DEVICE cq_half load_half(const u8 *block, int half) {
    cq_half out;
    const u8 *fields = block + (CQ_NIBBLES ? 16 * half : 0);
    if (CQ_PLANE) {
        const uint2 low = *(const uint2 *)fields, high = *(const uint2 *)(fields + 8);
        const uint2 plane = *(const uint2 *)(block + (CQ_NIBBLES ? 32 : 16));
        out = {{low.x, low.y, high.x, high.y}, {plane.x, plane.y}};
    } else {
        const uint4 all = *(const uint4 *)fields;
        out = {{all.x, all.y, all.z, all.w}, {0, 0}};
    }
    return out;
}

/* Bits 0 .. 3 of a to bits 0, 8, 16, 24: the shifted copies do not overlap. */
CQ_DEVICE u32 spread(u32 a) { return ((a & 15) * 0x00204081u) & 0x01010101u; }

/* The plane's bits of word k at the lowest bit of its nibbles. */
CQ_DEVICE u32 plane_nibbles(u32 low, u32 high, int half, int k) {
    const int column = 16 * half + 4 * k;
    return spread(low >> column) | spread(high >> column) << 4;
}

/* Word k of indices: the lower four bits of each, and at bit 3 of `upper`'s nibbles bit 4. above, above2: the rows one
 * and two above in the set, which only the types with T read. */
CQ_DEVICE u32 index_word(const cq_half &own, const cq_half &above, const cq_half &above2, int half, int k, u32 *upper) {
    u32 fields = own.fields[k], index;
    *upper = 0;
    if (CQ_TYPE == CQ_CQ4T) *upper = above.fields[k] & 0x88888888u;
    if (CQ_TYPE == CQ_CQ4T) fields ^= above2.fields[k] & 0x88888888u;
    if (CQ_TYPE == CQ_CQ2T) fields ^= above2.fields[k] & 0xaaaaaaaau;
    index = CQ_NIBBLES ? fields : fields >> 2 * half & 0x33333333u;
    if (CQ_TYPE == CQ_CQ2T) index |= (above.fields[k] >> 2 * half & 0x22222222u) << 1;
    if (CQ_TYPE == CQ_CQ3) index |= plane_nibbles(own.plane[0], own.plane[1], half, k) << 2;
    if (CQ_TYPE == CQ_CQ5) *upper = plane_nibbles(own.plane[0], own.plane[1], half, k) << 3;
    if (CQ_TYPE == CQ_CQ3T) {
        index |= plane_nibbles(own.plane[0] ^ above2.plane[0], own.plane[1] ^ above2.plane[1], half, k) << 2;
        index |= plane_nibbles(above.plane[0], above.plane[1], half, k) << 3;
    }
    return index;
}

/* Entries of a table of up to 16 for four indices: the lower 16 bits of `index`. */
CQ_DEVICE u32 look_up_16(const u32 *table, u32 index) {
    if (CQ_TABLE == 1) return byte_permute(table[0], table[0], index);
    if (CQ_TABLE == 2) return byte_permute(table[0], table[1], index);
    const u32 lower = byte_permute(table[0], table[1], index & 0x7777u);
    const u32 higher = byte_permute(table[2], table[3], index & 0x7777u);
    return byte_permute(lower, higher, 0x3210u | (index >> 1 & 0x4444u));
}

CQ_DEVICE u32 look_up(const u32 *table, u32 index, u32 upper) {
    const u32 lower = look_up_16(table, index);
    if (CQ_TABLE < 8) return lower;
    return byte_permute(lower, look_up_16(table + CQ_TABLE / 2, index), 0x3210u | (upper >> 1 & 0x4444u));
}

/* A codebook in offset form; its K bytes start at a multiple of K. */
CQ_DEVICE void load_codebook(const i8 *centroids, u32 *codebook) {
    if constexpr (CQ_TABLE < 4) {
        for (int i = 0; i < CQ_TABLE; i++) codebook[i] = ((const u32 *)centroids)[i] ^ 0x80808080u;
    } else {
        for (int i = 0; i < CQ_TABLE; i += 4) {
            const uint4 four = ((const uint4 *)centroids)[i / 4];
            codebook[i] = four.x ^ 0x80808080u, codebook[i + 1] = four.y ^ 0x80808080u;
            codebook[i + 2] = four.z ^ 0x80808080u, codebook[i + 3] = four.w ^ 0x80808080u;
        }
    }
}

/* table = (codebook * g + 64) >> 7, bytewise. */
CQ_DEVICE void scale_codebook(const u32 *codebook, u32 g, u32 *table) {
    for (int i = 0; i < CQ_TABLE; i++) {
        const u32 even = (codebook[i] & 0x00ff00ffu) * g + 0x00400040u;
        const u32 odd = (codebook[i] >> 8 & 0x00ff00ffu) * g + 0x00400040u;
        table[i] = byte_permute(even >> 7, odd >> 7, 0x6240);
    }
}

/* Offset form to int8: each byte less g, modulo 256. The difference of the lower seven bits borrows from no neighbour.
 */
CQ_DEVICE void table_to_signed(u32 *table, u32 g) {
    const u32 four = g * 0x01010101u;
    for (int i = 0; i < CQ_TABLE; i++)
        table[i] = ((table[i] | 0x80808080u) - (four & 0x7f7f7f7fu)) ^ ((table[i] ^ ~four) & 0x80808080u);
}

/* Where a matrix's parts lie. Rows are counted within the expert. */
struct cq_reader {
    const u8 *data;
    const i8 *centroids, *group_scales;
    int n_rows, n_codebooks, n_groups, codebook_rows, codebook_blocks, scale_blocks, row_bytes;
};

/* Which codebook and group scale of its row a block of columns has: divisions, so once for all rows. */
struct cq_columns {
    u32 codebook, group;
};

CQ_DEVICE cq_reader reader_of(const cq_matrix &w, int expert) {
    const int scale_cols = w.scale_cols ? w.scale_cols : w.n_cols;
    cq_reader r;
    r.n_rows = w.n_rows;
    r.n_codebooks = ceil_div(w.n_cols, w.codebook_cols), r.n_groups = ceil_div(w.n_cols, scale_cols);
    r.codebook_rows = w.codebook_rows;
    r.codebook_blocks = w.codebook_cols / CQ_BLOCK, r.scale_blocks = scale_cols / CQ_BLOCK;
    r.row_bytes = w.n_cols / CQ_BLOCK * CQ_BLOCK_BYTES;
    const long long first = (long long)expert * w.n_rows,
                    books = (long long)expert * ceil_div(w.n_rows, w.codebook_rows);
    r.data = w.data + first * r.row_bytes;
    r.centroids = w.centroids + books * r.n_codebooks * CQ_K;
    r.group_scales = w.group_scales ? w.group_scales + first * r.n_groups : nullptr;
    return r;
}

/* Offsets within an expert are 32 bits wide, which halves the registers they take: the host refuses 4 GB and more. */
CQ_DEVICE const u8 *block_at(const cq_reader &r, int row, int block) {
    return r.data + ((u32)row * (u32)r.row_bytes + (u32)(block * CQ_BLOCK_BYTES));
}

CQ_DEVICE cq_columns columns_of(const cq_reader &r, int block) {
    return {(u32)block / (u32)r.codebook_blocks, (u32)block / (u32)r.scale_blocks};
}

/* The division keeps what the GEMV does where a set begins behind a branch: as a shift, all sets' loads go ahead of
 * it, and CQ2T spills. */
CQ_DEVICE const i8 *codebook_at(const cq_reader &r, int row, const cq_columns &columns) {
    return r.centroids + ((u32)(row / r.codebook_rows) * (u32)r.n_codebooks + columns.codebook) * CQ_K;
}

CQ_DEVICE u32 group_scale_at(const cq_reader &r, int row, const cq_columns &columns) {
    if (!r.group_scales) return CQ_NO_GROUP_SCALE;
    return (u32)r.group_scales[(u32)row * (u32)r.n_groups + columns.group];
}

/* The row `up` (1 or 2) rows above in the set of rows that share codebooks, tail-biting: the first row follows the
 * last; the matrix's last set may be shorter. */
CQ_DEVICE int row_above(const cq_reader &r, int row, int up) {
    const int position = row & (r.codebook_rows - 1), first = row - position;
    const int size = min_int(r.codebook_rows, r.n_rows - first);
    return first + (position + 2 * size - up) % size;
}
#endif
