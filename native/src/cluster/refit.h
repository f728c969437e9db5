/* Codebooks under the inputs' Hessian with the assignments fixed (refit.c). */
#ifndef CQ_REFIT_H
#define CQ_REFIT_H
#include "cluster/batch.h"

/* New codebooks of all active sets of a batch. */
void cq_refit_codebooks(const cq_batch *b);
#endif
