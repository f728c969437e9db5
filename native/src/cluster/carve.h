/* How a workspace is cut from the memory that a caller gives. */
#ifndef CQ_CARVE_H
#define CQ_CARVE_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Points `field` at the next 64-byte aligned part of base (NULL: only counts); returns the bytes used so far. */
static inline size_t cq_take(uint8_t *base, size_t *used, void *field, size_t bytes) {
    uint8_t *at = base ? base + *used : NULL;
    memcpy(field, &at, sizeof at);
    return *used += (bytes + 63) & ~(size_t)63;
}

#endif
