/* Packed indices -> weights, the same in every instruction set. Included after these of its own:
 *
 *   indices64, weights64, entries   64 indices, 64 bytes of weights in column order, and a table
 *   two_bits(block), four_bits(block), no_bits()   the lower bits of 64 indices
 *   add_bit(indices, plane, value)   index + value where the plane, bit j of column j, has a bit
 *   look_up(type, table, indices, upper)   entries of the table; upper: which of 64 take the second half of one of 32
 */
#ifndef CQ_DECODE_H
#define CQ_DECODE_H
#include "indices.h"

/* Block b of a row, all its bits as docs/format.md lays them out. */
CQ_INLINE weights64 decode_block(const cq_row *row, const int32_t type, int32_t b, entries table) {
    const uint8_t *block = row->indices + (int64_t)b * 8 * cq_stored_bits(type);
    if (!cq_has_trellis(type)) {
        if (type == CQ_CQ2) return look_up(type, table, two_bits(block), 0);
        if (type == CQ_CQ3) return look_up(type, table, add_bit(two_bits(block), cq_plane(block + 16), 4), 0);
        return look_up(type, table, four_bits(block), type == CQ_CQ5 ? cq_plane(block + 32) : 0);
    }
    const cq_path path = cq_path_at(row, type, b);
    if (type == CQ_CQ2T) {
        const indices64 rest = add_bit(no_bits(), cq_plane(block), 1);
        return look_up(type, table, add_bit(add_bit(rest, path.lower, 2), path.upper, 4), 0);
    }
    if (type == CQ_CQ3T)
        return look_up(type, table, add_bit(add_bit(two_bits(block), path.lower, 4), path.upper, 8), 0);
    const indices64 rest = add_bit(two_bits(block), cq_plane(block + 16), 4);
    return look_up(type, table, add_bit(rest, path.lower, 8), path.upper);
}
#endif
