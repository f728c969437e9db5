/* The clustering kernels in AVX2 with FMA: templates over vectors of eight floats. */
#if defined(__x86_64__)
#include "cluster_kernels.h"
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#endif
#include "isa/avx2_vectors.h" /* vec and its primitives */

#include "isa/template/column_block.h" /* nearest_block, descend_block, rank_update, sum_by_centroid */
#include "isa/template/kmeans_layer.h" /* kmeans_layer */

const cq_cluster_kernels cq_cluster_kernels_avx2 = {
    .kmeans_layer = kmeans_layer,
    .nearest_block = nearest_block,
    .descend_block = descend_block,
    .rank_update = rank_update,
    .sum_by_centroid = sum_by_centroid,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
