/* The clustering kernels for any processor: templates over vectors of four floats. */
#include "cluster_kernels.h"
#include "isa/portable_vectors.h" /* vec and its primitives */

#include "isa/template/column_block.h" /* nearest_block, descend_block, rank_update, sum_by_centroid */
#include "isa/template/kmeans_layer.h" /* kmeans_layer */

const cq_cluster_kernels cq_cluster_kernels_portable = {
    .kmeans_layer = kmeans_layer,
    .nearest_block = nearest_block,
    .descend_block = descend_block,
    .rank_update = rank_update,
    .sum_by_centroid = sum_by_centroid,
};
