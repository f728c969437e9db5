/* TEMPLATE. Packed indices -> weights, the same in every instruction set. Included after these of its own:
 *
 *   indices64, weights64, entries     64 indices, 64 bytes of weights in column order, and a table
 *   halves64                          which of 64 weights take the second half of a table of 32 entries
 *   two_bits(block), four_bits(block)                  64 fields side by side, as CQ2 and CQ4 pack them
 *   two_bits_on_trellis(block, above, above2)          indices of CQ2T
 *   four_bits_on_trellis(block, above2)                of CQ4T, less the upper bit: halves_of_fours(above)
 *   add_bit(indices, plane, value)    index + value where the plane, bit j of column j, has a bit
 *   halves_of_plane(plane)
 *   look_up(table, indices), look_up_32(table, indices, halves)
 */
#ifndef CQ_DECODE_H
#define CQ_DECODE_H
#include "isa/indices.h"

/* A block, all its bits as docs/format.md lays them out; above, above2: the same block one and two rows above. */
CQ_INLINE weights64 decode_block(const uint8_t *block, const uint8_t *above, const uint8_t *above2, const int32_t type,
                                 entries table) {
    if (type == CQ_CQ2) return look_up(table, two_bits(block));
    if (type == CQ_CQ3) return look_up(table, add_bit(two_bits(block), cq_plane(block + 16), 4));
    if (type == CQ_CQ4) return look_up(table, four_bits(block));
    if (type == CQ_CQ5) return look_up_32(table, four_bits(block), halves_of_plane(cq_plane(block + 32)));
    if (type == CQ_CQ2T) return look_up(table, two_bits_on_trellis(block, above, above2));
    if (type == CQ_CQ4T) return look_up_32(table, four_bits_on_trellis(block, above2), halves_of_fours(above));
    const indices64 lower = add_bit(two_bits(block), cq_plane(block + 16) ^ cq_plane(above2 + 16), 4);
    return look_up(table, add_bit(lower, cq_plane(above + 16), 8));
}

CQ_INLINE weights64 decode_row_block(const cq_row *row, const int32_t type, int32_t b, entries table) {
    const int64_t at = (int64_t)b * 8 * cq_stored_bits(type);
    return decode_block(row->indices + at, row->above + at, row->above2 + at, type, table);
}
#endif
