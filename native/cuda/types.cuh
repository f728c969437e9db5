/* The clustered types: the one table of them, for C (native/src/kernels.h) and CUDA.
 *
 *   name, id   of cq_type in cq.h; GGUF's tensor type
 *   bits       per weight in the file, 2 to 5
 *   trellis    whether an index has one bit more, which follows from the rows above (docs/format.md) */
#ifndef CQ_TYPES_CUH
#define CQ_TYPES_CUH

/* clang-format off */
#define CQ_CLUSTERED_TYPES(TYPE) \
    TYPE(CQ_CQ2,  17202, 2, 0)   \
    TYPE(CQ_CQ3,  17203, 3, 0)   \
    TYPE(CQ_CQ4,  17204, 4, 0)   \
    TYPE(CQ_CQ5,  17205, 5, 0)   \
    TYPE(CQ_CQ2T, 17212, 2, 1)   \
    TYPE(CQ_CQ3T, 17213, 3, 1)   \
    TYPE(CQ_CQ4T, 17214, 4, 1)
/* clang-format on */
#endif
