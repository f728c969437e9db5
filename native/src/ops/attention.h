/* The attention operation (attention.c). */
#ifndef CQ_OPS_ATTENTION_H
#define CQ_OPS_ATTENTION_H
#include "ops/worker.h"

void cq_run_attention(const cq_worker *worker, const cq_attention *op);

/* Bytes that the team shares: what the chunks of one token's keys give, before they are joined. */
int64_t cq_attention_partial_bytes(const cq_attention *op);
#endif
