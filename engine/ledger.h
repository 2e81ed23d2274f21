// Where memory is, in bytes: the one account that decisions are checked against.
#pragma once

#include <cstdint>

namespace espalier {

struct Ledger {
  uint64_t weights = 0;           // in memory
  uint64_t weights_released = 0;  // out of it, and to be had again
  uint64_t kv_used = 0;
  uint64_t kv_reusable = 0;  // held by the prefix cache, free for the asking
  uint64_t kv_free = 0;
  uint64_t workspace = 0;  // activations, logits, scratch
  uint64_t grpc = 0;       // estimated: what calls hold for messages
  uint64_t foreign = 0;    // what others hold of the same memory
};

}  // namespace espalier
