// Every activation buffer of a forward pass in one place, sized once for the largest step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "engine/model_config.h"
#include "kernels/tensor.h"

namespace espalier {

// 64-byte aligned floats: one cache line, one AVX-512 register.
class AlignedFloats {
 public:
  AlignedFloats() = default;
  explicit AlignedFloats(size_t count)
      : data_(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64))),
        count_(count) {}

  float* data() const { return data_.get(); }
  size_t bytes() const { return count_ * sizeof(float); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float[], Free> data_;
  size_t count_ = 0;
};

struct Activations {
  AlignedFloats residual;   // [rows, hidden]                the residual stream
  AlignedFloats normed;     // [rows, hidden]                input of a block's products
  AlignedFloats q;          // [rows, heads * head_dim]      queries, rotated in place
  AlignedFloats k;          // [rows, kv_heads * head_dim]   keys, rotated in place
  AlignedFloats v;          // [rows, kv_heads * head_dim]   values
  AlignedFloats attention;  // [rows, heads * head_dim]      attention's output, before o
  AlignedFloats gate;       // [rows, channels]              gate, then silu(gate) * up
  AlignedFloats up;         // [rows, channels]

  Activations(const ModelConfig& config, int max_rows)
      : residual(size_t(max_rows) * config.hidden),
        normed(size_t(max_rows) * config.hidden),
        q(size_t(max_rows) * config.heads * config.head_dim),
        k(size_t(max_rows) * config.kv_heads * config.head_dim),
        v(size_t(max_rows) * config.kv_heads * config.head_dim),
        attention(size_t(max_rows) * config.heads * config.head_dim),
        gate(size_t(max_rows) * config.channels),
        up(size_t(max_rows) * config.channels) {}

  // What the constructor will take, to be asked before.
  static uint64_t BytesFor(const ModelConfig& config, int max_rows) {
    const uint64_t heads_width = uint64_t(config.heads + config.kv_heads) * config.head_dim;
    return 2 * (config.hidden + heads_width + config.channels) * max_rows * sizeof(float);
  }

  size_t bytes() const {
    return residual.bytes() + normed.bytes() + q.bytes() + k.bytes() + v.bytes() +
           attention.bytes() + gate.bytes() + up.bytes();
  }
};

}  // namespace espalier
